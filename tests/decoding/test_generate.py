"""Text in, text out: prompts, endings, streams, scores."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt2

import gpt2_jax
from gpt2_jax.config import MeshConfig, ModelConfig
from gpt2_jax.decoding.batch import Batch, Limits
from gpt2_jax.decoding.generate import Completion, Generator
from gpt2_jax.decoding.layout import decoding_mesh, make_decoder
from gpt2_jax.decoding.settings import Sampling, Stopping
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer

# More ids than the tokenizer of bytes has, as in models whose vocabulary was padded.
CONFIG = ModelConfig(n_layer=2, n_head=4, n_embd=32, n_positions=48, vocab_size=300)
BYTES = make_tokenizer("bytes")
GREEDY = Sampling(temperature=0)


def params_64(vocab_size: int) -> dict[str, Any]:
    params = numpy_gpt2.random_params(
        np.random.default_rng(0),
        n_layer=CONFIG.n_layer,
        n_embd=CONFIG.n_embd,
        n_positions=CONFIG.n_positions,
        vocab_size=vocab_size,
        padded_vocab_size=384 if vocab_size > 128 else 128,
    )
    params["wpe"]["embedding"] *= 4
    return params


PARAMS_64 = params_64(CONFIG.vocab_size)


def generator(tokenizer: Tokenizer = BYTES, config: ModelConfig = CONFIG, **asked: Any) -> Generator:
    source = PARAMS_64 if config is CONFIG else params_64(config.vocab_size)
    return Generator(config, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), source), tokenizer, **asked)


GENERATOR = generator()


def log_probs(ids: list[int]) -> np.ndarray:
    """log p(. | ids) after each id, over the ids that have text."""
    logits_TV = numpy_gpt2.logits(
        PARAMS_64,
        np.array([ids]),
        n_head=CONFIG.n_head,
        vocab_size=CONFIG.vocab_size,
        epsilon=CONFIG.layer_norm_epsilon,
    )[0]
    return numpy_gpt2.log_softmax(logits_TV[:, : BYTES.vocab_size])


def one(prompt: str | list[int], sampling: Sampling = GREEDY, **stopping: Any) -> Completion:
    (completion,) = GENERATOR.generate([prompt], sampling=sampling, stopping=Stopping(**stopping))
    return completion


@pytest.mark.smoke
def test_a_completion_tells_all() -> None:
    (completion,) = GENERATOR.generate(
        ["héllo"], sampling=GREEDY, stopping=Stopping(max_new_tokens=12, end_of_text=False), alternatives=2
    )
    text = list("héllo".encode())
    assert completion.prompt_ids == tuple(text)
    for token, log_prob, places in zip(completion.ids, completion.log_probs, completion.alternatives, strict=True):
        want_V = log_probs(text)[-1]
        assert token == want_V.argmax()
        assert log_prob == pytest.approx(want_V[token], abs=1e-4)
        assert [id for id, _ in places] == np.argsort(-want_V)[:2].tolist()
        text.append(token)
    assert completion.text == BYTES.decode(completion.ids)
    assert (completion.finish_reason, completion.stopped_by) == ("length", None)
    assert gpt2_jax.Generator is Generator


def test_prompts_are_texts_or_ids_and_keep_their_order() -> None:
    prompts = ["some text", [7, 8, 9], "ü"]
    found = GENERATOR.generate(prompts, num_samples=2, stopping=Stopping(max_new_tokens=3))
    assert [(c.prompt, c.sample) for c in found] == [(p, s) for p in range(3) for s in range(2)]
    assert [c.prompt_ids for c in found[::2]] == [tuple(b"some text"), (7, 8, 9), tuple("ü".encode())]


@pytest.mark.parametrize("batch_size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 4)), 8])
def test_batches_do_not_matter(batch_size: int) -> None:
    prompts = ["a", "longer than the others", "bc", "d", "ef"]
    asked = {"num_samples": 3, "seed": 5, "stopping": Stopping(max_new_tokens=6)}
    want = GENERATOR.generate(prompts, **asked)
    got = generator(batch_size=batch_size, chunk=3).generate(prompts, **asked)
    assert [c.ids for c in got] == [c.ids for c in want]
    alone = [c.ids for prompt in prompts for c in GENERATOR.generate([prompt], **asked)]
    assert alone == [c.ids for c in want]
    assert len({c.ids for c in want}) == 15


def test_a_mesh_does_not_matter() -> None:
    prompts = ["a", "longer than the others", "bc"]
    asked = {"num_samples": 2, "stopping": Stopping(max_new_tokens=6)}
    mesh = decoding_mesh(MeshConfig(data=2, tensor=4), jax.devices())
    got = generator(mesh=mesh).generate(prompts, **asked)
    assert [c.ids for c in got] == [c.ids for c in GENERATOR.generate(prompts, **asked)]


def test_an_empty_prompt_starts_from_end_of_text() -> None:
    completion = one("", max_new_tokens=4)
    assert completion.prompt_ids == (256,)
    assert completion.ids == one([256], max_new_tokens=4).ids


def test_end_of_text_ends() -> None:
    always = Sampling(logit_bias={256: 1e6})
    completion = one("abc", always, max_new_tokens=9)
    assert (completion.text, completion.ids, completion.finish_reason) == ("", (256,), "end_of_text")
    ignored = one("abc", always, max_new_tokens=3, end_of_text=False)
    assert (ignored.ids, ignored.finish_reason, ignored.text) == ((256,) * 3, "length", "<|endoftext|>" * 3)


def test_a_stop_id_ends() -> None:
    free = one("abc", max_new_tokens=12, end_of_text=False)
    stop = free.ids[5]
    stopped = one("abc", max_new_tokens=12, end_of_text=False, ids=(stop,))
    place = free.ids.index(stop)
    assert (stopped.ids, stopped.finish_reason, stopped.stopped_by) == (free.ids[: place + 1], "stop_id", stop)
    assert stopped.text == BYTES.decode(free.ids[:place])


def test_a_stop_string_over_tokens_ends() -> None:
    ascii_only = {token: -math.inf for token in range(257) if not 97 <= token < 123}
    free = one("abc", Sampling(logit_bias=ascii_only), max_new_tokens=20)
    stop = free.text[7:10]
    stopped = one("abc", Sampling(logit_bias=ascii_only), max_new_tokens=20, strings=("#", stop))
    assert stopped.text == free.text[: free.text.find(stop)]
    assert (stopped.finish_reason, stopped.stopped_by) == ("stop_string", stop)
    assert stopped.ids == free.ids[: free.text.find(stop) + 3]  # with the tokens that made it
    assert len(stopped.log_probs) == len(stopped.alternatives) == len(stopped.ids)


def test_a_stop_string_ends_its_text_alone() -> None:
    ascii_only = Sampling(logit_bias={token: -math.inf for token in range(257) if not 97 <= token < 123})
    free = GENERATOR.generate(["a", "b", "c"], sampling=ascii_only, stopping=Stopping(max_new_tokens=30))
    stop = free[1].text[3:5]
    stopped = GENERATOR.generate(["a", "b", "c"], sampling=ascii_only, stopping=Stopping(30, strings=(stop,)))
    for whole, cut in zip(free, stopped, strict=True):
        assert cut.text == (whole.text[: whole.text.find(stop)] if stop in whole.text else whole.text)


def test_what_is_held_back_comes_at_the_end() -> None:
    only_a = Sampling(logit_bias={token: -math.inf for token in range(257) if token != 97})
    assert one("x", only_a, max_new_tokens=3, strings=("aaaa",)).text == "aaa"


def test_the_end_of_the_context() -> None:
    completion = one("x" * 40, Sampling(), max_new_tokens=100, end_of_text=False)
    assert (len(completion.ids), completion.finish_reason) == (9, "context")  # 48 positions, and the token after
    full = one("x" * 48, max_new_tokens=100)
    assert (len(full.ids), full.finish_reason) == (1, "context")
    slid = one("x" * 40, max_new_tokens=100, end_of_text=False, beyond_context="slide")
    assert (len(slid.ids), slid.finish_reason) == (100, "length")


def test_a_stream_is_the_texts_in_pieces() -> None:
    prompts = ["one", "the other"]
    asked = {"num_samples": 2, "stopping": Stopping(max_new_tokens=20)}
    texts: dict[tuple[int, int], str] = {}
    ends = {}
    for piece in GENERATOR.stream(prompts, **asked):
        key = piece.prompt, piece.sample
        assert key not in ends
        texts[key] = texts.get(key, "") + piece.text
        if piece.completion is not None:
            ends[key] = piece.completion
    assert texts == {key: completion.text for key, completion in ends.items()}
    assert [ends[key] for key in sorted(ends)] == GENERATOR.generate(prompts, **asked)


def test_a_stream_comes_as_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(Batch, "_advance", lambda self, state: begun.append(1) or advance(self, state))
    stream = GENERATOR.stream(["abc"], stopping=Stopping(max_new_tokens=40, end_of_text=False))
    next(stream)
    assert not begun  # the first token before the loop has run
    next(stream)
    assert len(begun) == 1


advance = Batch._advance


def test_score_is_the_sum_of_log_probabilities() -> None:
    text = "höher, weiter"
    ids = list(text.encode())
    score = GENERATOR.score(text)
    want_TV = log_probs([256, *ids])
    want = [want_TV[place, token] for place, token in enumerate(ids)]
    assert score.ids == tuple(ids)
    np.testing.assert_allclose(score.log_probs, want, atol=1e-4)
    assert score.total == pytest.approx(sum(want), abs=1e-3)
    assert list(score.is_greedy) == [want_TV[place].argmax() == token for place, token in enumerate(ids)]
    assert GENERATOR.score(ids) == score
    greedy = one("", max_new_tokens=10, end_of_text=False)
    assert all(GENERATOR.score(greedy.ids).is_greedy)
    np.testing.assert_allclose(GENERATOR.score(greedy.ids).log_probs, greedy.log_probs, atol=1e-4)
    assert GENERATOR.score("").ids == ()
    assert len(GENERATOR.score("x" * 48).ids) == 48


def characters() -> Generator:
    tokenizer = make_tokenizer("chars", texts=lambda: ["abcdefgh "])
    return generator(tokenizer, ModelConfig(n_layer=2, n_head=4, n_embd=32, n_positions=48, vocab_size=9))


def test_a_tokenizer_without_end_of_text() -> None:
    model = characters()
    with pytest.raises(UsageError, match="empty.*chars"):
        model.generate(["a", ""])
    (completion,) = model.generate(["abc"], stopping=Stopping(max_new_tokens=7))
    assert len(completion.text) == 7
    assert len(model.score("abc").ids) == 2  # the first has nothing before it
    assert len(model.score("a" * 49).ids) == 48
    with pytest.raises(UsageError, match="the text has 50 tokens; allowed: 49"):
        model.score("a" * 50)
    assert model.score("") == model.score("a")
    with pytest.raises(DataError, match="'z'"):
        model.generate(["az"])


@pytest.mark.parametrize(
    ("prompts", "asked", "fragments"),
    [
        (["x" * 49], {}, ["the prompt has 49 tokens", "allowed: 48"]),
        (["x" * 49], {"stopping": Stopping(beyond_context="slide")}, ["49 tokens"]),
        ([[1, 257]], {}, ["prompt id 257", "0 to 256"]),
        ([[-1]], {}, ["prompt id -1"]),
        ([[1.5]], {}, ["prompt id 1.5"]),
        (["a"], {"stopping": Stopping(ids=(299,))}, ["stop id 299"]),
        (["a"], {"sampling": Sampling(logit_bias={299: 1.0})}, ["logit_bias of id 299"]),
        (["a"], {"num_samples": 0}, ["num_samples=0"]),
        (["a"], {"seed": -1}, ["seed=-1"]),
        (["a"], {"alternatives": 258}, ["alternatives=258"]),
    ],
)
def test_what_cannot_be_used(prompts: list[Any], asked: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        GENERATOR.stream(prompts, **asked)  # before anything is asked of it
    assert "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_settings_of_the_generator_that_cannot_be_used() -> None:
    for asked, fragment in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"dtype": "int8"}, "dtype=int8"),
        ({"mesh": decoding_mesh(MeshConfig(data=1, tensor=7), jax.devices())}, "n_embd = .*mesh.tensor = 7"),
    ):
        with pytest.raises(UsageError, match=fragment):
            generator(**asked)
    with pytest.raises(UsageError, match="9 devices asked for; 8 here"):
        decoding_mesh(MeshConfig(data=9, tensor=1), jax.devices())
    with pytest.raises(UsageError, match="the text has 49 tokens"):
        GENERATOR.score([1] * 49)


def test_batches_of_any_size_share_programs_by_powers_of_two() -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS_64)
    decoder = make_decoder(CONFIG, params, 257)
    for rows, want in ((1, 1), (2, 2), (3, 4), (5, 8)):
        batch = Batch(decoder, [[1]] * rows, sampling=GREEDY, limits=Limits(2))
        assert len(batch._prompts) == want
        assert {token.row for token in batch} == set(range(rows))
