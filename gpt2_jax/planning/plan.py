"""One plan: a config on a machine, with what was compiled or estimated, and what follows from it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from gpt2_jax.config import RunConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.planning.chips import Machine
from gpt2_jax.planning.compile import Compiled
from gpt2_jax.planning.flops import flops_table, step_products
from gpt2_jax.planning.memory import Memory, estimated_temporaries, state_bytes
from gpt2_jax.planning.roofline import Roofline, make_roofline
from gpt2_jax.planning.traffic import Traffic, expected_traffic, memory_traffic
from gpt2_jax.run.fit_memory import memory_choices
from gpt2_jax.run.hardware import flops_per_token
from gpt2_jax.run.step_settings import for_device, make_settings
from gpt2_jax.sharding import abstract_mesh, check_divisible, mesh_sizes

GPT2_VOCABULARY = 50257


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would need and take.

    Attributes:
      config: with the vocabulary and the path of attention filled in.
      machine: what it would run on.
      mesh: devices along each axis.
      loss_chunk: as the run would choose it.
      memory: of one device.
      flops: of one step and all devices, by pass and part.
      model_flops: of one step, without recomputation and padding, as MFU counts them.
      traffic: collectives of one step.
      roofline: seconds of a step.
      compiled: what the compiler said; None: all figures are estimates.
      price: dollars per chip-hour, or None.
      decode: what the compiler said of the decode step, if it was asked.
    """

    config: RunConfig
    machine: Machine
    mesh: Mapping[str, int]
    loss_chunk: int
    memory: Memory
    flops: Mapping[str, Mapping[str, float]]
    model_flops: float
    traffic: list[Traffic]
    roofline: Roofline
    compiled: Compiled | None
    price: float | None
    decode: Compiled | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, as the compiler finds or by the estimate."""
        return self.memory.fits and not (self.compiled and self.compiled.out_of_memory)

    @property
    def tokens_per_step(self) -> int:
        """Of all devices."""
        return self.config.train.batch_size * self.config.context_length

    @property
    def tokens_per_second(self) -> float:
        """By the roofline."""
        return self.tokens_per_step / self.roofline.step

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation that the roofline leads one to expect."""
        return self.model_flops / (self.roofline.step * self.machine.devices * self.machine.chip.peak_flops)

    @property
    def hours(self) -> float:
        """For all `train.steps`."""
        return self.config.train.steps * self.roofline.step / 3600

    @property
    def dollars(self) -> float | None:
        """For all `train.steps`, at the list price."""
        return None if self.price is None else self.hours * self.machine.chips * self.price


def with_known_vocabulary(config: RunConfig) -> RunConfig:
    """The config with `model.vocab_size` filled in without looking at data. Raises UsageError where that cannot be."""
    if config.model.vocab_size:
        return config
    if config.tokenizer.name != "gpt2":
        raise UsageError(
            f"tokenizer.name={config.tokenizer.name}: how many ids it has is only known with its data, which a plan "
            "does not read; give --config.model.vocab_size=NUMBER"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=GPT2_VOCABULARY))


def checked_mesh(config: RunConfig, machine: Machine) -> Any:
    """The mesh, without devices, that the config asks for on so many devices.

    Raises:
      UsageError: their number does not fit, or batch or model cannot be split so.
    """
    if config.mesh.dcn_data != machine.slices and machine.slices > 1:
        raise UsageError(
            f"mesh.dcn_data={config.mesh.dcn_data}, but {machine.name} has {machine.slices} slices; give that number"
        )
    mesh: Any = abstract_mesh(mesh_sizes(config.mesh, machine.devices))
    check_divisible(config, mesh, padded_vocab_size(config.model.vocab_size))
    return mesh


def make_plan(config: RunConfig, machine: Machine, price: float | None, compiled: Compiled | None = None) -> Plan:
    """Puts a plan together; without `compiled` it is an estimate. `model.remat` is no longer "auto".

    Raises:
      UsageError: as `checked_mesh` does, or the configured attention cannot run on such chips.
    """
    chip: Any = machine.chip  # which answers what is asked of a device
    config, _ = for_device(config, chip)
    mesh = checked_mesh(config, machine)
    sizes = dict(mesh.shape)
    chunk = make_settings(config, mesh).loss_chunk % config.context_length
    state = state_bytes(config, sizes)
    limit = round(machine.chip.memory)
    if compiled is None:
        temporaries = estimated_temporaries(config, sizes, chunk)
        memory = Memory(
            **state, temporaries=temporaries, peak=sum(state.values()) + temporaries, limit=limit, source="estimate"
        )
    else:
        memory = Memory(
            **state,
            temporaries=compiled.temporaries or max(0, compiled.peak - sum(state.values())),
            peak=compiled.peak,
            limit=compiled.limit or limit,
            source="compiler",
        )
    products = step_products(config, sizes, chunk)
    traffic = compiled.traffic if compiled is not None and compiled.traffic else expected_traffic(config, sizes)
    context, model = config.context_length, dataclasses.replace(config.model, remat="none")
    return Plan(
        config=config,
        machine=machine,
        mesh=sizes,
        loss_chunk=chunk,
        memory=memory,
        flops=flops_table(products, machine.devices),
        model_flops=_flops_per_token(model, context) * config.train.batch_size * context,
        traffic=traffic,
        roofline=make_roofline(machine, products, memory_traffic(config, sizes, chunk), traffic),
        compiled=compiled,
        price=price,
    )


def plan_choices(config: RunConfig, machine: Machine, price: float | None) -> list[Plan]:
    """Estimates of what a run may choose from to fit the memory, the fastest first. Raises as `make_plan` does."""
    # A CPU does not say what it has; a run then chooses without asking.
    asks = machine.chip.platform != "cpu"
    choices = memory_choices(config, checked_mesh(config, machine), may_be_whole=asks)
    return [make_plan(choice, machine, price) for choice in (choices if asks else choices[:1])]


_flops_per_token = functools.lru_cache(maxsize=8)(flops_per_token)
