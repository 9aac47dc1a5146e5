"""What GPT-2's blocks are made of: projections, LayerNorms, dropout.

Shapes: B batch, T length, N = B*T tokens, D width.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt2_jax.model.heads import pad_heads, padded_heads
from gpt2_jax.sharding import axis_size, relayout


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


def as_rows(x_BTD: jax.Array) -> jax.Array:
    """`[N, D]`, since a weight gradient that contracts two axes is computed at half the speed on CPU.

    Where tensor parallelism splits activations along the context it is left as it is: the sums over devices are
    scattered along T, which XLA does not find behind a reshape.
    """
    return x_BTD if axis_size("sequence") > 1 else x_BTD.reshape(-1, x_BTD.shape[-1])


class Projection(nn.Module):
    """An affine map of the last axis, `[B, T, in] -> [B, T, *features]`, with a kernel `[in, *features]`.

    Attributes:
      features: output shape per token.
      axes: logical axes of the kernel, input first.
      kernel_std: standard deviation of the initial kernel; the bias starts at zero.
      dtype: type of the product.
      use_bias: whether there is a bias.
      n_head: heads in the axis that is named "heads"; in and out go as many as `heads.padded_heads` says.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_std: float
    dtype: jnp.dtype
    use_bias: bool = True
    n_head: int = 0

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.kernel_std)
        width = x_BTD.shape[-1]
        if self.axes[0] == "heads":
            width = width // padded_heads(self.n_head) * self.n_head
        kernel = parameter(self, "kernel", init, self.axes, (width, *self.features))
        product = self._product
        if axis_size("embed") > 1 or axis_size("heads") > 1:
            # Weights gathered for the product are gathered again backwards, not kept: that would be all layers' at a
            # time. Within a recomputed block, XLA may merge the two.
            product = jax.checkpoint(self._product, prevent_cse=False)
        y = product(x_BTD, kernel)
        if not self.use_bias:
            return y
        # A vector is too small to be worth splitting over fsdp.
        axes = tuple(None if name == "embed" else name for name in self.axes[1:])
        bias = self._as_used(parameter(self, "bias", nn.initializers.zeros, axes, self.features), axes)
        bias = jnp.expand_dims(bias, range(x_BTD.ndim - 1))
        # The same number. A sum would be fused into the product of one token and slow it by a sixth (jax 0.10, CPU).
        return y - (-bias) if math.prod(x_BTD.shape[:-1]) == 1 else y + bias

    def _product(self, x_BTD: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = self._as_used(kernel, self.axes)
        shape = (*x_BTD.shape[:-1], *kernel.shape[1:])
        if axis_size("heads") == 1:
            # XLA on CPU computes the gradients of a kernel with two output axes at two thirds of the speed.
            kernel = kernel.reshape(len(kernel), -1)
        return jnp.tensordot(as_rows(x_BTD.astype(self.dtype)), kernel, axes=1).reshape(shape)

    def _as_used(self, stored: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Cast, gathered over fsdp, and with zero heads where tensor parallelism needs them."""
        uneven = "heads" in axes and padded_heads(self.n_head) != self.n_head
        whole = ("embed", "heads") if uneven else ("embed",)
        array = relayout(stored.astype(self.dtype), tuple(None if name in whole else name for name in axes), axes)
        if not uneven:
            return array
        padded = pad_heads(array, axes.index("heads"), self.n_head)
        return relayout(padded, tuple(None if name == "embed" else name for name in axes), axes)


class LayerNorm(nn.Module):
    """Normalises the last axis to mean 0 and variance 1, in float32 or wider, then scales and, with a bias, shifts."""

    epsilon: float
    dtype: jnp.dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones, (None,), (width,))
        bias = parameter(self, "bias", nn.initializers.zeros, (None,), (width,)) if self.use_bias else None
        # The backward pass normalises once more: it would read four arrays of this size.
        return jax.checkpoint(self._normalized, prevent_cse=False)(x_BTD, scale, bias).astype(self.dtype)

    def _normalized(self, x_BTD: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        along = tuple(range(x_BTD.ndim - 1))
        x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        centred_BTD = x_BTD - x_BTD.mean(axis=-1, keepdims=True)
        variance_BT1 = jnp.square(centred_BTD).mean(axis=-1, keepdims=True)
        y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.epsilon) * jnp.expand_dims(scale, along)
        return y_BTD if bias is None else y_BTD + jnp.expand_dims(bias, along)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Each number set to zero with probability `rate` (to 16 bits), the others divided by the rest of it.

    Two numbers share one draw of 32 bits. Without a key all stay as they are.
    """
    threshold = round(rate * 2**16)
    if key is None or not threshold:
        return x
    *shape, last = x.shape
    drawn = jax.random.bits(key, (*shape, -(-last // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(drawn, jnp.uint16).reshape(*shape, -1)[..., :last]
    return jnp.where(halves >= threshold, x / (1 - threshold / 2**16), 0)
