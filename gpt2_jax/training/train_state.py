"""All that training carries from step to step, and its first value, laid out over a mesh before it takes memory."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt2_jax.model.gpt2 import GPT2, Params, boxed_init
from gpt2_jax.sharding import tree_shardings
from gpt2_jax.training.loss_scale import LossScale, initial_loss_scale


class TrainState(flax.struct.PyTreeNode):
    """A pytree of arrays.

    Attributes:
      step: updates done, skipped ones included; int32 scalar.
      params: the model's parameters, float32.
      opt_state: Optax's state.
      ema: moving average of the parameters, or None.
      loss_scale: for float16, else None.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    loss_scale: LossScale | None

    @property
    def eval_params(self) -> Params:
        """What evaluation, samples and export use: the average if one is kept."""
        return self.params if self.ema is None else self.ema


def init_state(model: GPT2, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False) -> TrainState:
    """The state before the first step. The numbers depend on `seed` and the model, not on any mesh."""
    return nn.unbox(_boxed_state(model, optimizer, seed, ema))


def sharded_init(
    model: GPT2, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """`init_state` laid out over a mesh: each device makes its own part only."""
    shardings = state_shardings(model, optimizer, mesh, ema=ema)
    return jax.jit(lambda: init_state(model, optimizer, seed, ema=ema), out_shardings=shardings)()


def state_shardings(model: GPT2, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool) -> Any:
    """A tree like the state with the sharding of each leaf: optimizer state and average lie as the parameters do."""
    return tree_shardings(jax.eval_shape(lambda: _boxed_state(model, optimizer, 0, ema)), mesh)


def abstract_state(model: GPT2, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool) -> Any:
    """A tree like the state with shape, type and sharding of each leaf, to restore a checkpoint into."""
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0, ema=ema))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, mesh, ema=ema),
    )


def _boxed_state(model: GPT2, optimizer: optax.GradientTransformation, seed: int, ema: bool) -> TrainState:
    params = boxed_init(model, jax.random.key(seed))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        loss_scale=initial_loss_scale() if model.config.dtype == "float16" else None,
    )
