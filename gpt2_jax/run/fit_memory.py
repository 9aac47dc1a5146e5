"""What a step recomputes, and whether all its logits exist at once, by what the compiler says of its memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.config import RunConfig
from gpt2_jax.run.step_settings import make_settings
from gpt2_jax.sharding import batch_sharding, use_mesh
from gpt2_jax.training.steps import train_step
from gpt2_jax.training.train_state import abstract_state

# Of the memory that JAX may take; batches to come, samples and the compiler's own scratch need some.
_SHARE = 0.92
REMAT = ("none", "dots", "full")


def lower_train_step(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The train step of a config, whose vocabulary is filled in, lowered from shapes alone."""
    settings = make_settings(config, mesh)
    state = abstract_state(settings.model, settings.optimizer, mesh, ema=settings.ema_decay > 0)
    replicated = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(
        lambda leaf: leaf if leaf.shape else jax.ShapeDtypeStruct((), leaf.dtype, sharding=replicated), state
    )
    shape = (config.train.batch_size, config.context_length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in (("tokens", jnp.int32), ("targets", jnp.int32), ("weights", jnp.float32))
    }
    with use_mesh(mesh):
        return train_step.lower(state, batch, settings=settings)


def memory_limit(device: jax.Device) -> int:
    """Bytes that a program may have on the device, where it says so, else 0."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return round(_SHARE * stats["bytes_limit"]) if stats and "bytes_limit" in stats else 0


def with_memory_fitted(
    config: RunConfig, mesh: Mesh, limit: int, largest: Callable[[float], float] = lambda peak: peak
) -> tuple[RunConfig, str]:
    """The config with "auto" for `model.remat`, and 0 for `train.loss_chunk`, replaced by the fastest that fits.

    Chunks of the loss cost less time than recomputing, and neither is the fastest. The last resort is taken unseen.

    Args:
      config: with the vocabulary and the path of attention filled in.
      mesh: devices, which may be those of a topology.
      limit: bytes on each; 0: unknown: nothing is recomputed, and `choose_chunk` decides alone.
      largest: of what the processes of a run found, so that all choose the same.

    Returns:
      The config, and what was chosen, for the log.
    """
    choices = memory_choices(config, mesh, may_be_whole=limit > 0)
    *first, last = choices if limit else choices[:1]
    chosen = next((choice for choice in first if largest(_peak(choice, mesh)) <= limit), last)
    chunk = make_settings(chosen, mesh).loss_chunk
    logits = f"in chunks of {chunk} positions" if chunk not in (0, config.context_length) else "whole"
    return chosen, f"remat {chosen.model.remat}, logits {logits}"


def memory_choices(config: RunConfig, mesh: Mesh, *, may_be_whole: bool) -> list[RunConfig]:
    """What a run may choose from to fit the memory, the fastest first and the smallest last.

    Args:
      config: with the vocabulary filled in; what it configures by name is no choice.
      mesh: of which only the shape counts.
      may_be_whole: all logits at once are a choice, also where `choose_chunk` takes chunks.
    """
    remats = REMAT if config.model.remat == "auto" else (config.model.remat,)
    models = [dataclasses.replace(config.model, remat=remat) for remat in remats]
    choices = [dataclasses.replace(config, model=model) for model in models]
    undecided = not config.train.loss_chunk and not config.train.context_lengths
    if may_be_whole and undecided and make_settings(choices[0], mesh).loss_chunk:
        whole = dataclasses.replace(config.train, loss_chunk=config.context_length)
        choices.insert(0, dataclasses.replace(choices[0], train=whole))
    return choices


def _peak(config: RunConfig, mesh: Mesh) -> float:
    try:
        analysis: Any = lower_train_step(config, mesh).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return float("inf")
    # The new state lies where the old one was.
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
