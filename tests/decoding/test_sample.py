"""Samples for the training log, against full passes of the model and exact probabilities."""

import functools

import jax
import numpy as np
import pytest

from gpt2_jax.config import ModelConfig
from gpt2_jax.decoding.sample import continue_rows
from gpt2_jax.model.gpt2 import GPT2, init_params

MODEL = GPT2(ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=11))


@pytest.fixture(scope="module")
def params() -> dict:
    drawn = init_params(MODEL, jax.random.key(0))
    # Wide enough that the most likely token is clear and the tokens vary.
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, drawn)


def continued(params: dict, rows: np.ndarray, start: int, seed: int, temperature: float) -> np.ndarray:
    key = jax.random.key(seed)
    return np.asarray(continue_rows(params, rows, start, key, np.float32(temperature), model=MODEL))


def prompts(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 11, (rows, 12)).astype(np.int32)


@pytest.mark.smoke
def test_temperature_0_is_the_argmax_of_full_passes(params: dict) -> None:
    rows = prompts(0, 3)
    got = continued(params, rows, 3, 0, 0.0)
    want = rows[:, :3]
    for _ in range(9):
        logits = np.asarray(MODEL.apply({"params": params}, want))[:, -1]
        want = np.concatenate([want, logits.argmax(-1)[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got[:, 3:])) > 2


def test_what_stands_after_the_prompt_does_not_matter(params: dict) -> None:
    rows = prompts(1, 2)
    other = rows.copy()
    other[:, 4:] = 0
    np.testing.assert_array_equal(continued(params, rows, 4, 5, 1.0), continued(params, other, 4, 5, 1.0))


def test_a_row_does_not_depend_on_the_others(params: dict) -> None:
    rows = prompts(2, 4)
    together = continued(params, rows, 2, 7, 1.0)
    changed = rows.copy()
    changed[1:] = (changed[1:] + 1) % 11
    np.testing.assert_array_equal(continued(params, changed, 2, 7, 1.0)[0], together[0])
    np.testing.assert_array_equal(continued(params, rows[:1], 2, 7, 1.0)[0], together[0])


def test_rows_and_seeds_draw_differently(params: dict) -> None:
    rows = np.zeros((2, 12), np.int32)
    first = continued(params, rows, 1, 0, 1.0)
    np.testing.assert_array_equal(first, continued(params, rows, 1, 0, 1.0))
    assert (first[0] != first[1]).any()
    assert (first != continued(params, rows, 1, 1, 1.0)).any()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_fit_the_probabilities(params: dict, temperature: float) -> None:
    num_draws, start = 4000, 3
    row = prompts(3, 1)[:, : start + 1]
    logits = np.asarray(MODEL.apply({"params": params}, row[:, :start]), np.float64)[0, -1] / temperature
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    draw = functools.partial(continued, params, np.repeat(row, num_draws, axis=0), start, 11)
    counts = np.bincount(draw(temperature)[:, start], minlength=11)

    def chi_square(expected: np.ndarray) -> float:
        likely = expected * num_draws >= 5
        return float((((counts - expected * num_draws) ** 2) / (expected * num_draws))[likely].sum())

    # The 0.999 quantile of chi-square with 10 degrees of freedom is 29.6.
    assert chi_square(probabilities) < 29.6
    wrong = probabilities**2 / (probabilities**2).sum()
    assert chi_square(wrong) > 60
