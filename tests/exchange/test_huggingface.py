"""Reading a Hugging Face folder that is written by hand, against GPT-2 in NumPy float64 over the same numbers."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from reference import numpy_gpt2
from safetensors.numpy import save_file

import gpt2_jax
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.huggingface import is_huggingface, load_huggingface

N_LAYER, N_HEAD, WIDTH, POSITIONS, VOCABULARY = 2, 2, 16, 12, 257 + 3
EPSILON = 1e-5
CONFIG = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "n_layer": N_LAYER,
    "n_head": N_HEAD,
    "n_embd": WIDTH,
    "n_positions": POSITIONS,
    "vocab_size": VOCABULARY,
    "layer_norm_epsilon": EPSILON,
    "torch_dtype": "float32",
}
MERGES = ["h e", "l l", "he ll"]


def reference() -> dict[str, Any]:
    return numpy_gpt2.random_params(
        np.random.default_rng(0),
        n_layer=N_LAYER,
        n_embd=WIDTH,
        n_positions=POSITIONS,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
    )


def tensors(prefix: str = "", dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The reference's numbers under Hugging Face's names, which are written out here once more."""
    p = reference()
    named = {
        "wte.weight": p["wte"]["embedding"],
        "wpe.weight": p["wpe"]["embedding"],
        "ln_f.weight": p["ln_f"]["scale"],
        "ln_f.bias": p["ln_f"]["bias"],
    }
    for i in range(N_LAYER):
        h, at = numpy_gpt2.layer(p["h"], i), f"h.{i}."
        for norm in ("ln_1", "ln_2"):
            named[f"{at}{norm}.weight"], named[f"{at}{norm}.bias"] = h[norm]["scale"], h[norm]["bias"]
        kernel, bias = h["attn"]["c_attn"]["kernel"], h["attn"]["c_attn"]["bias"]
        # Queries, keys and values side by side.
        named[f"{at}attn.c_attn.weight"] = np.concatenate([kernel[:, third] for third in range(3)], axis=1)
        named[f"{at}attn.c_attn.bias"] = np.concatenate(list(bias))
        for part, name in (("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            named[f"{at}{part}.{name}.weight"] = h[part][name]["kernel"]
            named[f"{at}{part}.{name}.bias"] = h[part][name]["bias"]
    return {prefix + name: np.ascontiguousarray(value).astype(dtype) for name, value in named.items()}


def write(
    folder: pathlib.Path, weights: dict[str, np.ndarray] | None = None, config: dict[str, Any] | None = None
) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(tensors("transformer.") if weights is None else weights, folder / "model.safetensors")
    symbols = gpt2_alphabet()
    vocab = {token: number for number, token in enumerate([*symbols, "he", "ll", "hell", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


def gpt2_alphabet() -> list[str]:
    """A printable character for each byte, in GPT-2's order: those that are printable first, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def assert_logits(folder: pathlib.Path, tolerance: float = 1e-5) -> None:
    config, params, _ = load_huggingface(folder)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, POSITIONS))
    want = numpy_gpt2.logits(reference(), tokens, n_head=N_HEAD, vocab_size=VOCABULARY, epsilon=EPSILON)
    got = gpt2_jax.GPT2(config).apply({"params": params}, tokens.astype(np.int32))
    np.testing.assert_allclose(np.asarray(got), want, atol=tolerance * np.abs(want).max())


@pytest.mark.smoke
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_logits_are_those_of_the_reference(tmp_path: pathlib.Path, prefix: str) -> None:
    weights = tensors(prefix)
    weights["lm_head.weight"] = weights[f"{prefix}wte.weight"].copy()
    for layer in range(N_LAYER):  # causal masks of old files
        weights[f"{prefix}h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, POSITIONS, POSITIONS), np.uint8))
        weights[f"{prefix}h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    assert_logits(write(tmp_path / "hf", weights))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float64, 1e-5), (np.float16, 1e-2), (ml_dtypes.bfloat16, 0.1)],
    ids=["f64", "f16", "bf16"],
)
def test_types(tmp_path: pathlib.Path, dtype: Any, tolerance: float) -> None:
    folder = write(tmp_path / "hf", tensors(dtype=dtype))
    assert_logits(folder, tolerance)
    params = load_huggingface(folder)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    stored = tensors(dtype=dtype)["h.1.mlp.c_fc.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["h"]["mlp"]["c_fc"]["kernel"][1], stored)


def sharded(folder: pathlib.Path) -> dict[str, Any]:
    """Moves the tensors into two files and returns the index, which is written too."""
    weights = tensors("transformer.")
    names = sorted(weights)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: weights[name] for name in inside}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, inside in files.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_weights_in_several_files(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "hf")
    sharded(folder)
    assert_logits(folder)


def test_old_names_and_defaults_of_the_config(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "hf", config={"n_ctx": POSITIONS, "n_inner": None, "attn_pdrop": 0, "unknown": 1})
    config = json.loads((folder / "config.json").read_text())
    del config["n_positions"], config["layer_norm_epsilon"]
    (folder / "config.json").write_text(json.dumps(config))
    read = load_huggingface(folder)[0]
    assert (read.n_positions, read.layer_norm_epsilon, read.attn_pdrop, read.embd_pdrop) == (POSITIONS, 1e-5, 0, 0.1)
    assert_logits(folder)


def test_load_takes_such_a_folder(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "hf")
    config, _, tokenizer = gpt2_jax.load(folder)
    assert (config.model.n_layer, config.tokenizer.name, tokenizer.vocab_size) == (N_LAYER, "bpe:3", 260)
    assert tokenizer.encode("hello!").tolist() == [258, 78, 0]
    with pytest.raises(UsageError, match="has no steps"):
        gpt2_jax.load(folder, 3)


def changed(name: str, value: Any) -> Callable[[pathlib.Path], None]:
    return lambda folder: write(folder, config={name: value}) and None


def without(name: str) -> Callable[[pathlib.Path], None]:
    def remove(folder: pathlib.Path) -> None:
        weights = tensors()
        del weights[name]
        write(folder, weights)

    return remove


def with_tensor(name: str, value: np.ndarray) -> Callable[[pathlib.Path], None]:
    return lambda folder: write(folder, {**tensors(), name: value}) and None


def file_with(name: str, content: bytes) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut_weights(folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def pickle_only(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_with(place: str) -> Callable[[pathlib.Path], None]:
    def write_index(folder: pathlib.Path) -> None:
        index = sharded(folder)
        index["weight_map"]["transformer.wte.weight"] = place
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write_index


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (changed("model_type", "llama"), ["config.json", "model_type", "'llama'"]),
        (changed("activation_function", "relu"), ["activation_function", "'relu'", "gelu_new"]),
        (changed("scale_attn_by_inverse_layer_idx", True), ["scale_attn_by_inverse_layer_idx"]),
        (changed("scale_attn_weights", False), ["scale_attn_weights"]),
        (changed("add_cross_attention", True), ["add_cross_attention"]),
        (changed("tie_word_embeddings", False), ["tie_word_embeddings"]),
        (changed("n_inner", 48), ["n_inner", "48", "64"]),
        (changed("n_head", 3), ["config.json", "n_embd=16", "n_head=3"]),
        (changed("n_layer", "2"), ["config.json", "n_layer='2'"]),
        (changed("n_layer", 3), ["h.2.ln_1.weight", "and 9 more", "missing"]),
        (changed("n_layer", 1), ["h.1.", "GPT-2 does not have"]),
        (changed("vocab_size", 0), ["vocab_size"]),
        (changed("vocab_size", 200), ["tokenizer has 260", "vocab_size 200"]),
        (changed("n_positions", 11), ["wpe.weight", "(12, 16)", "(11, 16)"]),
        (without("h.1.mlp.c_fc.bias"), ["h.1.mlp.c_fc.bias", "missing"]),
        (with_tensor("h.0.extra", np.ones(1, np.float32)), ["h.0.extra", "does not have"]),
        (with_tensor("lm_head.weight", np.ones((VOCABULARY, WIDTH), np.float32)), ["lm_head.weight differs"]),
        (with_tensor("ln_f.bias", np.ones(WIDTH, np.int32)), ["ln_f.bias", "I32"]),
        (with_tensor("transformer.ln_f.bias", np.ones(WIDTH, np.float32)), ["ln_f.bias", "twice"]),
        (cut_weights, ["model.safetensors", "not a whole safetensors file"]),
        (file_with("model.safetensors", b"\xff" * 100), ["model.safetensors", "not a whole"]),
        (file_with("config.json", b'{"model_type": "gpt2",'), ["config.json", "not JSON"]),
        (file_with("config.json", b"[1]"), ["config.json", "JSON object"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json", "No such file"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no model.safetensors"]),
        (pickle_only, ["pickle", "safetensors"]),
        (index_with("../model.safetensors"), ["index.json", "'../model.safetensors'", "same folder"]),
        (index_with("/etc/passwd"), ["index.json", "same folder"]),
        (index_with("three.safetensors"), ["three.safetensors", "missing"]),
        (lambda folder: (sharded(folder), file_with("model.safetensors.index.json", b"{}")(folder)), ["weight_map"]),
    ],
)
def test_what_cannot_be_read(
    tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], Any], fragments: list[str]
) -> None:
    folder = write(tmp_path / "hf")
    damage(folder)
    with pytest.raises(DataError) as caught:
        load_huggingface(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in (str(folder), *fragments)), message


def test_what_is_one() -> None:
    assert not is_huggingface(pathlib.Path("/nonexistent"))


def test_a_run_is_none(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert not is_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("no JSON")
    assert not is_huggingface(tmp_path)
