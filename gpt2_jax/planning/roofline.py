"""How long a step takes: arithmetic, memory and interconnect side by side, of which the slowest decides.

Williams et al. 2009, "Roofline", with a third roof for the interconnect.
"""

import dataclasses
from collections.abc import Iterable

from gpt2_jax.planning.chips import Machine
from gpt2_jax.planning.flops import Product
from gpt2_jax.planning.traffic import MemoryTraffic, Traffic

# Shares of the published peaks that large operations reach. Arithmetic: MaxText's 65 % MFU for 70 billion parameters
# on v5p, of which recomputation takes a quarter. Interconnect: 45 of 50 GB/s per link on v5e.
REACHED_ARITHMETIC = 0.85
REACHED_MEMORY = 0.85
REACHED_INTERCONNECT = 0.9

ASSUMPTIONS = (
    f"roofline: {REACHED_ARITHMETIC:.0%} of the peak arithmetic, {REACHED_MEMORY:.0%} of the memory bandwidth and "
    f"{REACHED_INTERCONNECT:.0%} of the links' are reached; short inner dimensions (heads of 64) leave the matrix unit "
    "partly idle; products, their memory traffic and overlapped collectives run side by side, and the slowest decides; "
    "memory traffic without arithmetic (norms, softmax, loss, optimizer) and collectives that do not overlap are "
    "added; memory traffic is counted from the config; input, checkpoints and evaluation take no time"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds per step.

    Attributes:
      compute: matrix products.
      memory: all reads and writes of the device's memory.
      alone: those of them beside which nothing is computed.
      interconnect: collectives, overlapped or not.
      exposed: those of them that nothing hides.
    """

    compute: float
    memory: float
    alone: float
    interconnect: float
    exposed: float

    @property
    def step(self) -> float:
        """The whole step."""
        beside = max(self.compute, self.memory - self.alone, self.interconnect - self.exposed)
        return beside + self.alone + self.exposed

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])


def make_roofline(
    machine: Machine, products: Iterable[Product], memory: MemoryTraffic, traffic: Iterable[Traffic]
) -> Roofline:
    """The times of a step from what one device computes, moves and sends. Unknown overlap counts as overlap."""
    chip = machine.chip
    flops = sum(product.padded_flops(chip.tile) for product in products)

    def sending(item: Traffic) -> float:
        slices = machine.slices if "data" in item.axes.split("+") else 1
        return item.wire / (REACHED_INTERCONNECT * machine.bandwidth(item.group, slices))

    seconds = [(item, sending(item)) for item in traffic]
    return Roofline(
        compute=flops / (REACHED_ARITHMETIC * chip.peak_flops),
        memory=(memory.beside + memory.alone) / (REACHED_MEMORY * chip.memory_bandwidth),
        alone=memory.alone / (REACHED_MEMORY * chip.memory_bandwidth),
        interconnect=sum(time for _, time in seconds),
        exposed=sum(time * (1 - item.overlapped) for item, time in seconds if item.overlapped is not None),
    )
