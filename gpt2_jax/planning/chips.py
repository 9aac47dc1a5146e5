"""What chips can do, as their makers publish it. Edit the table for others; prices are in prices.py."""

import dataclasses
import difflib
import math
import os
import re
import time

import numpy as np

from gpt2_jax.errors import UsageError
from gpt2_jax.planning.topology import parse_topologies
from gpt2_jax.run.hardware import PEAK_FLOPS, measured_matmul_rate

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as the compiler counts them: on tpu7x a core, two of which make a chip.

    Attributes:
      name: as in a topology, "v5e", or as the maker has it, "h100".
      platform: tpu, gpu or cpu; with the next two what `choose_attention` asks of a device.
      device_kind: as JAX names it.
      compute_capability: of a GPU.
      peak_flops: dense bfloat16 matrix products, FLOP/s (of the processor here: float32, as measured).
      memory: bytes.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s out of the device over one link of a torus (ICI), or to a switch (NVLink).
      network_bandwidth: bytes/s out of the device beyond its slice or switch (DCN).
      switched: devices that one switch joins; 0: a torus.
      tile: rows and columns of the matrix unit: products with a shorter inner dimension leave part of it idle.
      per_chip: devices of one chip, which is what is paid for.
    """

    name: str
    platform: str
    device_kind: str
    compute_capability: str
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float = 0.0
    network_bandwidth: float = 0.0
    switched: int = 0
    tile: int = 128
    per_chip: int = 1


# TPUs: the pages "TPU v4", "v5e", "v5p", "v6e", "TPU7x" of docs.cloud.google.com/tpu/docs (read in 2025). They give
# the ICI of a chip in both directions, over 4 links (v5e, v6e) or 6; the DCN is that of a host or pod over its chips.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200, B200 (180 GB as DGX has it) and L4; the network is one
# port of 400 Gbit/s per GPU (A100: 200, L4: 100). v4, the GPUs, and the bandwidths of tpu7x were entered without these
# pages at hand: check them before you rely on them.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", "tpu", "TPU v4", "", PEAK_FLOPS["TPU v4"], 32 * GIB, 1228e9),
            link_bandwidth=50e9,
            network_bandwidth=6.25e9,
        ),
        Chip(
            *("v5e", "tpu", "TPU v5 lite", "", PEAK_FLOPS["TPU v5e"], 16 * GIB, 819e9),
            link_bandwidth=50e9,
            network_bandwidth=3.125e9,
        ),
        Chip(
            *("v5p", "tpu", "TPU v5", "", PEAK_FLOPS["TPU v5p"], 96 * GIB, 2765e9),
            link_bandwidth=100e9,
            network_bandwidth=6.25e9,
        ),
        Chip(
            *("v6e", "tpu", "TPU v6 lite", "", PEAK_FLOPS["TPU v6e"], 32 * GIB, 1638e9),
            link_bandwidth=100e9,
            network_bandwidth=12.5e9,
            tile=256,
        ),
        Chip(
            *("tpu7x", "tpu", "TPU7x", "", PEAK_FLOPS["TPU7x"], 96 * GIB, 7380e9 / 2),
            link_bandwidth=100e9 / 2,
            network_bandwidth=12.5e9 / 2,
            tile=256,
            per_chip=2,
        ),
        Chip("a100", "gpu", "NVIDIA A100", "8.0", PEAK_FLOPS["NVIDIA A100"], 80e9, 2039e9, 300e9, 25e9, 8, 16),
        Chip("h100", "gpu", "NVIDIA H100", "9.0", PEAK_FLOPS["NVIDIA H100"], 80e9, 3350e9, 450e9, 50e9, 8, 16),
        Chip("h200", "gpu", "NVIDIA H200", "9.0", PEAK_FLOPS["NVIDIA H200"], 141e9, 4800e9, 450e9, 50e9, 8, 16),
        Chip("b200", "gpu", "NVIDIA B200", "10.0", PEAK_FLOPS["NVIDIA B200"], 180e9, 8000e9, 900e9, 50e9, 8, 16),
        Chip("l4", "gpu", "NVIDIA L4", "8.9", PEAK_FLOPS["NVIDIA L4"], 24e9, 300e9, 32e9, 12.5e9, 8, 16),
    )
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips that are joined: TPU slices, GPUs, or the processor that is here.

    Attributes:
      name: as it was typed: "v5e:4x4", "h100:8", "cpu".
      chip: of which there are many.
      shape: chips along each dimension of a slice's torus; of GPUs their number.
      slices: how many slices a data centre network joins.
      devices: in all, as JAX counts them.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: int

    @property
    def chips(self) -> int:
        """What is paid for."""
        return self.devices // self.chip.per_chip

    def bandwidth(self, group: int, slices: int = 1) -> float:
        """Bytes/s that a device sends in a collective among `group` devices which are in `slices` slices.

        In a torus a group is taken to lie along as few dimensions as hold it, and to use the links of these: both
        directions where a dimension is closed to a ring, else one. Beyond a slice, or a switch, each device of the
        group's part there carries its share.
        """
        within = group // slices
        if self.chip.switched and group > self.chip.switched:
            return min(self.chip.link_bandwidth, self.chip.network_bandwidth * self.chip.switched)
        inner = self.chip.link_bandwidth * self._links(within) if within > 1 else math.inf
        return inner if slices == 1 else min(inner, self.chip.network_bandwidth * within)

    def _links(self, group: int) -> int:
        if self.chip.switched:
            return 1
        links, held = 0, self.chip.per_chip
        for size in sorted(self.shape, reverse=True):
            if held >= group:
                break
            held *= size
            links += 2 if self._is_ring(size) else 1
        return max(links, 1)

    def _is_ring(self, size: int) -> bool:
        # Two dimensions close only where they span the pod; three are joined optically in cubes of 4.
        return size == 16 if len(self.shape) == 2 else size % 4 == 0


def make_machine(name: str) -> Machine:
    """A machine by its name: "v5e:4x4", "v5e:4x4*2" for two slices, "h100:8", or "cpu", which is this one.

    Raises:
      UsageError: the chip is not in the table, or the rest is no size.
    """
    if name == "cpu":
        return Machine(name, this_cpu(), (1,), 1, 1)
    kind, _, size = name.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"--topology={name}: unknown chip {kind!r}; known: {', '.join(CHIPS)}, cpu{hint}")
    chip = CHIPS[kind]
    if chip.platform == "tpu":
        (topology,) = parse_topologies(name)
        return Machine(name, chip, topology.dims, topology.slices, topology.num_devices)
    if not re.fullmatch("[1-9][0-9]{0,5}", size):
        raise UsageError(f"--topology={name}: {size!r} is no number of chips; write for instance {kind}:8")
    return Machine(name, chip, (int(size),), 1, int(size))


def this_cpu() -> Chip:
    """The processor of this machine: its rates are measured, in half a second."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Chip("cpu", "cpu", "cpu", "", measured_matmul_rate(), memory, _measured_copy_rate(), tile=1)


def _measured_copy_rate(size: int = 2**26) -> float:
    """Bytes/s read and written by a copy."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    fastest = math.inf
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size / fastest
