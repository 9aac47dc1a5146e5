"""Samplers: frequencies of 50,000 draws against the exact distribution, in NumPy float64, and against a wrong one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gpt2_jax.decoding.sampling import (
    choose,
    count,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    most_likely,
    prompt_history,
    top_log_probs,
)
from gpt2_jax.decoding.settings import Sampling, Stopping
from gpt2_jax.errors import UsageError

DRAWS, VOCABULARY, PADDED = 50_000, 32, 128
LOGITS_V = 1.7 * np.random.default_rng(0).standard_normal(VOCABULARY)
PROMPT = [3, 5, 5, 9, 30]
TEXT = [5, 11, 11, 11, 2, 17, 17]


def expected(
    temperature: float = 1.0,
    top_k: int = VOCABULARY,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: dict[int, float] | None = None,
) -> np.ndarray:
    """The exact distribution, by sorting, one step after another."""
    logits = LOGITS_V.copy()
    for token, value in (bias or {}).items():
        logits[token] += value
    for token in {*PROMPT, *TEXT}:
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token in set(TEXT):
        logits[token] -= presence + frequency * TEXT.count(token)
    logits /= temperature
    order = np.argsort(-logits)
    logits[order[top_k:]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def frequencies(sampling: Sampling) -> np.ndarray:
    logits_BV = jnp.full((DRAWS, PADDED), -jnp.inf).at[:, :VOCABULARY].set(jnp.asarray(LOGITS_V, jnp.float32))
    history = None
    if sampling.penalizes:
        # The texts of all rows are the same; their tokens are counted one after another.
        history = prompt_history(np.array([PROMPT]), np.array([len(PROMPT)]), PADDED)
        for token in TEXT:
            history = count(history, jnp.array([token]), jnp.array([True]))
        history = count(history, jnp.array([0]), jnp.array([False]))
        history = jax.tree.map(lambda x: jnp.broadcast_to(x, (DRAWS, PADDED)), history)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    drawn_B = jax.jit(choose)(logits_BV, keys, sampling.values(VOCABULARY, PADDED), history)
    return np.bincount(np.asarray(drawn_B), minlength=PADDED)


def p_value(counts: np.ndarray, distribution: np.ndarray) -> float:
    """Of Pearson's chi-square test; cells with fewer than 5 expected draws are one cell."""
    if counts[VOCABULARY:].any() or counts[:VOCABULARY][distribution == 0].any():
        return 0.0  # what cannot be drawn was drawn
    counts, wanted = counts[:VOCABULARY][distribution > 0], DRAWS * distribution[distribution > 0]
    rare = wanted < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    keep = wanted > 0
    return float(scipy.stats.chisquare(counts[keep], wanted[keep]).pvalue)


CASES: dict[str, tuple[Sampling, dict[str, Any], dict[str, Any]]] = {
    # the sampler, the exact distribution, and that of a sampler with a fault
    "plain": (Sampling(), {}, {"temperature": 1.05}),
    "cold": (Sampling(temperature=0.7), {"temperature": 0.7}, {"temperature": 1 / 0.7}),
    "hot": (Sampling(temperature=1.5), {"temperature": 1.5}, {}),
    "top_k": (Sampling(top_k=7), {"top_k": 7}, {"top_k": 8}),
    "top_p": (Sampling(top_p=0.8), {"top_p": 0.8}, {"top_p": 0.85}),
    "min_p": (Sampling(min_p=0.1), {"min_p": 0.1}, {"min_p": 0.2}),
    "repetition": (Sampling(repetition_penalty=1.4), {"repetition": 1.4}, {"repetition": 1 / 1.4}),
    "presence": (Sampling(presence_penalty=0.9), {"presence": 0.9}, {"frequency": 0.9}),
    "frequency": (Sampling(frequency_penalty=0.6), {"frequency": 0.6}, {"presence": 0.6}),
    "bias": (
        Sampling(logit_bias={4: 2.0, 6: -1.5, 8: -math.inf}),
        {"bias": {4: 2.0, 6: -1.5, 8: -math.inf}},
        {"bias": {4: 2.0, 6: -1.5}},
    ),
    "filters together": (
        Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.03),
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.03},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.03},
    ),
    "all": (
        Sampling(0.8, 16, 0.93, 0.02, 1.2, 0.3, 0.2, {4: 1.0}),
        {
            **{"temperature": 0.8, "top_k": 16, "top_p": 0.93, "min_p": 0.02},
            **{"repetition": 1.2, "presence": 0.3, "frequency": 0.2, "bias": {4: 1.0}},
        },
        {
            **{"temperature": 0.8, "top_k": 16, "top_p": 0.93, "min_p": 0.02},
            **{"repetition": 1.2, "presence": 0.3, "bias": {4: 1.0}},
        },
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", CASES)
def test_frequencies_fit_the_exact_distribution_and_no_other(name: str) -> None:
    sampling, right, wrong = CASES[name]
    counts = frequencies(sampling)
    assert p_value(counts, expected(**right)) > 1e-3
    assert p_value(counts, expected(**wrong)) < 1e-6


def random_logits(rows: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(3 * np.random.default_rng(seed).standard_normal((rows, 500)), jnp.float32)


def kept(filtered_BV: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(~np.isneginf(row))) for row in np.asarray(filtered_BV)]


@pytest.mark.parametrize("k", [1, 2, 40, 499, 500, 9999])
def test_top_k_keeps_the_most_likely(k: int) -> None:
    logits_BV = random_logits(3)
    best = [set(row[:k]) for row in np.argsort(-np.asarray(logits_BV), axis=1)]
    assert kept(keep_top_k(logits_BV, jnp.int32(k))) == best


@pytest.mark.parametrize("p", [1e-6, 0.2, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float) -> None:
    logits_BV = random_logits(3)
    for row, tokens in zip(np.asarray(logits_BV, np.float64), kept(keep_top_p(logits_BV, jnp.float32(p))), strict=True):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities)
        needed = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
        assert tokens == set(order[:needed])


def test_thresholds_tell_apart_what_differs_by_a_millionth() -> None:
    logits_V = np.float32(-1e-6) * np.arange(8, dtype=np.float32)
    logits_BV = jnp.asarray(logits_V[None])
    for k in range(1, 9):
        assert kept(keep_top_k(logits_BV, jnp.int32(k))) == [set(range(k))]
        assert kept(keep_top_p(logits_BV, jnp.float32((k - 0.5) / 8))) == [set(range(k))]


@pytest.mark.parametrize("top_p", [1e-30, 1e-40, 1e-300])
def test_a_top_p_that_float32_hardly_holds_keeps_the_most_likely(top_p: float) -> None:
    logits_BV = random_logits(20).at[:, 0].set(-jnp.inf)
    keys = jax.random.split(jax.random.key(0), 20)
    drawn_B = choose(logits_BV, keys, Sampling(top_p=top_p).values(500, 500), None)
    np.testing.assert_array_equal(drawn_B, np.asarray(logits_BV).argmax(1))


@pytest.mark.parametrize("alternatives", [0, 1, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_the_most_likely_tokens_in_order(alternatives: int, ties: bool) -> None:
    logits = 3 * np.random.default_rng(2).standard_normal((6, 512))
    logits = np.float32(logits.round() if ties else logits)
    logits[:, 500:] = -np.inf
    ids_BA, log_probs_BA = top_log_probs(jnp.asarray(logits), alternatives)
    want_BA = np.argsort(-logits, axis=1, kind="stable")[:, :alternatives]
    np.testing.assert_array_equal(ids_BA, want_BA)
    total_B1 = np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_probs_BA, np.take_along_axis(logits, want_BA, 1) - total_B1, atol=1e-5)


def test_tokens_that_tie_at_a_threshold_stay() -> None:
    logits_BV = jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert kept(keep_top_k(logits_BV, jnp.int32(2))) == [{0, 1, 2, 3}]
    assert kept(keep_top_p(logits_BV, jnp.float32(0.5))) == [{0, 1, 2, 3}]
    assert kept(keep_min_p(logits_BV, jnp.float32(np.exp(-1)) * 0.999)) == [{0, 1, 2, 3}]
    assert kept(keep_top_p(jnp.zeros((1, 8)), jnp.float32(0.3))) == [set(range(8))]


@pytest.mark.parametrize("logits", [[1e4, -1e4, 0.0], [-math.inf, 5.0, -math.inf], [-1e30, -1e30, -1e30]])
def test_extreme_logits(logits: list[float]) -> None:
    sampling = Sampling(temperature=1e-30, top_k=2, top_p=0.9, min_p=0.1)
    keys = jax.random.split(jax.random.key(0), 20)
    rows = jnp.tile(jnp.array([logits], jnp.float32), (20, 1))
    drawn = np.asarray(choose(rows, keys, sampling.values(3, 3), None))
    best = np.flatnonzero(np.array(logits) == max(logits))
    assert set(drawn) <= set(best)
    assert len(set(drawn)) == len(best)


def test_most_likely_is_the_first_of_the_highest() -> None:
    logits_BV = np.random.default_rng(8).integers(-3, 4, (40, 200)).astype(np.float32)  # many ties
    logits_BV[:, 150:] = -np.inf
    logits_BV[0], logits_BV[1, :150] = -np.inf, -1e38
    np.testing.assert_array_equal(most_likely(jnp.asarray(logits_BV)), logits_BV.argmax(axis=1))


def test_greedy_heeds_bias_and_penalties_only() -> None:
    logits_BV = random_logits(4)
    values = Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.5).values(500, 500)
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_array_equal(choose(logits_BV, keys, values, None), np.asarray(logits_BV).argmax(1))
    best = int(logits_BV[0].argmax())
    banned = Sampling(temperature=0, logit_bias={best: -math.inf}).values(500, 500)
    assert int(choose(logits_BV, keys, banned, None)[0]) == np.asarray(logits_BV)[0].argsort()[-2]
    history = count(
        prompt_history(np.zeros((4, 1), np.int32), np.ones(4, np.int32), 500), logits_BV.argmax(1), jnp.ones(4, bool)
    )
    penalized = Sampling(temperature=0, presence_penalty=100.0).values(500, 500)
    assert (choose(logits_BV, keys, penalized, history) != logits_BV.argmax(1)).all()


def test_a_row_depends_on_its_key_and_logits_alone() -> None:
    logits_BV, keys = random_logits(6), jax.random.split(jax.random.key(4), 6)
    values = Sampling(top_k=50, top_p=0.95).values(500, 500)
    together = np.asarray(choose(logits_BV, keys, values, None))
    for row in range(6):
        alone = choose(logits_BV[row : row + 1], keys[row : row + 1], values, None)
        assert int(alone[0]) == together[row]
    np.testing.assert_array_equal(choose(logits_BV[::-1], keys[::-1], values, None), together[::-1])


def test_other_values_need_no_other_program() -> None:
    program = jax.jit(lambda *arguments: choose(*arguments))
    for k in (1, 5, 9):
        values = Sampling(temperature=k / 3, top_k=k, logit_bias={k: 1.0}).values(500, 500)
        program(random_logits(1), jax.random.split(jax.random.key(0), 1), values, None)
    assert program._cache_size() == 1


def test_the_history_of_ragged_prompts() -> None:
    tokens_BT = np.array([[4, 4, 7], [1, 9, 9]])
    history = prompt_history(tokens_BT, np.array([3, 1]), 10, 2)
    assert [set(np.flatnonzero(row)) for row in np.asarray(history.in_prompt_BV)] == [{4, 7}, {4, 7}, {1}, {1}]
    live_B = jnp.array([True, False, True, True])
    for token_B in ([4, 4, 0, 5], [4, 4, 2, 5]):
        history = count(history, jnp.array(token_B), live_B)
    counts = [{i: int(n) for i, n in enumerate(row) if n} for row in np.asarray(history.count_BV)]
    assert counts == [{4: 2}, {}, {0: 1, 2: 1}, {5: 2}]


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"temperature": -1}, ["temperature=-1", "from 0"]),
        ({"temperature": math.nan}, ["temperature=nan"]),
        ({"temperature": math.inf}, ["temperature=inf"]),
        ({"temperature": "1"}, ["temperature='1'"]),
        ({"temperature": True}, ["temperature=True"]),
        ({"top_k": -1}, ["top_k=-1", "integers from 0"]),
        ({"top_k": 2.5}, ["top_k=2.5"]),
        ({"top_k": 2**31}, ["top_k=2147483648"]),
        ({"top_p": 0}, ["top_p=0", "above 0, up to 1"]),
        ({"top_p": 1.01}, ["top_p=1.01"]),
        ({"top_p": math.nan}, ["top_p=nan"]),
        ({"min_p": 1}, ["min_p=1", "below 1"]),
        ({"min_p": -0.1}, ["min_p=-0.1"]),
        ({"repetition_penalty": 0}, ["repetition_penalty=0"]),
        ({"presence_penalty": math.inf}, ["presence_penalty=inf"]),
        ({"frequency_penalty": math.nan}, ["frequency_penalty=nan"]),
        ({"logit_bias": {1: math.inf}}, ["logit_bias 1=inf"]),
        ({"logit_bias": {1: math.nan}}, ["logit_bias 1=nan"]),
        ({"logit_bias": {"1": 1.0}}, ["logit_bias '1'"]),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**settings)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize("bias", [{32: 1.0}, {-1: 1.0}, dict.fromkeys(range(32), -math.inf)])
def test_biases_that_do_not_fit_the_vocabulary(bias: dict[int, float]) -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        Sampling(logit_bias=bias).values(VOCABULARY, PADDED)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"beyond_context": "wrap"},
        {"strings": ("a", "")},
        {"strings": "a"},
    ],
)
def test_stopping_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Stopping(**settings)
