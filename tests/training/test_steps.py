"""Gradients over microbatches, whole train steps against NumPy float64, loss scaling and the moving average.

Shape letters: B batch, T positions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_adamw, numpy_gpt2

from gpt2_jax.config import ModelConfig, OptimizerConfig
from gpt2_jax.model.gpt2 import GPT2, padded_vocab_size
from gpt2_jax.training.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, LossScale
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.steps import StepSettings, eval_step, gradients, nonfinite_shares, train_step
from gpt2_jax.training.train_state import TrainState, init_state

B, T, V, STEPS = 6, 16, 70, 6
MODEL_CONFIG = ModelConfig(
    n_layer=2,
    n_head=4,
    n_embd=32,
    n_positions=20,
    vocab_size=V,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
# A large eps: a gradient that is zero but for rounding must not move its parameter by a whole learning rate.
OPTIMIZER_CONFIG = OptimizerConfig(
    learning_rate=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.1, clip_norm=1.0, eps=1e-4
)
REFERENCE = {"n_head": 4, "vocab_size": V, "epsilon": MODEL_CONFIG.layer_norm_epsilon}
EMA_DECAY = 0.9


def random_params() -> Any:
    params = numpy_gpt2.random_params(
        np.random.default_rng(0),
        n_layer=2,
        n_embd=32,
        n_positions=20,
        vocab_size=V,
        padded_vocab_size=padded_vocab_size(V),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def random_batch(seed: int = 1) -> dict[str, Any]:
    """Rows of very different weight, one with none at all."""
    rng = np.random.default_rng(seed)
    weights_BT = rng.uniform(0.1, 2.0, (B, T)) * np.array([1.0, 0.05, 3.0, 0.0, 1.0, 0.3])[:, None]
    return {
        "tokens": rng.integers(0, V, (B, T)).astype(np.int32),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "weights": weights_BT.astype(np.float32),
    }


def reference_loss_and_gradients(params: Any, batch: dict[str, Any]) -> tuple[float, Any]:
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    weights_BT = batch["weights"].astype(np.float64)
    return numpy_gpt2.loss_and_gradients(params, batch["tokens"], batch["targets"], weights_BT, **REFERENCE)


@functools.cache
def settings(
    dtype: str = "float32", rate: float = 0.0, seed: int = 0, microbatches: int = 1, loss_chunk: int = 0
) -> StepSettings:
    config = dataclasses.replace(MODEL_CONFIG, dtype=dtype, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    return StepSettings(
        model=GPT2(config),
        optimizer=make_optimizer(OPTIMIZER_CONFIG, STEPS),
        schedule=learning_rate_schedule(OPTIMIZER_CONFIG, STEPS),
        seed=seed,
        microbatches=microbatches,
        loss_chunk=loss_chunk,
        ema_decay=EMA_DECAY,
    )


def start(of: StepSettings) -> TrainState:
    """A state with the random parameters of this file, and an average that starts there."""
    params = random_params()
    state = init_state(of.model, of.optimizer, 0, ema=True)
    return state.replace(params=params, opt_state=of.optimizer.init(params), ema=jax.tree.map(jnp.copy, params))


def on_host(tree: Any) -> Any:
    """A copy that donation cannot touch."""
    return jax.tree.map(np.array, tree)


def leaves(tree: Any) -> dict[str, Any]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in numpy_gpt2.leaves(tree).items()}


def relative(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def without_key_bias(name: str, values: Any) -> Any:
    """The key third of c_attn's bias has a gradient of zero, so of rounding only."""
    return values[:, [0, 2]] if name == "h.attn.c_attn.bias" else values


def assert_trees_identical(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# Gradients over microbatches


@functools.cache
def gradients_in_parts(microbatches: int, loss_chunk: int = 0) -> tuple[Any, Any]:
    compute = jax.jit(
        lambda params, batch: gradients(
            GPT2(MODEL_CONFIG), params, batch, microbatches=microbatches, loss_chunk=loss_chunk
        )
    )
    grads, metrics = compute(random_params(), random_batch())
    return leaves(grads), metrics


def test_gradients_equal_the_reference() -> None:
    loss, expected = reference_loss_and_gradients(random_params(), random_batch())
    grads, metrics = gradients_in_parts(1)
    assert float(metrics["loss_sum"] / metrics["weight_sum"]) == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        wanted = without_key_bias(name, leaves(expected)[name])
        assert relative(without_key_bias(name, grad), wanted) < 1e-4, name


@pytest.mark.parametrize(("microbatches", "loss_chunk"), [(2, 0), (3, 8)])
def test_accumulated_gradients_equal_those_of_one_batch(microbatches: int, loss_chunk: int) -> None:
    """With parts of unequal weight: a mean of the means of the parts would be off by far more."""
    whole, whole_metrics = gradients_in_parts(1)
    parts, parts_metrics = gradients_in_parts(microbatches, loss_chunk)
    for name in ("loss_sum", "weight_sum"):
        assert float(parts_metrics[name]) == pytest.approx(float(whole_metrics[name]), rel=1e-6)
    for name, grad in parts.items():
        assert relative(without_key_bias(name, grad), without_key_bias(name, whole[name])) < 1e-6, name


def test_a_batch_without_weight_has_zero_gradients() -> None:
    batch = {**random_batch(), "weights": np.zeros((B, T), np.float32)}
    compute = jax.jit(lambda params, batch: gradients(GPT2(MODEL_CONFIG), params, batch, microbatches=2))
    grads, metrics = compute(random_params(), batch)
    assert float(metrics["loss_sum"]) == 0
    assert float(metrics["weight_sum"]) == 0
    assert all(np.all(np.asarray(grad) == 0) for grad in jax.tree.leaves(grads))


def test_microbatches_draw_different_dropout() -> None:
    """The loss of a row depends on the microbatch that it falls into: rows 0 and 1 are of two of them."""
    row = {name: np.concatenate([rows[:1]] * 2) for name, rows in random_batch().items()}
    compute = jax.jit(
        lambda batch: gradients(
            settings(rate=0.2).model, random_params(), batch, microbatches=2, dropout_key=jax.random.key(3)
        )[1]["loss_sum"]
    )
    losses = [
        float(compute({**row, "weights": row["weights"] * np.array(only, np.float32)[:, None]}))
        for only in ([1, 0], [0, 1])
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


# Train and evaluation steps


@functools.cache
def six_steps() -> tuple[list[Any], list[Any]]:
    """The states (on the host, the start first) and the metrics of six steps."""
    state = start(settings())
    states, metrics = [on_host(state)], []
    for index in range(STEPS):
        state, step_metrics = train_step(state, random_batch(index), settings=settings())
        states.append(on_host(state))
        metrics.append(on_host(step_metrics))
    return states, metrics


@pytest.mark.smoke
def test_six_steps_equal_the_reference() -> None:
    states, metrics = six_steps()
    names = leaves(states[0].params)
    adamw = numpy_adamw.AdamW(
        names,
        learning_rate=lambda s: numpy_adamw.schedule(
            "cosine", s, peak=1e-2, warmup=2, total=STEPS, end_fraction=OPTIMIZER_CONFIG.end_fraction
        ),
        b1=OPTIMIZER_CONFIG.b1,
        b2=OPTIMIZER_CONFIG.b2,
        eps=1e-4,
        weight_decay=0.1,
        decayed=[name for name in names if name.endswith(("kernel", "embedding"))],
        clip_norm=1.0,
    )
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), states[0].params)
    for index in range(STEPS):
        loss, grads = reference_loss_and_gradients(tree, random_batch(index))
        norm = numpy_adamw.global_norm(leaves(grads))
        assert norm > 1.0  # so that clipping is at work
        assert float(metrics[index]["loss_sum"] / metrics[index]["weight_sum"]) == pytest.approx(loss, rel=1e-5)
        assert float(metrics[index]["weight_sum"]) == pytest.approx(random_batch(index)["weights"].sum(), rel=1e-6)
        assert float(metrics[index]["grad_norm"]) == pytest.approx(norm, rel=1e-4)
        assert float(metrics[index]["learning_rate"]) == pytest.approx(adamw.learning_rate(index + 1), rel=1e-5)

        adamw.update(leaves(grads))
        tree = numpy_gpt2.from_leaves(adamw.params)
        assert int(states[index + 1].step) == index + 1
        for name, values in leaves(states[index + 1].params).items():
            moved = np.linalg.norm(adamw.params[name] - names[name])
            assert np.linalg.norm(values - adamw.params[name]) < 1e-3 * moved, f"{name} in step {index + 1}"


def test_moving_average_equals_hand_arithmetic() -> None:
    states, _ = six_steps()
    average = leaves(states[0].params)
    for state in states[1:]:
        average = numpy_adamw.moving_average(average, leaves(state.params), EMA_DECAY)
        for name, values in leaves(state.ema).items():
            np.testing.assert_allclose(values, average[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert_trees_identical(states[-1].eval_params, states[-1].ema)
    assert_trees_identical(states[-1].replace(ema=None).eval_params, states[-1].params)


def test_microbatches_and_chunks_change_no_step() -> None:
    in_parts = settings(microbatches=3, loss_chunk=4)
    state, metrics = train_step(start(in_parts), random_batch(0), settings=in_parts)
    states, whole = six_steps()
    for name in ("loss_sum", "weight_sum", "grad_norm", "learning_rate"):
        assert float(metrics[name]) == pytest.approx(float(whole[0][name]), rel=1e-6)
    before, expected = leaves(states[0].params), leaves(states[1].params)
    for name, values in leaves(state.params).items():
        moved = np.linalg.norm(expected[name] - before[name])
        assert np.linalg.norm(values - expected[name]) < 1e-3 * moved, name


@functools.cache
def ten_losses(optimizer: str, microbatches: int = 1, loss_chunk: int = 0, **of_model: Any) -> list[float]:
    """With a step in one piece and nothing recomputed, unless other is asked for."""
    config = dataclasses.replace(OPTIMIZER_CONFIG, name=optimizer)
    plain = {"remat": "none", "scan_unroll": 1}
    of = dataclasses.replace(
        settings(microbatches=microbatches, loss_chunk=loss_chunk),
        model=GPT2(dataclasses.replace(MODEL_CONFIG, **{**plain, **of_model})),
        optimizer=make_optimizer(config, 10),
        schedule=learning_rate_schedule(config, 10),
    )
    state, losses = start(of), []
    for index in range(10):
        state, metrics = train_step(state, random_batch(index % 3), settings=of)
        losses.append(float(metrics["loss_sum"] / metrics["weight_sum"]))
    return losses


ALL_FASTER = {"scan_unroll": 2, "remat": "dots", "loss_chunk": 8, "microbatches": 3}


@pytest.mark.parametrize(
    ("optimizer", "faster"),
    [
        ("adamw", {"scan_unroll": 2}),
        ("adamw", {"remat": "full"}),
        ("adamw", {"loss_chunk": 4}),
        ("adamw", ALL_FASTER),
        ("muon", ALL_FASTER),
    ],
    ids=str,
)
def test_ten_losses_equal_those_of_the_plain_step(optimizer: str, faster: dict[str, Any]) -> None:
    plain = ten_losses(optimizer)
    assert plain[-1] < plain[0] - 0.1
    assert ten_losses(optimizer, **faster) == pytest.approx(plain, rel=1e-5)


def test_eval_step_equals_the_reference_and_ignores_dropout() -> None:
    loss, _ = reference_loss_and_gradients(random_params(), random_batch())
    metrics = eval_step(random_params(), random_batch(), model=settings(rate=0.5).model, loss_chunk=8)
    assert float(metrics["weight_sum"]) == pytest.approx(random_batch()["weights"].sum(), rel=1e-6)
    assert float(metrics["loss_sum"] / metrics["weight_sum"]) == pytest.approx(loss, rel=1e-5)


def donating(kind: str) -> StepSettings:
    of = settings(dtype="float16") if kind == "float16" else settings()
    if kind == "float16" or kind == "adamw":
        return of
    config = dataclasses.replace(OPTIMIZER_CONFIG, **{"muon": {"name": "muon"}, "bfloat16": {"mu_dtype": kind}}[kind])
    return dataclasses.replace(of, optimizer=make_optimizer(config, STEPS))


@pytest.mark.parametrize("kind", ["adamw", "muon", "bfloat16", "float16"])
def test_each_array_of_the_new_state_lies_where_the_old_one_was(kind: str) -> None:
    """By the addresses in memory: no leaf of parameters, moments, average or counters is there twice."""
    of = donating(kind)
    state = jax.tree.map(jnp.copy, start(of))
    before = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    new, _ = train_step(state, random_batch(), settings=of)
    assert len(before) == len(jax.tree.leaves(new))
    for path, leaf in jax.tree_util.tree_leaves_with_path(new):
        assert leaf.unsafe_buffer_pointer() in before, jax.tree_util.keystr(path)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_dropout_follows_seed_and_step() -> None:
    def loss(seed: int, step: int) -> float:
        with_dropout = settings(rate=0.2, seed=seed)
        state = start(with_dropout).replace(step=jnp.int32(step))
        return float(train_step(state, random_batch(), settings=with_dropout)[1]["loss_sum"])

    first = loss(seed=0, step=0)
    assert loss(seed=0, step=0) == first
    assert len({first, loss(seed=0, step=1), loss(seed=1, step=0)}) == 3


def test_initial_state() -> None:
    of = settings()
    state = init_state(of.model, of.optimizer, 3, ema=True)
    assert int(state.step) == 0
    assert state.loss_scale is None
    assert_trees_identical(state.ema, state.params)
    assert_trees_identical(state.params, init_state(of.model, of.optimizer, 3).params)
    assert init_state(of.model, of.optimizer, 3).ema is None
    assert state.params["wte"]["embedding"].dtype == jnp.float32


# Loss scaling


HALF = "float16"


def scaled(scale: float, good_steps: int = 0) -> TrainState:
    loss_scale = LossScale(scale=jnp.float32(scale), good_steps=jnp.int32(good_steps))
    return start(settings(HALF)).replace(loss_scale=loss_scale)


def half_step(state: TrainState) -> tuple[Any, Any]:
    state, metrics = train_step(state, random_batch(0), settings=settings(HALF))
    return on_host(state), on_host(metrics)


def test_an_overflow_skips_the_update_and_halves_the_scale() -> None:
    before = on_host(scaled(2.0**100, good_steps=5))
    after, metrics = half_step(scaled(2.0**100, good_steps=5))
    for name in ("params", "opt_state", "ema"):
        assert_trees_identical(getattr(after, name), getattr(before, name))
    assert float(after.loss_scale.scale) == 2.0**99
    assert int(after.loss_scale.good_steps) == 0
    assert int(after.step) == 1
    assert float(metrics["skipped"]) == 1
    assert float(metrics["loss_scale"]) == 2.0**100


def test_a_run_of_overflows_ends_in_an_update() -> None:
    state, scales, skipped = scaled(2.0**24), [], []
    for _ in range(20):
        state, metrics = train_step(state, random_batch(0), settings=settings(HALF))
        scales.append(float(metrics["loss_scale"]))
        skipped.append(float(metrics["skipped"]))
    overflows = skipped.index(0.0)
    assert overflows > 0
    assert skipped == [1.0] * overflows + [0.0] * (20 - overflows)
    assert scales == [2.0 ** (24 - min(n, overflows)) for n in range(20)]
    assert int(state.loss_scale.good_steps) == 20 - overflows


def test_a_good_step_takes_the_scale_out_again() -> None:
    states, metrics = six_steps()
    norms, moved = [], []
    for scale in (2.0**4, 2.0**10):
        after, half_metrics = half_step(scaled(scale))
        assert float(half_metrics["skipped"]) == 0
        assert float(after.loss_scale.scale) == scale
        assert int(after.loss_scale.good_steps) == 1
        norms.append(float(half_metrics["grad_norm"]))
        moved.append(leaves(after.params))
    assert norms == pytest.approx([float(metrics[0]["grad_norm"])] * 2, rel=5e-3)
    before, expected = leaves(states[0].params), leaves(states[1].params)
    for name in before:
        for actual in moved:
            change = without_key_bias(name, expected[name] - before[name])
            assert relative(without_key_bias(name, actual[name] - before[name]), change) < 0.05, name


@pytest.mark.parametrize(
    ("good_steps", "scale", "next_good_steps"),
    [(GROWTH_INTERVAL - 2, 2.0**8, GROWTH_INTERVAL - 1), (GROWTH_INTERVAL - 1, 2.0**9, 0)],
)
def test_the_scale_doubles_after_enough_good_steps(good_steps: int, scale: float, next_good_steps: int) -> None:
    after, _ = half_step(scaled(2.0**8, good_steps))
    assert float(after.loss_scale.scale) == scale
    assert int(after.loss_scale.good_steps) == next_good_steps


def test_only_float16_has_a_loss_scale() -> None:
    half = settings(HALF)
    state = init_state(half.model, half.optimizer, 0)
    assert float(state.loss_scale.scale) == INITIAL_SCALE == 2.0**16
    _, metrics = six_steps()
    assert "loss_scale" not in metrics[0]


# What is not finite


def poisoned(seed: int) -> dict[str, Any]:
    batch = dict(random_batch(seed))
    weights = np.array(batch["weights"])
    weights[0, 0] = np.nan
    return {**batch, "weights": jnp.asarray(weights)}


def after_steps(of: StepSettings, batches: list[dict[str, Any]], state: TrainState | None = None) -> tuple[Any, list]:
    state, metrics = start(of) if state is None else state, []
    for batch in batches:
        state, of_step = train_step(state, batch, settings=of)
        metrics.append({name: float(value) for name, value in of_step.items()})
    return on_host(state), metrics


@pytest.mark.parametrize("dtype", ["float32", HALF])
def test_after_a_step_that_is_not_finite_nothing_changes_any_more(dtype: str) -> None:
    """However many are sent before the host has read that one; bit for bit. In float16 once its scale is 1."""
    of = settings(dtype)

    def first() -> TrainState:
        scale = LossScale(scale=jnp.float32(1), good_steps=jnp.int32(0)) if dtype == HALF else None
        return start(of).replace(loss_scale=scale)

    good, bad = [random_batch(0), random_batch(1)], [poisoned(2), random_batch(3), poisoned(4), random_batch(5)]
    before, _ = after_steps(of, good, first())
    after, metrics = after_steps(of, good + bad, first())
    assert [of_step["skipped"] for of_step in metrics] == [0, 0, 1, 1, 1, 1]
    assert [of_step["nonfinite_steps"] for of_step in metrics] == [0, 0, 1, 1, 2, 2]
    for name in ("step", "params", "opt_state", "ema", "loss_scale"):
        assert_trees_identical(getattr(after, name), getattr(before, name))


def test_as_many_as_may_be_skipped_are_left_out_alone() -> None:
    of = dataclasses.replace(settings(), max_skipped=2)
    batches = [random_batch(0), poisoned(1), random_batch(2), poisoned(3), random_batch(4)]
    after, metrics = after_steps(of, batches)
    assert [of_step["skipped"] for of_step in metrics] == [0, 1, 0, 1, 0]
    assert [of_step["nonfinite_steps"] for of_step in metrics] == [0, 1, 1, 2, 2]
    assert int(after.step) == 5
    # Without dropout a step is a function of the batch and the state, so these three by themselves do the same.
    expected, _ = after_steps(settings(), batches[::2])
    for name in ("params", "opt_state", "ema"):
        assert_trees_identical(getattr(after, name), getattr(expected, name))
    later, _ = after_steps(of, [*batches, poisoned(5), random_batch(6)])
    assert_trees_identical(later.params, after.params)
    assert int(later.step) == 5


def test_where_a_step_is_not_finite() -> None:
    """By layer for what is stacked; nothing where all is finite."""
    of = settings()
    state = start(of)
    shares, metrics = nonfinite_shares(state, random_batch(0), settings=of)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(shares))
    assert np.isfinite(float(metrics["loss_sum"]))
    shares, metrics = nonfinite_shares(state, poisoned(0), settings=of)
    assert all(np.asarray(leaf).all() for leaf in jax.tree.leaves(shares["ln_f"]))
    assert shares["h"]["mlp"]["c_fc"]["kernel"].shape == (2,)
    assert shares["ln_f"]["scale"].shape == ()
    assert not np.isfinite(float(metrics["loss_sum"]))
