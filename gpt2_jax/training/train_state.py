"""All that training carries from step to step, and its first value, laid out over a mesh before it takes memory."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gpt2_jax.model.gpt2 import GPT2, Params, boxed_init, init_params
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
      nonfinite_steps: how many had a loss or gradient that was not finite; int32 scalar. See `train_step`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    loss_scale: LossScale | None
    nonfinite_steps: jax.Array

    @property
    def eval_params(self) -> Params:
        """What evaluation, samples and export use: the average if one is kept."""
        return self.params if self.ema is None else self.ema


def init_state(model: GPT2, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False) -> TrainState:
    """The state before the first step. The numbers depend on `seed` and the model, not on any mesh."""
    return _state(model, optimizer, init_params(model, jax.random.key(seed)), ema)


def sharded_init(
    model: GPT2, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """`init_state` laid out over a mesh.

    The parameters are drawn whole, by one program on one device: drawn in parts they would differ in their last bits.
    """
    with jax.default_device(mesh.local_devices[0]):
        params = jax.jit(lambda: init_params(model, jax.random.key(seed)))()
    return sharded_state(model, optimizer, params, mesh, ema=ema)


def sharded_state(
    model: GPT2, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """The state before the first step from given parameters, laid out over a mesh."""
    shardings = state_shardings(model, optimizer, mesh, ema=ema)
    placed = jax.device_put(params, shardings.params)
    return jax.jit(lambda params: _state(model, optimizer, params, ema), out_shardings=shardings)(placed)


def state_shardings(model: GPT2, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool) -> Any:
    """A tree like the state with the sharding of each leaf: optimizer state and average lie as the parameters do."""
    boxed = jax.eval_shape(lambda: _state(model, optimizer, boxed_init(model, jax.random.key(0)), ema))
    return tree_shardings(boxed, mesh)


def abstract_state(model: GPT2, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool) -> Any:
    """A tree like the state with shape, type and sharding of each leaf, to restore a checkpoint into."""
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0, ema=ema))

    def placed(sharding: Any, part: Any) -> Any:
        # Nothing, where a part of the optimizer leaves a parameter to another one.
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part)

    return jax.tree.map(placed, state_shardings(model, optimizer, mesh, ema=ema), shapes)


def _state(model: GPT2, optimizer: optax.GradientTransformation, params: Params, ema: bool) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: the step donates the whole state, and a buffer can be donated only once.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        loss_scale=initial_loss_scale() if model.config.dtype == "float16" else None,
        nonfinite_steps=jnp.int32(0),
    )
