"""A transformer block: attention and MLP, each behind a LayerNorm and added to the residual stream.

Shapes: B batch, T length, D width, F = 4D.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.attention import CausalSelfAttention
from gpt2_jax.model.kv_cache import LayerCache
from gpt2_jax.model.layers import LayerNorm, Projection, dropout
from gpt2_jax.sharding import constrain, relayout, sequence_axis

_GELU = {
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu_erf": functools.partial(nn.gelu, approximate=False),
}


class Mlp(nn.Module):
    """Two projections with GELU between them, by default its tanh approximation."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        D, F = config.n_embd, 4 * config.n_embd
        x_BTF = Projection((F,), ("embed", "mlp"), config.initializer_range, dtype, config.bias, name="c_fc")(x_BTD)
        # Computed once more backwards, where it costs little: the backward pass would read five arrays of this size.
        x_BTF = jax.checkpoint(_GELU[config.activation], prevent_cse=False)(x_BTF)
        x_BTF = constrain(x_BTF, "batch", "length", "mlp")
        residual_std = config.initializer_range / math.sqrt(2 * config.n_layer)
        return Projection((D,), ("mlp", "embed"), residual_std, dtype, config.bias, name="c_proj")(x_BTF)


class Block(nn.Module):
    """One layer of GPT-2, in the form that `nn.scan` wants: carry in, (carry, cache) out; in training there is none.

    Without a key there is no dropout.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, dropout_key: jax.Array | None = None, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)

        # The residual stream is split along the context; attention and MLP, which split heads and width, see all of it.
        split, whole = ("batch", sequence_axis(x_BTD.shape[1]), None), ("batch", "length", None)

        y_BTD = LayerNorm(config.layer_norm_epsilon, dtype, config.bias, name="ln_1")(x_BTD)
        y_BTD, cache = CausalSelfAttention(config, name="attn")(relayout(y_BTD, whole, split), keys[0], cache)
        x_BTD = x_BTD + dropout(relayout(y_BTD, split, whole), config.resid_pdrop, keys[1])

        y_BTD = LayerNorm(config.layer_norm_epsilon, dtype, config.bias, name="ln_2")(x_BTD)
        y_BTD = Mlp(config, name="mlp")(relayout(y_BTD, whole, split))
        x_BTD = x_BTD + dropout(relayout(y_BTD, split, whole), config.resid_pdrop, keys[2])
        return constrain(x_BTD, *split), cache
