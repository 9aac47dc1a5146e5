"""Next-token cross-entropy as a sum and a weight, so that parts add up exactly.

Shapes: S shares of the batch, B rows (of a share, after S), T length, C positions of a chunk, D width,
V' padded vocabulary.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gpt2_jax.model.gpt2 import logits_from_hidden
from gpt2_jax.model.layers import as_rows

# Logits of one device that are allowed to exist at a time before the loss goes through them in chunks.
DENSE_LOGITS_BYTES = 512 * 2**20


def cross_entropy_sums(
    x_BTD: jax.Array,
    wte_SVD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int = 0,
    rounded: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Sum over positions of weight * -log p(target), in nats, and the sum of the weights.

    Args:
      x_BTD: final hidden states.
      wte_SVD: token table with its padding rows, which take no part in the softmax, one for each share of the batch
        (`model/token_table.py`).
      targets_BT: ids below vocab_size.
      weights_BT: 0 leaves a position out.
      vocab_size: rows of the table that are tokens.
      chunk: positions of a row whose logits exist at a time (a divisor of T); 0: all. Smaller chunks need less memory
        and compute the logits once more in the backward pass; the value is the same.
      rounded: see `logits_from_hidden`.
    """
    S, T = len(wte_SVD), targets_BT.shape[1]
    shares = tuple(array.reshape(S, -1, *array.shape[1:]) for array in (x_BTD, targets_BT, weights_BT))
    if chunk in (0, T):
        return _sums(wte_SVD, shares, vocab_size, rounded)

    @jax.checkpoint
    def add_chunk(sums: tuple[jax.Array, jax.Array], chunk_SBC: tuple[jax.Array, ...]) -> tuple:
        loss, weight = _sums(wte_SVD, chunk_SBC, vocab_size, rounded)
        return (sums[0] + loss, sums[1] + weight), None

    # Split along the length, not the batch: the batch stays spread over the devices.
    chunks = tuple(
        jnp.moveaxis(array.reshape(*array.shape[:2], T // chunk, chunk, *array.shape[3:]), 2, 0) for array in shares
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
    wte_SVD: jax.Array, shares: tuple[jax.Array, ...], vocab_size: int, rounded: bool
) -> tuple[jax.Array, jax.Array]:
    """Loss and weight of hidden states, targets and weights, each with S as its first axis."""

    def of_share(wte_VD: jax.Array, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple:
        # Tokens in one row [N], but [B, T] where tensor parallelism splits the context.
        x = as_rows(x_BTD)
        targets, weights = targets_BT.reshape(x.shape[:-1]), weights_BT.reshape(x.shape[:-1])
        logits = logits_from_hidden(x, wte_VD, vocab_size, rounded=rounded)
        # Of all that is as large as the logits, only they are kept for the backward pass.
        loss = jax.checkpoint(_negative_log_likelihood, prevent_cse=False)(logits, targets)
        return (loss * weights).sum(), weights.sum()

    loss_S, weight_S = jax.vmap(of_share)(wte_SVD, *shares)
    return loss_S.sum(), weight_S.sum()


def _negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # The target's logit by comparison, not a gather: it splits over the vocabulary and needs no scatter backwards.
    ids = jnp.expand_dims(jnp.arange(logits.shape[-1]), range(targets.ndim))
    target = jnp.where(ids == targets[..., None], logits, 0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target
