"""Bytes of a training step on one device: the state exactly, from shapes; temporaries as a first estimate.

What the compiler says of temporaries and the peak, where it was asked, stands in place of the estimate.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gpt2_jax.config import ModelConfig, OptimizerConfig, RunConfig
from gpt2_jax.model.gpt2 import GPT2, padded_vocab_size
from gpt2_jax.planning.flops import is_fused
from gpt2_jax.sharding import MESH_AXES, abstract_mesh
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import abstract_state


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters: float32.
      optimizer: Adam's moments, and the moving average where one is kept.
      batch: tokens, targets and weights of a step.
      temporaries: activations, gradients and gathered weights.
      peak: the most that is in use at a time; temporaries share places, so that it may be less than the sum.
      limit: what the device has for a program.
      source: "compiler" (its `memory_analysis`: temp_size, peak_memory) or "estimate".
    """

    parameters: int
    optimizer: int
    batch: int
    temporaries: int
    peak: int
    limit: int
    source: str

    @property
    def fits(self) -> bool:
        """By these figures; the compiler may still refuse."""
        return self.peak <= self.limit


def state_bytes(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """`parameters`, `optimizer` and `batch` of one device, from the shapes and shardings of the real state."""
    model = dataclasses.replace(config.model, remat="none")  # which decides nothing here, and the shapes are kept
    rows = config.train.batch_size // (sizes["data"] * sizes["fsdp"])
    local = {"parameters": 0, "optimizer": 0, "batch": 3 * 4 * rows * config.context_length}
    for part, size, axes in _leaves(model, config.optimizer, config.train.steps):
        local[part] += size // math.prod(sizes[axis] for axis in axes)
    return local


@functools.lru_cache(maxsize=8)
def _leaves(model: ModelConfig, optimizer: OptimizerConfig, steps: int) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
    """Of each array of the state: the part it belongs to, its bytes, and the mesh axes that split it."""
    mesh: Any = abstract_mesh(dict.fromkeys(MESH_AXES, 1))
    state = abstract_state(GPT2(model), make_optimizer(optimizer, steps), mesh, ema=optimizer.ema_decay > 0)
    parts = {"parameters": state.params, "optimizer": state.replace(params=None)}
    return tuple(
        (part, math.prod(leaf.shape) * leaf.dtype.itemsize, _axes(leaf.sharding.spec))
        for part, tree in parts.items()
        for leaf in jax.tree.leaves(tree)
    )


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry))


def estimated_temporaries(config: RunConfig, sizes: Mapping[str, int], loss_chunk: int) -> int:
    """Activations, gradients and gathered weights at the moment when most of them exist, to about a third.

    Kept for the backward pass are, per layer and token, the input (remat=full), and the outputs of the projections
    (dots), and what attention and the norms need (none); besides one layer at work, the gradients, the weights of two
    layers and the token table gathered, and the logits with their gradient.
    """
    model, tensor = config.model, sizes["tensor"]
    D, T, L = model.n_embd, config.context_length, model.n_layer
    shards = sizes["data"] * sizes["fsdp"]
    tokens = config.train.batch_size // config.train.microbatches // shards * T
    heads = -(-model.n_head // tensor)
    width = jnp.dtype(model.dtype).itemsize
    stream = D * width / tensor  # the residual stream is split along the context
    projections = (3 * D + D + 4 * D) * width / tensor + stream
    scores = 0 if is_fused(model) else heads * T * (4 + (width if width < 4 else 0))
    kept = {
        "full": stream,
        "dots": stream + projections,
        # and what goes into the projections: of both norms, of attention, of GELU
        "none": stream + projections + scores + (2 * D + D + 4 * D) * width / tensor,
    }[model.remat]
    at_work = 3 * scores + 2 * projections + 4 * 4 * D / tensor
    vocab_rows = padded_vocab_size(model.vocab_size) // tensor
    logits = (loss_chunk or T) * (tokens // T) * vocab_rows * width * 2
    layer_parameters = 12 * D * D
    parameters = L * layer_parameters / tensor + vocab_rows * D
    gradients = 4 * parameters / sizes["fsdp"] * (1 if config.train.microbatches == 1 else 2)
    gathered = 2 * 2 * layer_parameters / tensor * width + (2 * vocab_rows * D * 4 if sizes["fsdp"] > 1 else 0)
    return round(tokens * L * kept + max(tokens * at_work, logits) + gradients + gathered)
