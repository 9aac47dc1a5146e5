"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, "Mixed Precision Training").

Gradients below 6e-8 vanish in float16, so the loss is multiplied by a scale that is as large as does not overflow.
"""

import flax.struct
import jax
import jax.numpy as jnp

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # good steps before the scale is doubled


class LossScale(flax.struct.PyTreeNode):
    """The factor on the loss, and the good steps since it last changed."""

    scale: jax.Array
    good_steps: jax.Array


def initial_loss_scale() -> LossScale:
    """The scale to start with."""
    return LossScale(scale=jnp.float32(INITIAL_SCALE), good_steps=jnp.int32(0))


def adjust(loss_scale: LossScale, finite: jax.Array) -> LossScale:
    """Halved after an overflow (never below 1), doubled after GROWTH_INTERVAL good steps in a row."""
    grow = finite & (loss_scale.good_steps + 1 >= GROWTH_INTERVAL)
    factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    good_steps = jnp.where(finite & ~grow, loss_scale.good_steps + 1, 0)
    return LossScale(scale=jnp.maximum(loss_scale.scale * factor, 1.0), good_steps=good_steps)
