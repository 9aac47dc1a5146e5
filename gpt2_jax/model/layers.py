"""The two layers that GPT-2 is made of: a projection and a LayerNorm.

Shapes: B batch, T length, N = B*T tokens, D width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> jax.Array:
    """A float32 parameter of `module` that carries the names of its logical axes when it is initialised."""
    boxed_init: Any = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed_init, shape, jnp.float32)


class Projection(nn.Module):
    """An affine map of the last axis, `[B, T, in] -> [B, T, *features]`, with a kernel `[in, *features]`.

    Attributes:
      features: output shape per token.
      axes: logical axes of the kernel, input first.
      kernel_std: standard deviation of the initial kernel; the bias starts at zero.
      dtype: type of the product.
      use_bias: whether there is a bias.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_std: float
    dtype: jnp.dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        init = nn.initializers.normal(self.kernel_std)
        kernel = parameter(self, "kernel", init, self.axes, (width, *self.features)).astype(self.dtype)
        # Two-dimensional inside: a weight gradient that contracts two axes is half as fast on CPU.
        x_ND = x_BTD.reshape(-1, width).astype(self.dtype)
        y = jnp.tensordot(x_ND, kernel, axes=1)
        y = y.reshape(*x_BTD.shape[:-1], *self.features)
        if not self.use_bias:
            return y
        bias = parameter(self, "bias", nn.initializers.zeros, self.axes[1:], self.features).astype(self.dtype)
        bias = jnp.expand_dims(bias, range(x_BTD.ndim - 1))
        # The same number. A sum would be fused into the product of one token and slow it by a sixth (jax 0.10, CPU).
        return y - (-bias) if len(x_ND) == 1 else y + bias


class LayerNorm(nn.Module):
    """Normalises the last axis to mean 0 and variance 1, in float32 or wider, then scales and, with a bias, shifts."""

    epsilon: float
    dtype: jnp.dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones, ("embed",), (width,))
        x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        centred_BTD = x_BTD - x_BTD.mean(axis=-1, keepdims=True)
        variance_BT1 = jnp.square(centred_BTD).mean(axis=-1, keepdims=True)
        y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.epsilon)
        along = tuple(range(x_BTD.ndim - 1))
        y_BTD = y_BTD * jnp.expand_dims(scale, along)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, ("embed",), (width,))
            y_BTD = y_BTD + jnp.expand_dims(bias, along)
        return y_BTD.astype(self.dtype)
