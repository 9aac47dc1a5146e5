"""Decoding with a cache, against full passes of GPT-2 in NumPy float64; and what the compiled loop looks like."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt2

from gpt2_jax.config import MeshConfig, ModelConfig
from gpt2_jax.decoding.batch import Batch, Limits, Token
from gpt2_jax.decoding.decoder import Ended, Plan, Request, advance, begin, decode_step, prefill
from gpt2_jax.decoding.layout import Decoder, make_decoder
from gpt2_jax.decoding.settings import Sampling
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.sharding import make_mesh

CONFIG = ModelConfig(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=50)
GREEDY = Sampling(temperature=0)
PROMPT_LENGTHS = (3, 9, 1, 6)


def reference_params(seed: int = 0) -> dict[str, Any]:
    params = numpy_gpt2.random_params(
        np.random.default_rng(seed),
        n_layer=CONFIG.n_layer,
        n_embd=CONFIG.n_embd,
        n_positions=CONFIG.n_positions,
        vocab_size=CONFIG.vocab_size,
        padded_vocab_size=padded_vocab_size(CONFIG.vocab_size),
    )
    params["wpe"]["embedding"] *= 4  # so that greedy texts do not repeat themselves
    return params


PARAMS_64 = reference_params()


def full_logits(ids: list[int]) -> np.ndarray:
    """Logits [len(ids), V] in float64, the whole text at once."""
    return numpy_gpt2.logits(
        PARAMS_64,
        np.array([ids]),
        n_head=CONFIG.n_head,
        vocab_size=CONFIG.vocab_size,
        epsilon=CONFIG.layer_norm_epsilon,
    )[0]


def decoder(mesh: tuple[int, int] | None = None, dtype: str = "") -> Decoder:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS_64)
    devices = None
    if mesh is not None:
        data, tensor = mesh
        devices = make_mesh(MeshConfig(data=data, tensor=tensor), jax.devices()[: data * tensor])
    return make_decoder(CONFIG, params, CONFIG.vocab_size, mesh=devices, dtype=dtype)


def random_texts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]


def padded(texts: list[list[int]], width: int) -> np.ndarray:
    """Texts at the start of rows that end with a token that must not matter."""
    return np.array([text + [7] * (width - len(text)) for text in texts], np.int32)


def decoded(model: Decoder, prompts: list[list[int]], **asked: Any) -> list[list[Token]]:
    """The tokens of each row."""
    samples = asked.get("samples", (0,))
    rows: list[list[Token]] = [[] for _ in range(len(prompts) * len(samples))]
    asked = {"sampling": GREEDY, "limits": Limits(8), "chunk": 4, **asked}
    for token in Batch(model, prompts, **asked):
        rows[token.row].append(token)
    return rows


def ids(rows: list[list[Token]]) -> list[list[int]]:
    return [[token.id for token in row] for row in rows]


@pytest.mark.smoke
@pytest.mark.parametrize("mesh", [None, (1, 1), (4, 1), (4, 2), (2, 4)])
def test_logits_token_by_token_are_those_of_a_full_pass(mesh: tuple[int, int] | None) -> None:
    model = decoder(mesh)
    plan = Plan(model.model, CONFIG.vocab_size)
    texts = random_texts(*(length + 12 for length in PROMPT_LENGTHS))
    prompts = [text[:length] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)]
    length_B = np.array(PROMPT_LENGTHS, np.int32)
    first = jax.jit(prefill, static_argnames=("plan", "slots"))
    step = jax.jit(decode_step, static_argnames="plan")
    with model.on_mesh():
        logits_BV, cache = first(model.weights, padded(prompts, 16), length_B, plan=plan, slots=30)
        for drawn in range(12):
            for row, text in enumerate(texts):
                want_V = full_logits(text[: PROMPT_LENGTHS[row] + drawn])[-1]
                np.testing.assert_allclose(np.asarray(logits_BV)[row, : CONFIG.vocab_size], want_V, atol=1e-4)
            assert np.isneginf(np.asarray(logits_BV)[:, CONFIG.vocab_size :]).all()
            token_B = np.array([text[PROMPT_LENGTHS[row] + drawn] for row, text in enumerate(texts)], np.int32)
            logits_BV, cache = step(model.weights, token_B, np.ones(4, bool), cache, plan=plan)
    assert np.abs(want_V).max() > 1  # an error of 1e-4 is small
    if mesh is not None and mesh[1] > 1:
        shape = cache.keys_L[0].sharding.shard_shape(cache.keys_L[0].shape)
        assert shape == (4 // mesh[0], CONFIG.n_head // mesh[1], 30, CONFIG.n_embd // CONFIG.n_head)


@pytest.mark.parametrize("mesh", [None, (8, 1), (2, 4)])
def test_greedy_rows_are_the_argmax_of_full_passes(mesh: tuple[int, int] | None) -> None:
    prompts = random_texts(*PROMPT_LENGTHS)
    rows = decoded(decoder(mesh), prompts, limits=Limits(11), alternatives=3)
    for prompt, row in zip(prompts, rows, strict=True):
        text = list(prompt)
        for token in row:
            logits_V = full_logits(text)[-1]
            log_probs_V = numpy_gpt2.log_softmax(logits_V)
            assert token.id == logits_V.argmax()
            assert token.log_prob == pytest.approx(log_probs_V[token.id], abs=1e-4)
            best = np.argsort(-log_probs_V)[:3]
            assert [id for id, _ in token.alternatives] == best.tolist()
            np.testing.assert_allclose([p for _, p in token.alternatives], log_probs_V[best], atol=1e-4)
            text.append(token.id)
        assert [token.ended for token in row] == [Ended.NOT_YET] * 10 + [Ended.LENGTH]
    assert len({token for row in ids(rows) for token in row}) > 8


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=20, repetition_penalty=1.3)])
def test_a_row_of_a_batch_is_what_its_prompt_gives_alone(sampling: Sampling) -> None:
    model, prompts = decoder(), random_texts(*PROMPT_LENGTHS)
    together = decoded(model, prompts, sampling=sampling, samples=(0, 1), seed=3)
    for number, prompt in enumerate(prompts):
        for sample in (0, 1):
            (alone,) = decoded(model, [prompt], sampling=sampling, samples=(sample,), seed=3)
            row = together[2 * number + sample]
            assert ids([alone]) == ids([row])
            np.testing.assert_allclose([t.log_prob for t in alone], [t.log_prob for t in row], atol=1e-4)


def test_samples_and_seeds_draw_differently() -> None:
    model, prompts = decoder(), random_texts(4)
    first = ids(decoded(model, prompts, sampling=Sampling(), samples=(0, 1), seed=0))
    assert first == ids(decoded(model, prompts, sampling=Sampling(), samples=(0, 1), seed=0))
    assert first[0] != first[1]
    assert first != ids(decoded(model, prompts, sampling=Sampling(), samples=(0, 1), seed=1))


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunks_do_not_matter(chunk: int) -> None:
    model, prompts = decoder(), random_texts(*PROMPT_LENGTHS)
    asked = {"sampling": Sampling(), "limits": Limits(10)}
    assert ids(decoded(model, prompts, **asked, chunk=chunk)) == ids(decoded(model, prompts, **asked, chunk=5))


def test_a_stop_id_ends_its_row_alone() -> None:
    model, prompts = decoder(), random_texts(*PROMPT_LENGTHS)
    free = ids(decoded(model, prompts, limits=Limits(12)))
    stop = free[1][4]
    for row, tokens in enumerate(decoded(model, prompts, limits=Limits(12, stop_ids=(stop, 49)))):
        last = next((place for place, token in enumerate(free[row]) if token in (stop, 49)), 11)
        assert ids([tokens]) == [free[row][: last + 1]]
        assert tokens[-1].ended == (Ended.STOP_ID if free[row][last] in (stop, 49) else Ended.LENGTH)


def test_the_end_of_the_context() -> None:
    prompts = random_texts(20, 24, 2)
    rows = decoded(decoder(), prompts, limits=Limits(100))
    for prompt, row in zip(prompts, rows, strict=True):
        # Every position is read once, and the token after the last one is drawn.
        assert len(prompt) + len(row) == CONFIG.n_positions + 1
        assert [token.ended for token in row] == [Ended.NOT_YET] * (len(row) - 1) + [Ended.CONTEXT]
        text = [*prompt, *(token.id for token in row)]
        assert [full_logits(text[:place])[-1].argmax() for place in range(len(prompt), 25)] == ids([row])[0]


def test_sliding_goes_on_from_the_last_half() -> None:
    prompts = random_texts(20, 3)
    rows = decoded(decoder(), prompts, limits=Limits(45, slide=True), samples=(0, 1))
    for row, tokens in enumerate(rows):
        context = list(prompts[row // 2])
        for token in tokens:
            if len(context) > CONFIG.n_positions:
                context = context[-CONFIG.n_positions // 2 :]
            assert token.id == full_logits(context)[-1].argmax()
            context.append(token.id)
        assert len(tokens) == 45
        assert tokens[-1].ended == Ended.LENGTH


def test_sliding_counts_what_came_before() -> None:
    model, prompts = decoder(), random_texts(22)
    (row,) = ids(
        decoded(model, prompts, sampling=Sampling(temperature=0, presence_penalty=1000), limits=Limits(49, slide=True))
    )
    assert len(set(row)) == 49  # each id once, over three caches


def test_ids_without_text_are_never_drawn() -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS_64)
    model = make_decoder(CONFIG, params, 10)
    rows = decoded(model, random_texts(4), sampling=Sampling(temperature=5.0), limits=Limits(20), samples=range(8))
    assert max(max(row) for row in ids(rows)) < 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(dtype: str) -> None:
    texts = random_texts(12)
    model = decoder(dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.weights["h"][0]["attn"])} == {jnp.dtype(dtype)}
    plan = Plan(model.model, CONFIG.vocab_size)
    logits_BV, cache = prefill(model.weights, padded(texts, 12), np.array([12], np.int32), plan=plan, slots=16)
    assert cache.keys_L[0].dtype == jnp.dtype(dtype)
    want_V = full_logits(texts[0])[-1]
    np.testing.assert_allclose(np.asarray(logits_BV)[0, : CONFIG.vocab_size], want_V, atol=0.1 * np.abs(want_V).max())


def test_float32_on_a_cpu_whatever_the_run_used() -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS_64)
    model = make_decoder(dataclasses.replace(CONFIG, dtype="bfloat16"), params, CONFIG.vocab_size)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.weights)} == {jnp.dtype("float32")}


def test_mixed_prompts_share_few_programs() -> None:
    model = dataclasses.replace(decoder(), vocab_size=40)  # which no other test has compiled for
    begins, advances = begin._cache_size(), advance._cache_size()
    for length in range(1, 17):
        decoded(model, random_texts(length), sampling=Sampling(temperature=0.5 + length), limits=Limits(7), chunk=8)
    assert begin._cache_size() - begins == 1
    assert advance._cache_size() - advances == 1


def compiled_loop(rows: int, slots: int) -> tuple[Any, jax.Array]:
    model = decoder()
    plan = Plan(model.model, CONFIG.vocab_size)
    request = Request(
        key_B=jax.random.split(jax.random.key(0), rows),
        sampling=Sampling(top_k=5).values(CONFIG.vocab_size, padded_vocab_size(CONFIG.vocab_size)),
        stop_ids_N=jnp.array([-1]),
        max_tokens_B=jnp.full(rows, 100),
    )
    prompt = np.ones((rows, 16), np.int32)
    count_B = np.zeros(rows, np.int32)
    state, _ = begin(model.weights, prompt, np.full(rows, 3, np.int32), count_B, None, request, plan=plan, slots=slots)
    return advance.lower(model.weights, state, request, plan=plan, steps=4).compile(), state.cache.keys_L[0]


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_the_compiled_loop_updates_the_cache_in_place(rows: int) -> None:
    compiled, keys = compiled_loop(rows, slots=1040)
    # All arrays of floats in the program, also inside fusions: their shapes and what makes them.
    made = re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text())
    large = {operation for dims, operation in made if math.prod(map(int, dims.split(","))) >= keys.size}
    assert "dynamic-update-slice" in large
    assert not large & {"copy", "transpose"}, large
    # Arrays of the loop's own are smaller than one layer's keys.
    assert compiled.memory_analysis().temp_size_in_bytes < keys.nbytes


def test_the_cache_is_given_away() -> None:
    model = decoder()
    plan = Plan(model.model, CONFIG.vocab_size)
    request = Request(
        key_B=jax.random.split(jax.random.key(0), 1),
        sampling={},
        stop_ids_N=jnp.array([-1]),
        max_tokens_B=jnp.array([100]),
    )
    one = np.ones(1, np.int32)
    state, _ = begin(model.weights, one[None], one, 0 * one, None, request, plan=plan, slots=5)
    before = state.cache.keys_L[1].unsafe_buffer_pointer()
    after, _ = advance(model.weights, state, request, plan=plan, steps=4)
    assert state.cache.keys_L[1].is_deleted()
    assert after.cache.keys_L[1].unsafe_buffer_pointer() == before
