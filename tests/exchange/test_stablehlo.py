"""Exports to StableHLO, against the model itself and, for the runner, in a process that cannot import the package."""

import dataclasses
import importlib.util
import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from gpt2_jax.config import ModelConfig
from gpt2_jax.decoding.generate import Generator
from gpt2_jax.decoding.settings import Sampling, Stopping
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange import stablehlo_runner
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.stablehlo import read_stablehlo, tokenizer_content, write_stablehlo
from gpt2_jax.model.gpt2 import GPT2, init_params
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("flatbuffers") is None, reason="flatbuffers is not installed")

Runner = Callable[..., tuple[int, str, str]]

CONTEXT = 16
CORPUS = "The cat's hat, the rat's hat: they've 1234 hats  and   they'll say\n\n naïve Grüße 東京 <|endoftext|> " * 4
TEXTS = [
    "",
    "the cat's hat they'll 'S 'stuff don't",
    "  the   hats  \n\n\t x \n",
    "1234 12ab ab12 ½ ² Ⅷ ٣٤ 3.14",
    "Grüße naïve e\u0301 東京 日本語 \u02bcn 'tis",
    "😀👍🏽 \u200d _a_ -- ... !?",
    "\u00a0\u3000x \u2003 y\x1c\x1f\x85z\u2028\u2029 \u200b \ufeff\x0b\x0c",
    "<|endoftext|> the<|endoftext|>",
    "\ud800 lone",
]


def make_bundle(tokenizer: Tokenizer, *, more_ids: int = 0, **changed: Any) -> Bundle:
    """A random model whose parameters are so large that its tokens differ; its biases are not zero."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": CONTEXT, **changed}
    config = ModelConfig(**shape, vocab_size=tokenizer.vocab_size + more_ids)
    params = init_params(GPT2(config), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return Bundle(config, jax.tree.unflatten(tree, leaves), tokenizer, {"trained on": "nothing"})


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return make_tokenizer("bpe:50", texts=lambda: [CORPUS])


@pytest.fixture(scope="module")
def bundle(bpe: Tokenizer) -> Bundle:
    return make_bundle(bpe, more_ids=3)


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("export")
    write_stablehlo(made, bundle)
    return made


def want(bundle: Bundle, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(GPT2(bundle.config).apply({"params": bundle.params}, jnp.asarray(tokens)))


def draw(bundle: Bundle, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, bundle.config.vocab_size, (rows, length), np.int32)


def load(folder: pathlib.Path, name: str) -> export.Exported:
    return export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))


def load_weights(folder: pathlib.Path) -> tuple[np.ndarray, ...]:
    with np.load(folder / "weights.npz", allow_pickle=False) as stored:
        return tuple(stored[name] for name in stored.files)


def run_alone(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """run.py without the environment's paths, where `import gpt2_jax` is an ImportError."""
    code = (
        "import runpy, sys; sys.modules['gpt2_jax'] = None; "
        "sys.argv = ['run.py', *sys.argv[1:]]; runpy.run_path('run.py', run_name='__main__')"
    )
    command = [sys.executable, "-I", "-X", "utf8", "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """run.py's main for a folder and arguments, in this process: exit code, stdout, stderr."""

    def run(folder: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(stablehlo_runner, "FOLDER", folder)
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        code = 0
        try:
            stablehlo_runner.main()
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            code = ended.code
        return code, *capsys.readouterr()

    return run


def test_forward_is_the_model(folder: pathlib.Path, bundle: Bundle) -> None:
    forward = read_stablehlo(folder)
    for rows, length in ((1, 1), (3, 7), (2, CONTEXT)):
        tokens = draw(bundle, rows, length)
        got = forward(tokens)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want(bundle, tokens), rtol=1e-5, atol=1e-5)


def test_the_options_of_other_models(bpe: Tokenizer, tmp_path: pathlib.Path) -> None:
    other = make_bundle(bpe, n_layer=1, activation="gelu_erf", bias=False)
    write_stablehlo(tmp_path, other)
    tokens = draw(other, 2, 5)
    np.testing.assert_allclose(read_stablehlo(tmp_path)(tokens), want(other, tokens), rtol=1e-5, atol=1e-5)


def test_prefill_and_decode_are_the_model(folder: pathlib.Path, bundle: Bundle) -> None:
    tokens, weights = draw(bundle, 3, CONTEXT), load_weights(folder)
    prefill, decode = load(folder, "prefill").call, jax.jit(load(folder, "decode").call)
    lengths = np.array([4, 1, 6], np.int32)
    logits, *cache = prefill(weights, tokens[:, :6], lengths)
    assert cache[0].shape == (2, 3, 2, 6, 8)
    cache = [jnp.pad(stored, [(0, 0)] * 3 + [(0, CONTEXT - 6), (0, 0)]) for stored in cache]
    rows, full = np.arange(3), want(bundle, tokens)
    np.testing.assert_allclose(logits, full[rows, lengths - 1], rtol=1e-5, atol=1e-5)
    for _ in range(CONTEXT - 6):
        logits, *cache = decode(weights, tokens[rows, lengths], lengths, *cache)
        np.testing.assert_allclose(logits, full[rows, lengths], rtol=1e-5, atol=1e-5)
        lengths = lengths + 1


def test_float16(bundle: Bundle, tmp_path: pathlib.Path, runner: Runner) -> None:
    write_stablehlo(tmp_path, bundle, dtype="float16")
    assert {array.dtype for array in load_weights(tmp_path)} == {np.dtype("float16")}
    tokens = draw(bundle, 2, 5)
    got, full = read_stablehlo(tmp_path)(tokens), want(bundle, tokens)
    assert 1e-5 < np.abs(got - full).max() < 0.01 * np.abs(full).max()
    code, out, _ = runner(tmp_path, "--ids", "1,2,3", "--max_new_tokens", "3")
    assert code == 0
    assert out.count(",") == 2


def test_what_is_in_the_folder(folder: pathlib.Path, bundle: Bundle) -> None:
    for name in ("forward", "prefill", "decode"):
        assert set(load(folder, name).platforms) == {"cpu", "cuda", "tpu"}
    model = json.loads((folder / "model.json").read_text())
    with np.load(folder / "weights.npz", allow_pickle=False) as stored:
        assert stored.files == model["weights"]
        assert stored["wte.weight"].shape == (bundle.config.vocab_size, 16)  # no padding
        assert stored["h.1.attn.c_attn.weight"].shape == (16, 48)
    assert model["context"] == CONTEXT
    assert model["end_of_text"] == bundle.tokenizer.end_of_text
    assert model["facts"] == {"trained on": "nothing"}
    assert (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:] == list(bundle.tokenizer.merges)
    runner = (folder / "run.py").read_text(encoding="utf-8")
    assert "gpt2_jax" not in runner
    assert len(runner.splitlines()) < 120


def test_runner_writes_what_the_generator_writes(folder: pathlib.Path, bundle: Bundle) -> None:
    generator, greedy = Generator(bundle.config, bundle.params, bundle.tokenizer), Sampling(temperature=0)
    few, to_the_end = Stopping(max_new_tokens=5), Stopping(max_new_tokens=100)
    (by_ids,) = generator.generate([[1, 2, 3]], sampling=greedy, stopping=to_the_end)
    assert len(by_ids.ids) == CONTEXT - 2
    assert len(set(by_ids.ids)) > 2
    done = run_alone(folder, "--ids", "1,2,3", "--max_new_tokens", "100")
    assert (done.returncode, done.stdout) == (0, ",".join(map(str, by_ids.ids)) + "\n"), done.stderr
    (by_text,) = generator.generate(["the cat's"], sampling=greedy, stopping=few)
    done = run_alone(folder, "--prompt", "the cat's", "--max_new_tokens", "5")
    want_text = (by_text.text + "\n").replace("\r\n", "\n").replace("\r", "\n")  # as a text stream reads it
    assert (done.returncode, done.stdout) == (0, want_text), done.stderr


def test_runner_stops_at_end_of_text(bpe: Tokenizer, tmp_path: pathlib.Path, runner: Runner) -> None:
    bundle = make_bundle(bpe)
    config, params = bundle.config, jax.tree.map(jnp.zeros_like, bundle.params)
    assert bpe.end_of_text is not None
    params["ln_f"]["bias"] = jnp.ones(config.n_embd)
    params["wte"]["embedding"] = params["wte"]["embedding"].at[bpe.end_of_text].set(1.0)
    write_stablehlo(tmp_path, dataclasses.replace(bundle, params=params))
    assert runner(tmp_path, "--ids", "1") == (0, f"{bpe.end_of_text}\n", "")
    assert runner(tmp_path, "--prompt", "") == (0, "\n", "")  # an empty prompt is end-of-text


def test_runner_draws_only_ids_that_have_text(bpe: Tokenizer, tmp_path: pathlib.Path, runner: Runner) -> None:
    bundle = make_bundle(bpe, more_ids=1)
    config, params = bundle.config, jax.tree.map(jnp.zeros_like, bundle.params)
    params["ln_f"]["bias"] = jnp.ones(config.n_embd)
    params["wte"]["embedding"] = params["wte"]["embedding"].at[bpe.vocab_size].set(2.0).at[7].set(1.0)
    write_stablehlo(tmp_path, dataclasses.replace(bundle, params=params))
    assert runner(tmp_path, "--ids", "1", "--max_new_tokens", "2") == (0, "7,7\n", "")


def test_runner_refuses_in_one_line(folder: pathlib.Path, runner: Runner) -> None:
    for arguments, words in (
        (("--prompt", "東" * CONTEXT), f"allowed: 1 to {CONTEXT}"),
        (("--ids", "1,x"), "--ids='1,x'"),
        (("--ids", "1,307"), "0 to 306"),
        (("--max_new_tokens", "0"), "--max_new_tokens=0"),
    ):
        code, out, error = runner(folder, *arguments)
        assert (code, out) == (2, "")
        assert len(error.splitlines()) == 1
        assert words in error


@pytest.mark.parametrize("name", ["bpe:50", "bytes", "chars", "bpe:40 nfkc lower"])
def test_runner_encodes_as_the_tokenizer(name: str) -> None:
    name, *changed = name.split()
    options = {"normalization": "nfkc", "lowercase": True} if changed else {}
    tokenizer = make_tokenizer(name, texts=lambda: [CORPUS, "".join(TEXTS[:-1]), "\ufffd"], **options)
    check_encoding(tokenizer)


def test_runner_encodes_as_gpt2(data_dir: pathlib.Path) -> None:
    folders = {file.parent for name in ("vocab.bpe", "merges.txt") for file in data_dir.rglob(name)}
    check_encoding(make_tokenizer("gpt2", path=str(min(folders))))


def check_encoding(tokenizer: Tokenizer) -> None:
    content = json.loads(json.dumps(tokenizer_content(tokenizer)))
    texts = list(TEXTS)
    if tokenizer.name != "chars":
        drawn = random.Random(0)
        alphabet = "abst'\u2019 \t\n\r\u00a0\u2009\x1c09½٣é東ß\u0301_-.!😀"
        texts += ["".join(drawn.choices(alphabet, k=40)) for _ in range(100)]
    for text in texts:
        ids = stablehlo_runner.encode(text, content)
        assert ids == tokenizer.encode(text).tolist()
        assert b"".join(bytes.fromhex(content["tokens"][number]) for number in ids) == tokenizer.decode_bytes(ids)


def test_runner_refuses_an_unknown_character() -> None:
    content = tokenizer_content(make_tokenizer("chars", texts=lambda: ["abc"]))
    with pytest.raises(ValueError, match="'z' is not among the 3"):
        stablehlo_runner.encode("abz", content)


def test_refuses_other_types(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match="bfloat16.*float32, float16"):
        write_stablehlo(tmp_path, bundle, dtype="bfloat16")
    large = jax.tree.map(lambda leaf: leaf * 1e6, bundle.params)
    with pytest.raises(UsageError, match=r"float16 cannot hold wte\.weight"):
        write_stablehlo(tmp_path, dataclasses.replace(bundle, params=large), dtype="float16")
    assert not list(tmp_path.iterdir())


def test_says_what_to_install(bundle: Bundle, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"gpt2-jax\[stablehlo\]"):
        write_stablehlo(tmp_path, bundle)


def test_read_back_names_a_damaged_folder(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="export again"):
        read_stablehlo(tmp_path)
    write_stablehlo(tmp_path, bundle)
    program = tmp_path / "forward.stablehlo"
    program.write_bytes(program.read_bytes()[:3])
    with pytest.raises(DataError, match="export again"):
        read_stablehlo(tmp_path)
