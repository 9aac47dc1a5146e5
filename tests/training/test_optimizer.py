"""AdamW, clipping and the learning-rate schedules against hand arithmetic in NumPy float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import numpy_adamw, numpy_gpt2

from gpt2_jax.config import OptimizerConfig
from gpt2_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

CONFIG = OptimizerConfig(
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=3,
    decay_steps=0,
    end_fraction=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    ema_decay=0.0,
)
STEPS = 12


def small_params(seed: int = 0) -> Any:
    return numpy_gpt2.random_params(
        np.random.default_rng(seed), n_layer=2, n_embd=8, n_positions=6, vocab_size=10, padded_vocab_size=16
    )


def random_gradients(seed: int, scale: float) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: scale * rng.standard_normal(p.shape), small_params())


def float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(config: OptimizerConfig, gradients: list[Any]) -> Any:
    """The parameters after one update per gradient tree, by name."""
    optimizer, params = make_optimizer(config, STEPS), float32(small_params())
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = step(params, state, float32(grads))
    return numpy_gpt2.leaves(params)


def run_by_hand(config: OptimizerConfig, gradients: list[Any]) -> Any:
    params = numpy_gpt2.leaves(small_params())
    adamw = numpy_adamw.AdamW(
        params,
        learning_rate=lambda s: numpy_adamw.schedule(
            config.schedule,
            s,
            peak=config.learning_rate,
            warmup=config.warmup_steps,
            total=STEPS,
            end_fraction=config.end_fraction,
            decay_steps=config.decay_steps,
        ),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        decayed=[name for name in params if name.endswith(("kernel", "embedding"))],
        clip_norm=config.clip_norm,
    )
    for grads in gradients:
        adamw.update(numpy_gpt2.leaves(grads))
    return adamw.params


# AdamW


@pytest.mark.smoke
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 0.0},
        {"weight_decay": 0.0},
        {"eps": 1e-2},
        {"b1": 0.0, "b2": 0.5, "warmup_steps": 0, "schedule": "linear"},
    ],
    ids=["default", "no clipping", "no decay", "large eps", "other betas"],
)
def test_ten_updates_equal_hand_arithmetic(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    scales = [0.003, 0.3, 0.01, 3.0, 0.001, 0.02, 1.0, 0.004, 0.1, 0.01]  # global norms below and above 1
    gradients = [random_gradients(seed, scale) for seed, scale in enumerate(scales)]
    actual, expected, start = run(config, gradients), run_by_hand(config, gradients), small_params()
    for name, before in numpy_gpt2.leaves(start).items():
        moved = np.linalg.norm(expected[name] - before)
        assert moved > 1e-2
        error = np.linalg.norm(np.asarray(actual[name], np.float64) - expected[name])
        assert error < 1e-5 * np.linalg.norm(expected[name]), name
        assert error < 1e-4 * moved, name


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_clipping_caps_the_global_norm(clip_norm: float) -> None:
    """With b1 = b2 = 0 and a huge eps, an update is -lr * g / eps: it shows the gradient after clipping."""
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0, learning_rate=1e4, clip_norm=clip_norm)
    config = dataclasses.replace(config, b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0)
    for scale in (0.001, 2.0):
        grads = random_gradients(1, scale)
        after, before = run(config, [grads]), numpy_gpt2.leaves(float32(small_params()))
        seen = {name: 100 * (np.asarray(before[name], np.float64) - after[name]) for name in before}
        norm = numpy_adamw.global_norm(numpy_gpt2.leaves(grads))
        expected = min(norm, clip_norm) if clip_norm else norm
        assert numpy_adamw.global_norm(seen) == pytest.approx(expected, rel=1e-3)


def test_decay_mask_names_kernels_and_embeddings_only() -> None:
    mask = numpy_gpt2.leaves(decay_mask(small_params()))
    assert {name for name, decays in mask.items() if decays} == {
        "wte.embedding",
        "wpe.embedding",
        "h.attn.c_attn.kernel",
        "h.attn.c_proj.kernel",
        "h.mlp.c_fc.kernel",
        "h.mlp.c_proj.kernel",
    }
    assert all(isinstance(decays, bool) for decays in mask.values())


def test_decay_shrinks_the_masked_leaves_by_the_rate_times_the_decay() -> None:
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0, learning_rate=0.5, weight_decay=0.2)
    zeros = jax.tree.map(np.zeros_like, small_params())
    before = numpy_gpt2.leaves(float32(small_params()))
    for name, after in run(config, [zeros]).items():
        if name.endswith(("kernel", "embedding")):
            np.testing.assert_allclose(after, 0.9 * np.asarray(before[name]), rtol=1e-6, err_msg=name)
        else:  # stacked over the layers, so two- or three-dimensional, and still not decayed
            np.testing.assert_array_equal(after, before[name], err_msg=name)


# Schedules: s is the number of the update from 1, the schedule is called with s - 1


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    schedule = learning_rate_schedule(config, steps)
    return [float(schedule(count)) for count in range(steps)]


def configured(schedule: str, **changes: Any) -> OptimizerConfig:
    return dataclasses.replace(CONFIG, schedule=schedule, learning_rate=1.0, **changes)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (configured("constant", warmup_steps=0), 3, {1: 1.0, 2: 1.0, 3: 1.0}),
        (configured("constant", warmup_steps=4), 9, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 5: 1.0, 9: 1.0}),
        (configured("cosine", warmup_steps=2, end_fraction=0.1), 10, {1: 0.5, 2: 1.0, 6: 0.55, 10: 0.1}),
        (configured("cosine", warmup_steps=0, end_fraction=0.0), 3, {1: 0.75, 2: 0.25, 3: 0.0}),
        (
            configured("linear", warmup_steps=2, end_fraction=0.2),
            10,
            {1: 0.5, 2: 1.0, 3: 0.9, 6: 0.6, 10: 0.2},
        ),
        (configured("linear", warmup_steps=0, end_fraction=0.0), 4, {1: 0.75, 2: 0.5, 3: 0.25, 4: 0.0}),
        (configured("inverse_sqrt", warmup_steps=1), 100, {1: 1.0, 4: 0.5, 25: 0.2, 100: 0.1}),
        (configured("inverse_sqrt", warmup_steps=4), 64, {1: 0.25, 4: 1.0, 16: 0.5, 64: 0.25}),
        (
            configured("wsd", warmup_steps=2, decay_steps=4, end_fraction=0.2),
            10,
            {1: 0.5, 2: 1.0, 3: 1.0, 6: 1.0, 7: 0.8, 8: 0.6, 9: 0.4, 10: 0.2},
        ),
        (configured("wsd", warmup_steps=0, decay_steps=1, end_fraction=0.0), 3, {1: 1.0, 2: 1.0, 3: 0.0}),
    ],
)
def test_rate_at_hand_picked_updates(config: OptimizerConfig, steps: int, expected: dict[int, float]) -> None:
    actual = rates(config, steps)
    for s, rate in expected.items():
        assert actual[s - 1] == pytest.approx(rate, rel=1e-5, abs=1e-7), f"update {s}"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "inverse_sqrt", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [1, 7])
def test_every_rate_equals_hand_arithmetic(schedule: str, warmup: int) -> None:
    config = dataclasses.replace(
        CONFIG, schedule=schedule, warmup_steps=warmup, decay_steps=11 if schedule == "wsd" else 0
    )
    expected = [
        numpy_adamw.schedule(
            schedule, s, peak=1e-2, warmup=warmup, total=40, end_fraction=0.1, decay_steps=config.decay_steps
        )
        for s in range(1, 41)
    ]
    np.testing.assert_allclose(rates(config, 40), expected, rtol=1e-5)


def test_warmup_may_fill_the_whole_run() -> None:
    for schedule in ("cosine", "linear", "constant", "inverse_sqrt"):
        assert rates(configured(schedule, warmup_steps=4), 4) == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=1e-6)


# Muon


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Four steps of the quintic Newton-Schulz iteration with the coefficients of Jordan (2024).

    Each row is first divided by the root of the sum of its absolute products with all rows, after which no singular
    value is above 1 (Prach & Lampert 2022).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / np.sqrt(np.abs(wide @ wide.T).sum(axis=1))[:, None]
    assert np.linalg.norm(x, 2) <= 1 + 1e-12
    for _ in range(4):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def matrices(name: str, stacked: np.ndarray) -> list[np.ndarray]:
    """Views of the matrices in a stack of kernels; queries, keys and values are three."""
    layers = list(stacked)
    return [layer[:, third] for layer in layers for third in range(3)] if "c_attn" in name else layers


def test_muon_equals_hand_arithmetic() -> None:
    """Of each kernel, per layer and third, Muon by hand; all else moves as under AdamW."""
    b1 = 0.8
    config = dataclasses.replace(CONFIG, name="muon", b1=b1, clip_norm=0.0, schedule="constant", warmup_steps=0)
    gradients = [random_gradients(seed, 0.1) for seed in range(3)]
    actual, start = run(config, gradients), numpy_gpt2.leaves(small_params())
    adamw = run(dataclasses.replace(config, name="adamw"), gradients)
    for name, before in start.items():
        if not name.endswith("kernel"):
            np.testing.assert_array_equal(actual[name], adamw[name])
            continue
        expected = np.array(before, np.float64)
        moment = np.zeros_like(expected)
        for count, grads in enumerate(gradients, 1):
            grad = numpy_gpt2.leaves(grads)[name]
            moment = b1 * moment + (1 - b1) * grad
            nesterov = b1 * moment / (1 - b1 ** (count + 1)) + (1 - b1) * grad / (1 - b1**count)
            update = np.empty_like(nesterov)
            for part, one in zip(matrices(name, update), matrices(name, nesterov), strict=True):
                part[...] = orthogonalised(one) * 0.2 * math.sqrt(max(one.shape))
            expected -= config.learning_rate * (update + config.weight_decay * expected)
        np.testing.assert_allclose(actual[name], expected, rtol=0, atol=2e-5 * config.learning_rate)
