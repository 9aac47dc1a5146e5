"""The two layers that GPT-2 is made of: a projection and a LayerNorm.

Shapes: B batch, T length, N = B*T tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

class Projection(nn.Module):
    """An affine map of the last axis, `[B, T, in] -> [B, T, *features]`, with a kernel `[in, *features]`.

    Attributes:
      features: output shape per token.
      axes: logical axes of the kernel, input first.
      kernel_std: standard deviation of the initial kernel; the bias starts at zero.
      dtype: type of the product.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        normal = nn.initializers.normal(self.kernel_std)
        kernel_init = nn.with_logical_partitioning(normal, self.axes)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
        kernel = self.param("kernel", kernel_init, (width, *self.features)).astype(self.dtype)
        bias = self.param("bias", bias_init, self.features).astype(self.dtype)
        # Two-dimensional inside: a weight gradient that contracts two axes is half as fast on CPU.
        x_ND = x_BTD.reshape(-1, width).astype(self.dtype)

        y = jnp.tensordot(x_ND, kernel, axes=1)
        return y.reshape(*x_BTD.shape[:-1], *self.features) + jnp.expand_dims(bias, range(x_BTD.ndim - 1))

class LayerNorm(nn.Module):
    """Normalises the last axis to mean 0 and variance 1, in float32 or wider, then scales and shifts."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (width,))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (width,))
        x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        centred_BTD = x_BTD - x_BTD.mean(axis=-1, keepdims=True)
        variance_BT1 = jnp.square(centred_BTD).mean(axis=-1, keepdims=True)
        y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.epsilon)
        along = tuple(range(x_BTD.ndim - 1))
        return (y_BTD * jnp.expand_dims(scale, along) + jnp.expand_dims(bias, along)).astype(self.dtype)
