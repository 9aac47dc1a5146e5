"""The keys and values of the tokens that a model has read, so that the next token costs one position, not all.

All rows take their slots together: a prompt of fewer tokens leaves slots of its row empty, and `valid_BS` says which.
A row's position is therefore not its slot; `length_B` counts it.

Shapes: B rows, T new tokens, S slots, L layers, H heads, K head dimension.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gpt2_jax.config import ModelConfig
from gpt2_jax.sharding import constrain


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer, with what its attention needs to know of the new tokens.

    Attributes:
      k_BHSK: keys. A head's slots lie together: read otherwise, attention is ten times slower on CPU.
      v_BHSK: values, likewise.
      slot: where the new tokens go, int32.
      visible_BTS: which slots each new token attends to.
    """

    k_BHSK: jax.Array
    v_BHSK: jax.Array
    slot: jax.Array
    visible_BTS: jax.Array

    def append(self, k_BTHK: jax.Array, v_BTHK: jax.Array) -> "LayerCache":
        """With the keys and values of the new tokens in their slots."""
        return self.replace(k_BHSK=self._write(self.k_BHSK, k_BTHK), v_BHSK=self._write(self.v_BHSK, v_BTHK))

    def _write(self, old_BHSK: jax.Array, new_BTHK: jax.Array) -> jax.Array:
        new_BHTK = new_BTHK.swapaxes(1, 2).astype(old_BHSK.dtype)
        written_BHSK = jax.lax.dynamic_update_slice_in_dim(old_BHSK, new_BHTK, self.slot, axis=2)
        return constrain(written_BHSK, "batch", "heads", "length", "head_dim")


class KVCache(flax.struct.PyTreeNode):
    """The cache of all layers.

    Attributes:
      k_LBHSK: keys, one array `[B, H, S, K]` per layer.
      v_LBHSK: values, likewise.
      valid_BS: whether a slot holds a token of the row.
      used: slots taken, int32; the next token goes there.
      length_B: tokens that each row holds, int32: the position of its next one.
    """

    k_LBHSK: tuple[jax.Array, ...]
    v_LBHSK: tuple[jax.Array, ...]
    valid_BS: jax.Array
    used: jax.Array
    length_B: jax.Array

    @property
    def slots(self) -> int:
        """S: how many tokens a row can hold."""
        return self.valid_BS.shape[1]


def empty_cache(config: ModelConfig, rows: int, slots: int) -> KVCache:
    """A cache that holds nothing, in the type of `config.dtype`."""
    shape = (rows, config.n_head, slots, config.n_embd // config.n_head)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in range(config.n_layer))

    return KVCache(
        k_LBHSK=layers(),
        v_LBHSK=layers(),
        valid_BS=jnp.zeros((rows, slots), bool),
        used=jnp.int32(0),
        length_B=jnp.zeros(rows, jnp.int32),
    )


def widen(cache: KVCache, slots: int) -> KVCache:
    """With empty slots after the others, `slots` in all."""
    more = slots - cache.slots

    def padded(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    return cache.replace(
        k_LBHSK=tuple(padded(k_BHSK, 2) for k_BHSK in cache.k_LBHSK),
        v_LBHSK=tuple(padded(v_BHSK, 2) for v_BHSK in cache.v_LBHSK),
        valid_BS=padded(cache.valid_BS, 1),
    )
