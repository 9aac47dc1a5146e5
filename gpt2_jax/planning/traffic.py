"""What a training step moves, by arithmetic on the config: between chips, and between a chip and its memory.

Theory of the collectives: gradients are reduced over `data` once a step; over `fsdp` the weights of a layer are
gathered once per pass (a recomputation goes with the backward pass) and their gradients scattered once, for each
microbatch; over `tensor` the activations of a layer are gathered and scattered four times each (Narayanan et al. 2021,
Korthikanti et al. 2022), recomputation repeating the forward ones.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from gpt2_jax.config import RunConfig
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.planning.flops import is_fused


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same axes of the mesh, in one step.

    Attributes:
      kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
      axes: of the mesh, joined by "+".
      group: devices that take part together.
      count: how many run in a step, those in loops each time.
      payload: bytes of the whole arrays (of one device's part for all-to-all and permute).
      wire: bytes that each device sends.
      overlapped: share of the wire's bytes that moves beside computation; None: not known.
    """

    kind: str
    axes: str
    group: int
    count: int
    payload: float
    wire: float
    overlapped: float | None = None


def expected_traffic(config: RunConfig, sizes: Mapping[str, int]) -> list[Traffic]:
    """The collectives that theory asks for; `sizes` are the devices along each axis of the mesh."""
    model, microbatches = config.model, config.train.microbatches
    D, T, L = model.n_embd, config.context_length, model.n_layer
    data, fsdp, tensor = sizes["data"], sizes["fsdp"], sizes["tensor"]
    width = jnp.dtype(model.dtype).itemsize
    layer = 12 * D * D * width / tensor  # the kernels of a layer, as they are gathered
    table = padded_vocab_size(model.vocab_size) // tensor * D * 4
    traffic = []
    if fsdp > 1:
        payload = microbatches * (2 * L * layer + table)
        traffic.append(_ring("all-gather", "fsdp", fsdp, microbatches * (2 * L * 4 + 1), payload))
        payload = microbatches * (L * layer + table)
        traffic.append(_ring("reduce-scatter", "fsdp", fsdp, microbatches * (L * 4 + 1), payload))
    if data > 1:
        payload = (L * layer * 4 / width + table) / fsdp
        traffic.append(_ring("all-reduce", "data", data, 4 * L + 1, payload, rounds=2))
    if tensor > 1:
        tokens = config.train.batch_size // microbatches // (data * fsdp) * T
        passes = 3 if model.remat == "full" else 2
        count = microbatches * L * 2 * passes
        for kind in ("all-gather", "reduce-scatter"):
            traffic.append(_ring(kind, "tensor", tensor, count, count * tokens * D * width))
    return traffic


@dataclasses.dataclass(frozen=True)
class MemoryTraffic:
    """Bytes that one device reads and writes in a step.

    Attributes:
      beside: by matrix products, while they compute: inputs, outputs and weights.
      alone: by what has next to no arithmetic: norms, residual sums, softmax, loss, optimizer.
    """

    beside: float
    alone: float


def memory_traffic(config: RunConfig, sizes: Mapping[str, int], loss_chunk: int) -> MemoryTraffic:
    """First-order counts, GELU, bias and dropout being fused into the products beside them.

    Per layer and token a forward pass moves, in widths of the stream: by the products 4 (c_attn), 4 (attention), 2
    (c_proj), 5 (c_fc) and 5 (c_proj); by the norms 2 each and by the residual sums 3 each. Without a kernel the scores
    are written and read twice as float32 besides, and their softmax once in 16 bits each. The backward pass moves twice
    all that. The head's logits are written once, and read twice by the loss. Weights are read once per pass and
    microbatch, and their gradients written and added; AdamW reads 16 and writes 12 bytes per parameter, 4 fewer with
    its first moment in 16 bits.
    """
    model, microbatches, tensor = config.model, config.train.microbatches, sizes["tensor"]
    D, T, L = model.n_embd, config.context_length, model.n_layer
    width = jnp.dtype(model.dtype).itemsize
    tokens = config.train.batch_size // (sizes["data"] * sizes["fsdp"]) * T
    heads = -(-model.n_head // tensor)
    passes = {"none": 3.0, "dots": 3.5, "full": 4.0}[model.remat]
    scores = 0 if is_fused(model) else heads * T * (3 * 4 + 2 * width)
    vocab_rows = padded_vocab_size(model.vocab_size) // tensor
    head_passes = 3 if loss_chunk in (0, T) else 4
    parameters = 12 * D * D * L / tensor + vocab_rows * D
    stream = L * passes * D * width / tensor
    moment = 2 * (4 - jnp.dtype(config.optimizer.mu_dtype).itemsize)
    optimizer = (28 - moment + (8 if config.optimizer.ema_decay else 0)) * parameters / sizes["fsdp"]
    weights = microbatches * parameters * (passes * width + 2 * 4)
    return MemoryTraffic(
        beside=tokens * (20 * stream + head_passes * width * vocab_rows) + weights,
        alone=tokens * (10 * stream + L * passes * scores + head_passes * 2 * width * vocab_rows) + optimizer,
    )


def _ring(kind: str, axis: str, group: int, count: int, payload: float, rounds: int = 1) -> Traffic:
    return Traffic(kind, axis, group, count, payload, rounds * payload * (group - 1) / group)
