"""The same model with its layers one after another and a cache, for decoding.

One token is so little work that slicing a layer's weights out of stacked arrays would cost as much as using them.

Shapes: B rows, T new tokens, S slots, D width, V' padded vocabulary, L layers.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.block import Block
from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.model.kv_cache import KVCache, LayerCache


def unstack(params: Params, config: ModelConfig, *, flat: bool) -> Params:
    """The parameters with `h` as a tuple of layers, in the type in which `config.dtype` uses them.

    Tables that are of this type already are not copied.

    Args:
      params: the model's parameters.
      config: the model's.
      flat: store the kernel of `c_attn` as `[D, 3D]`. XLA on CPU computes the product of one token with `[D, 3, D]` at
        a sixth of the speed; tensor parallelism, which splits heads, needs the axis of 3.
    """

    rest = {name: part for name, part in params.items() if name != "h"}
    return {**_as_used(rest, config), "h": _layers(params["h"], config, flat)}


@functools.partial(jax.jit, static_argnames=("config", "flat"))
def _layers(stacked: Params, config: ModelConfig, flat: bool) -> tuple[Params, ...]:
    cast = _as_used(stacked, config)
    layers = [jax.tree.map(operator.itemgetter(layer), cast) for layer in range(config.n_layer)]
    if flat:
        layers = [_with_c_attn_shape(layer, (config.n_embd, 3 * config.n_embd)) for layer in layers]
    return tuple(layers)


def _as_used(params: Params, config: ModelConfig) -> Params:
    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        in_norm = any(str(key.key).startswith("ln_") for key in path)  # LayerNorm computes in float32
        return leaf if in_norm else leaf.astype(config.dtype)

    return jax.tree.map_with_path(cast, params)


def extend(
    model: GPT2, weights: Params, tokens_BT: jax.Array, valid_BT: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Reads tokens after those that the cache holds.

    Args:
      model: the module.
      weights: from `unstack`.
      tokens_BT: the next tokens of each row.
      valid_BT: which of them are a row's: its first ones. The others take slots that stay empty.
      cache: with T free slots.

    Returns:
      Final hidden states `[B, T, D]`, and the cache with the tokens in it.
    """
    config, T = model.config, tokens_BT.shape[1]
    valid_BS = jax.lax.dynamic_update_slice_in_dim(cache.valid_BS, valid_BT, cache.used, axis=1)
    # Slots used before, and of the new ones those up to the token's own.
    past_TS = jnp.arange(cache.slots)[None] <= cache.used + jnp.arange(T)[:, None]
    visible_BTS = valid_BS[:, None] & past_TS[None]
    # A row that has ended may stand at the end of the table.
    positions_BT = jnp.minimum(cache.length_B[:, None] + jnp.arange(T)[None], config.n_positions - 1)

    x_BTD: Any = model.apply({"params": weights}, tokens_BT, positions_BT, method="embed")
    keys, values = [], []
    for layer, old_keys, old_values in zip(weights["h"], cache.keys_L, cache.values_L, strict=True):
        layer = _with_c_attn_shape(layer, (config.n_embd, 3, config.n_embd))
        layer_cache = LayerCache(old_keys, old_values, cache.used, visible_BTS)
        read: Any = Block(config).apply({"params": layer}, x_BTD, None, layer_cache)
        x_BTD, layer_cache = read
        keys.append(layer_cache.keys)
        values.append(layer_cache.values)
    x_BTD = model.apply({"params": weights}, x_BTD, method="normalize")
    return x_BTD, KVCache(
        keys_L=tuple(keys),
        values_L=tuple(values),
        valid_BS=valid_BS,
        used=cache.used + T,
        length_B=cache.length_B + valid_BT.sum(axis=1, dtype=jnp.int32),
    )


def next_token_logits(x_BD: jax.Array, wte_VD: jax.Array, vocab_size: int) -> jax.Array:
    """`gpt2.logits_from_hidden` for few rows: `[B, V']`, -inf from `vocab_size` on."""
    exact = jnp.promote_types(x_BD.dtype, jnp.float32)
    logits_VB = jnp.einsum("vd,bd->vb", wte_VD, x_BD, preferred_element_type=exact)
    # Without the barrier XLA would compute the transpose, for which it rearranges the whole table each time on CPU.
    logits_BV = jax.lax.optimization_barrier(logits_VB).T
    real_V = jnp.arange(wte_VD.shape[0]) < vocab_size
    return jnp.where(real_V[None], logits_BV, -jnp.inf)


def _with_c_attn_shape(layer: Params, shape: tuple[int, ...]) -> Params:
    attn = layer["attn"]
    c_attn = {**attn["c_attn"], "kernel": attn["c_attn"]["kernel"].reshape(shape)}
    return {**layer, "attn": {**attn, "c_attn": c_attn}}
