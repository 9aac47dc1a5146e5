"""The keys and values of the tokens that a model has read, so that the next token costs one position, not all.

All rows take their slots together: a prompt of fewer tokens leaves slots of its row empty, and `valid_BS` says which.
A row's position is therefore not its slot; `length_B` counts it.

Keys and values are stored as `[B, H, S, K]`, and as `[H, S, K]` where there is one row: XLA on CPU would copy them to
leave out an axis of length 1. A head's slots lie together; read otherwise, attention is ten times slower there.

Shapes: B rows, T new tokens, S slots, L layers, H heads, K head dimension.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.heads import padded_heads
from gpt2_jax.sharding import constrain

_AXES = ("batch", "heads", "length", "head_dim")


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer, with what its attention needs to know of the new tokens.

    Attributes:
      keys: as they are stored.
      values: likewise.
      slot: where the new tokens go, int32.
      visible_BTS: which slots each new token attends to.
    """

    keys: jax.Array
    values: jax.Array
    slot: jax.Array
    visible_BTS: jax.Array

    @property
    def k_BSHK(self) -> jax.Array:
        """The keys."""
        return _with_rows(self.keys).swapaxes(1, 2)

    @property
    def v_BSHK(self) -> jax.Array:
        """The values."""
        return _with_rows(self.values).swapaxes(1, 2)

    def append(self, k_BTHK: jax.Array, v_BTHK: jax.Array) -> "LayerCache":
        """With the keys and values of the new tokens in their slots."""
        return self.replace(keys=self._write(self.keys, k_BTHK), values=self._write(self.values, v_BTHK))

    def _write(self, stored: jax.Array, new_BTHK: jax.Array) -> jax.Array:
        new = _stored(new_BTHK.swapaxes(1, 2).astype(stored.dtype))
        written = jax.lax.dynamic_update_slice_in_dim(stored, new, self.slot, axis=stored.ndim - 2)
        return constrain(written, *_AXES[-stored.ndim :])


class KVCache(flax.struct.PyTreeNode):
    """The cache of all layers.

    Attributes:
      keys_L: one array per layer.
      values_L: likewise.
      valid_BS: whether a slot holds a token of the row.
      used: slots taken, int32; the next token goes there.
      length_B: tokens that each row holds, int32: the position of its next one.
    """

    keys_L: tuple[jax.Array, ...]
    values_L: tuple[jax.Array, ...]
    valid_BS: jax.Array
    used: jax.Array
    length_B: jax.Array

    @property
    def slots(self) -> int:
        """S: how many tokens a row can hold."""
        return self.valid_BS.shape[1]


def empty_cache(config: ModelConfig, rows: int, slots: int) -> KVCache:
    """A cache that holds nothing, in the type of `config.dtype`."""
    shape = (rows, padded_heads(config.n_head), slots, config.n_embd // config.n_head)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(_stored(jnp.zeros(shape, jnp.dtype(config.dtype))) for _ in range(config.n_layer))

    return KVCache(
        keys_L=layers(),
        values_L=layers(),
        valid_BS=jnp.zeros((rows, slots), bool),
        used=jnp.int32(0),
        length_B=jnp.zeros(rows, jnp.int32),
    )


def expand(cache: KVCache, slots: int, copies: int) -> KVCache:
    """With empty slots after the others, `slots` in all, and `copies` rows in place of each, one after another."""
    more = slots - cache.slots

    def expanded(stored: jax.Array) -> jax.Array:
        padded_BHSK = jnp.pad(_with_rows(stored), ((0, 0), (0, 0), (0, more), (0, 0)))
        return _stored(repeat_rows(padded_BHSK, copies))

    return cache.replace(
        keys_L=tuple(map(expanded, cache.keys_L)),
        values_L=tuple(map(expanded, cache.values_L)),
        valid_BS=repeat_rows(jnp.pad(cache.valid_BS, ((0, 0), (0, more))), copies),
        length_B=repeat_rows(cache.length_B, copies),
    )


def repeat_rows(x: jax.Array, copies: int) -> jax.Array:
    """`copies` of each row, one after another."""
    return x if copies == 1 else jnp.repeat(x, copies, axis=0)


def _stored(x_BHSK: jax.Array) -> jax.Array:
    return x_BHSK[0] if len(x_BHSK) == 1 else x_BHSK


def _with_rows(stored: jax.Array) -> jax.Array:
    return stored.reshape(-1, *stored.shape[-3:])
