"""Causal multi-head self-attention.

Shapes: B batch, T queries, S keys (T of them, more with a cache), D width, H heads (zero heads included, see heads.py),
K head dimension.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.attention_kernels import KERNELS
from gpt2_jax.model.heads import padded_heads
from gpt2_jax.model.kv_cache import LayerCache
from gpt2_jax.model.layers import Projection, dropout
from gpt2_jax.sharding import constrain


@jax.custom_jvp
def masked_softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax over the last axis, of what is `visible`; its gradient needs nothing but the result."""
    # By replacement: adding a large negative number would round in bfloat16.
    return jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min), axis=-1)


@masked_softmax.defjvp
def _masked_softmax_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    weights, change = masked_softmax(*primals), tangents[0]
    return weights, weights * (change - (weights * change).sum(axis=-1, keepdims=True))


def attention_weights(q_BTHK: jax.Array, k_BSHK: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Softmax over the keys that each query may see: `[B, H, T, S]`, in float32 or wider; B of the mask may be 1."""
    exact = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    if q_BTHK.shape[1] == 1:
        # The other way round: XLA on CPU would transpose all keys for this product.
        scores_BHST = jnp.einsum("bshk,bthk->bhst", k_BSHK, q_BTHK, preferred_element_type=exact)
        scores_BHTS = scores_BHST.swapaxes(2, 3)
    else:
        scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=exact)
    scores_BHTS = scores_BHTS / math.sqrt(q_BTHK.shape[-1])
    return masked_softmax(scores_BHTS, visible_BTS[:, None])


class CausalSelfAttention(nn.Module):
    """Fused projection to queries, keys and values; attention; output projection.

    Without a cache each token attends to itself and those before it; with one, to what the cache says, and the second
    result is the cache with the new tokens in it. `config.attention` names a kernel for the case without; "auto", which
    a run replaces by its choice, and "xla" mean none.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, dropout_key: jax.Array | None, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        B, T, D = x_BTD.shape
        H, K = padded_heads(config.n_head), config.n_embd // config.n_head
        # [D, 3, D] is GPT-2's [D, 3D] with its thirds named, so that tensor parallelism splits heads, not thirds.
        qkv_axes, std = ("embed", "qkv", "heads"), config.initializer_range
        c_attn = Projection((3, D), qkv_axes, std, dtype, config.bias, config.n_head, name="c_attn")
        qkv_BT3D = c_attn(x_BTD)
        q_BTHK, k_BTHK, v_BTHK = (
            constrain(qkv_BT3D[:, :, third].reshape(B, T, H, K), "batch", "length", "heads", "head_dim")
            for third in range(3)
        )
        kernel = None if cache is not None or self.is_initializing() else KERNELS.get(config.attention)
        if kernel is not None:
            out_BTHK = kernel(q_BTHK, k_BTHK, v_BTHK)
        else:
            if cache is None:
                k_BSHK, v_BSHK, visible_BTS = k_BTHK, v_BTHK, jnp.tril(jnp.ones((1, T, T), bool))
            else:
                cache = cache.append(k_BTHK, v_BTHK)
                k_BSHK, v_BSHK, visible_BTS = cache.k_BSHK, cache.v_BSHK, cache.visible_BTS
            weights_BHTS = attention_weights(q_BTHK, k_BSHK, visible_BTS)
            # Masks are drawn for the real heads, as without padding.
            weights_BHTS = dropout(weights_BHTS[:, : config.n_head], config.attn_pdrop, dropout_key)
            if config.n_head < H:
                weights_BHTS = jnp.pad(weights_BHTS, ((0, 0), (0, H - config.n_head), (0, 0), (0, 0)))
            # In this order: XLA on CPU would transpose all values for [B, T, H, K].
            out_BTHK = jnp.einsum("bhts,bshk->bhtk", weights_BHTS.astype(dtype), v_BSHK).swapaxes(1, 2)
        out_BTD = out_BTHK.reshape(B, T, H * K)
        residual_std = config.initializer_range / math.sqrt(2 * config.n_layer)
        c_proj = Projection((D,), ("heads", "embed"), residual_std, dtype, config.bias, config.n_head, name="c_proj")
        return c_proj(out_BTD), cache
