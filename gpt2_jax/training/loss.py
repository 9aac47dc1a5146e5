"""Next-token cross-entropy as a sum and a weight, so that parts add up exactly.

Shapes: B batch, S devices that share it, T length, C positions of a chunk, D width, V' padded vocabulary.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gpt2_jax.model.gpt2 import logits_from_hidden
from gpt2_jax.model.layers import as_rows
from gpt2_jax.sharding import axis_size, constrain, relayout

# Logits of one device that are allowed to exist at a time before the loss goes through them in chunks.
DENSE_LOGITS_BYTES = 512 * 2**20


def cross_entropy_sums(
    x_BTD: jax.Array,
    wte_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Sum over positions of weight * -log p(target), in nats, and the sum of the weights.

    Args:
      x_BTD: final hidden states.
      wte_VD: token table with its padding rows, which take no part in the softmax.
      targets_BT: ids below vocab_size.
      weights_BT: 0 leaves a position out.
      vocab_size: rows of the table that are tokens.
      chunk: positions of a row whose logits exist at a time (a divisor of T); 0: all. Smaller chunks need less memory
        and compute the logits once more in the backward pass; the value is the same.
    """
    B, T = targets_BT.shape
    if chunk in (0, T):
        return _sums(x_BTD, wte_VD, targets_BT, weights_BT, vocab_size)

    # Each device that has rows of its own has a table of its own too, whose gradients it adds up over the chunks: they
    # are summed over devices once, after the last one, by each device its part of the width.
    S = axis_size("batch")
    wte_SVD = jnp.broadcast_to(wte_VD, (S, *wte_VD.shape))
    wte_SVD = relayout(wte_SVD, ("batch", "vocab", None), ("replicas", "vocab", "embed"))
    wte_SVD = constrain(wte_SVD, "batch", "vocab", None)  # and its gradient, until the last chunk

    @jax.checkpoint
    def add_chunk(sums: tuple[jax.Array, jax.Array], chunk_SBC: tuple[jax.Array, ...]) -> tuple:
        x_SBCD, targets_SBC, weights_SBC = chunk_SBC
        loss_S, weight_S = jax.vmap(functools.partial(_sums, vocab_size=vocab_size))(
            x_SBCD, wte_SVD, targets_SBC, weights_SBC
        )
        return (sums[0] + loss_S.sum(), sums[1] + weight_S.sum()), None

    # Split along the length, not the batch: the batch stays spread over the devices.
    chunks = tuple(
        jnp.moveaxis(array.reshape(S, B // S, T // chunk, chunk, *array.shape[2:]), 2, 0)
        for array in (x_BTD, targets_BT, weights_BT)
    )
    exact = jnp.promote_types(x_BTD.dtype, jnp.float32)
    sums, _ = jax.lax.scan(add_chunk, (jnp.zeros((), exact), jnp.zeros((), weights_BT.dtype)), chunks)
    return sums


def choose_chunk(tokens: int, lengths: Sequence[int], vocab_rows: int, itemsize: int = 4) -> int:
    """The `chunk` with which one device's logits stay below DENSE_LOGITS_BYTES: 0 if all of them do.

    Args:
      tokens: positions on the device per (micro)batch.
      lengths: context lengths that a row may have; the chunk divides each.
      vocab_rows: rows of the token table on the device.
      itemsize: bytes per logit.
    """
    if tokens * vocab_rows * itemsize <= DENSE_LOGITS_BYTES:
        return 0
    most_rows = -(-tokens // min(lengths))
    fitting = DENSE_LOGITS_BYTES // (most_rows * vocab_rows * itemsize)
    common = math.gcd(*lengths)
    return max(chunk for chunk in range(1, common + 1) if common % chunk == 0 and chunk <= max(1, fitting))


def _sums(
    x_BTD: jax.Array, wte_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    # Tokens in one row [N], but [B, T] where tensor parallelism splits the context.
    x = as_rows(x_BTD)
    targets, weights = targets_BT.reshape(x.shape[:-1]), weights_BT.reshape(x.shape[:-1])
    logits = logits_from_hidden(x, wte_VD, vocab_size)
    # The target's logit by comparison, not by a gather: it splits over the vocabulary and needs no scatter backwards.
    ids = jnp.expand_dims(jnp.arange(logits.shape[-1]), range(targets.ndim))
    target = jnp.where(ids == targets[..., None], logits, 0).sum(axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - target
    return (loss * weights).sum(), weights.sum()
