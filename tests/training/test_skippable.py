"""Optimizers that can be left out: against Optax's, and leaving out leaves everything."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_jax.config import OptimizerConfig
from gpt2_jax.training.optimizer import clip_by_global_norm, global_norm, make_optimizer
from gpt2_jax.training.skippable import scale_by_adam, scale_by_learning_rate, skippable

STEPS = 6


def tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"h": {"kernel": (2, 4, 3, 5), "bias": (2, 3)}, "wte": {"embedding": (7, 4)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def assert_same(ours: Any, theirs: Any, rtol: float = 0) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), ours, theirs)


def schedule(count: Any) -> Any:
    return 1e-2 / (1.0 + count)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (scale_by_adam(0.9, 0.95, 1e-8, "float32"), optax.scale_by_adam(0.9, 0.95, 1e-8)),
        (scale_by_adam(0.9, 0.95, 1e-3, "bfloat16"), optax.scale_by_adam(0.9, 0.95, 1e-3, mu_dtype="bfloat16")),
        (scale_by_learning_rate(schedule), optax.scale_by_learning_rate(schedule)),
        (clip_by_global_norm(1.5), optax.clip_by_global_norm(1.5)),
        (clip_by_global_norm(1e6), optax.clip_by_global_norm(1e6)),
    ],
    ids=["adam", "adam with a moment in bfloat16", "learning rate", "clips", "does not clip"],
)
def test_updates_and_state_are_those_of_optax(ours: Any, theirs: Any) -> None:
    our_state, their_state = ours.init(tree(0)), theirs.init(tree(0))
    assert_same(our_state, their_state)
    for step in range(STEPS):
        our_updates, our_state = ours.update(tree(step), our_state, tree(0))
        their_updates, their_state = theirs.update(tree(step), their_state, tree(0))
        assert_same(our_updates, their_updates, 2e-6)
        assert_same(our_state, their_state, 1e-6)


def test_the_norm_is_that_of_all_numbers() -> None:
    numbers = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree(3))]).astype(np.float64)
    assert float(global_norm(tree(3))) == pytest.approx(np.linalg.norm(numbers), rel=1e-6)
    assert float(global_norm({"zero": jnp.zeros((3, 2))})) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "optimizer",
    [
        make_optimizer(OptimizerConfig(warmup_steps=2), 10),
        make_optimizer(OptimizerConfig(warmup_steps=2, clip_norm=0), 10),
        make_optimizer(OptimizerConfig(warmup_steps=2, mu_dtype="bfloat16"), 10),
        make_optimizer(OptimizerConfig(warmup_steps=2, name="muon"), 10),
        skippable(optax.sgd(0.1, momentum=0.9)),
    ],
    ids=["adamw", "adamw without clipping", "adamw with a moment in bfloat16", "muon", "one of Optax"],
)
@pytest.mark.parametrize("after", [0, 2], ids=["first", "third"])
def test_what_is_left_out_changes_nothing(optimizer: Any, after: int, bad: float) -> None:
    """Neither parameters nor state, whatever the gradients; and the next update is as if it had not been."""

    @jax.jit
    def step(params: Any, state: Any, grads: Any, applied: Any) -> Any:
        updates, state = optimizer.update(grads, state, params, applied=applied)
        return optax.apply_updates(params, updates), state

    params = tree(9)
    state = optimizer.init(params)
    for number in range(after):
        params, state = step(params, state, tree(number), jnp.bool_(True))
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(bad), tree(5))
    same = step(params, state, broken, jnp.bool_(False))
    assert_same(same, (params, state))
    went_on, _ = step(*same, tree(6), jnp.bool_(True))
    assert_same(went_on, step(params, state, tree(6), jnp.bool_(True))[0])
    moved = jax.tree.map(lambda now, before: bool(jnp.any(now != before)), went_on, params)
    assert all(jax.tree.leaves(moved))


def test_state_is_updated_where_it_lies() -> None:
    """A choice between old and new state afterwards makes XLA on CPU copy both moments each time."""
    params, grads = ({"kernel": jnp.ones((256, 512))} for _ in range(2))
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0), 1000)

    def step(params: Any, state: Any, grads: Any, applied: Any) -> Any:
        updates, state = optimizer.update(grads, state, params, applied=applied)
        return optax.apply_updates(params, updates), state

    arguments = (params, optimizer.init(params), grads, jnp.bool_(True))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["kernel"].nbytes / 10
