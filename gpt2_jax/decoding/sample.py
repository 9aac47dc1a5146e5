"""Samples for the training log: the whole context is computed again for each token, without a cache.

Shapes: B rows, T length, D width, V' padded vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from gpt2_jax.model.gpt2 import GPT2, Params, logits_from_hidden


@functools.partial(jax.jit, static_argnames="model")
def continue_rows(
    params: Params, tokens_BT: jax.Array, start: jax.Array, key: jax.Array, temperature: jax.Array, *, model: GPT2
) -> jax.Array:
    """Fills `tokens_BT[:, start:]` with tokens drawn one after another, each given all before it.

    Args:
      params: the model's parameters.
      tokens_BT: rows of int32 ids, T at most n_positions; what stands at `start` and after is replaced.
      start: length of the prompt, 1 or more; the same for all rows.
      key: each row draws with its own key, whatever the other rows are.
      temperature: the logits are divided by it; 0 takes the most likely token.
      model: the module.
    """
    config = model.config
    rows = tokens_BT.shape[0]
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))

    def fill(position: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = model.apply({"params": params}, tokens_BT, method="hidden_states")
        x_BD = jax.lax.dynamic_index_in_dim(x_BTD, position - 1, axis=1, keepdims=False)
        logits_BV = logits_from_hidden(x_BD, params["wte"]["embedding"], config.vocab_size)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, position)
        drawn_B = jax.vmap(jax.random.categorical)(keys, logits_BV / jnp.maximum(temperature, 1e-6))
        next_B = jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1))
        return jax.lax.dynamic_update_slice_in_dim(tokens_BT, next_B[:, None].astype(tokens_BT.dtype), position, axis=1)

    return jax.lax.fori_loop(start, tokens_BT.shape[1], fill, tokens_BT)
