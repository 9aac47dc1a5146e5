"""Optimizers whose update can be left out by a flag on the device.

A step that is not finite must change nothing. To choose between old and new state afterwards makes XLA on CPU keep
both: 1 GB of copies per step of GPT-2's smallest. So Adam takes the flag into its coefficients instead; others
(`skippable`) choose.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


class Skippable(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update(..., applied=...)` gives zeros, and the state as it is, where not applied."""

    __slots__ = ()


def skippable(optimizer: optax.GradientTransformation) -> Skippable:
    """Any optimizer as one that can be left out."""
    if isinstance(optimizer, Skippable):
        return optimizer
    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads: Any, state: Any, params: Any = None, *, applied: Any = True, **more: Any) -> tuple[Any, Any]:
        updates, new = optimizer.update(grads, state, params, **more)
        updates = jax.tree.map(lambda leaf: jnp.where(applied, leaf, 0), updates)
        return updates, jax.tree.map(lambda after, before: jnp.where(applied, after, before), new, state)

    return Skippable(optimizer.init, update)


def skippable_chain(*transformations: optax.GradientTransformation) -> Skippable:
    """`optax.chain` of such."""
    chain = optax.chain(*transformations)
    return Skippable(chain.init, chain.update)


def scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: str) -> Skippable:
    """`optax.scale_by_adam` with its state, as one that can be left out (Kingma & Ba 2015, "Adam")."""
    init = optax.scale_by_adam(mu_dtype=mu_dtype).init

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None, *, applied: Any = True, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + jnp.asarray(applied, state.count.dtype)
        updates_done = jnp.maximum(count, 1)  # only to divide by

        def moment(decay: float, old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(applied, 1 - decay, 0.0) * new + jnp.where(applied, decay, 1.0) * old

        # What is not finite would stay so times zero.
        grads = jax.tree.map(lambda grad: jnp.where(applied, grad, 0), grads)
        mu = jax.tree.map(lambda grad, old: moment(b1, old, grad), grads, state.mu)
        nu = jax.tree.map(lambda grad, old: moment(b2, old, jnp.square(grad)), grads, state.nu)
        scale = jnp.where(applied, 1 / (1 - b1**updates_done), 0.0)
        unbias = 1 / (1 - b2**updates_done)
        updates = jax.tree.map(lambda m, v: m * scale / (jnp.sqrt(v * unbias) + eps), mu, nu)
        mu = optax.tree.cast(mu, mu_dtype)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return Skippable(init, update)


def scale_by_learning_rate(schedule: optax.Schedule) -> Skippable:
    """`optax.scale_by_learning_rate` with its state, zero for what is left out."""
    init = optax.scale_by_learning_rate(schedule).init

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None, *, applied: Any = True, **_: Any
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        rate = jnp.where(applied, -schedule(state.count), 0.0)
        updates = jax.tree.map(lambda leaf: rate * leaf, updates)
        return updates, optax.ScaleByScheduleState(count=state.count + jnp.asarray(applied, state.count.dtype))

    return Skippable(init, update)
