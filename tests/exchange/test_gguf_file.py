"""GGUF files, read with the gguf library itself and against names, shapes and blocks that are written out here."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from reference import numpy_gpt2

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, Gpt2JaxError, UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.gguf_file import GGUF_TYPES, read_gguf, write_gguf
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_merges

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install -e '.[gguf]'")

N_LAYER, N_HEAD, WIDTH, POSITIONS, VOCABULARY = 2, 4, 32, 12, 257 + 3 + 2  # two ids that the tokenizer has not
MERGES = ("h e", "l l", "he ll")
CONFIG = ModelConfig(
    n_layer=N_LAYER,
    n_head=N_HEAD,
    n_embd=WIDTH,
    n_positions=POSITIONS,
    vocab_size=VOCABULARY,
    layer_norm_epsilon=1e-6,
)


def reference(config: ModelConfig = CONFIG) -> dict[str, Any]:
    params = numpy_gpt2.random_params(
        np.random.default_rng(0),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        padded_vocab_size=-(-config.vocab_size // 128) * 128,
    )
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


def bundle(config: ModelConfig = CONFIG, tokenizer: Tokenizer | None = None, **changed: Any) -> Bundle:
    return Bundle(config, changed.get("params", reference(config)), tokenizer or tokenizer_from_merges(MERGES))


def expected() -> dict[str, np.ndarray]:
    """The reference's numbers under GGUF's names and in its shapes."""
    p = reference()
    named = {
        "token_embd.weight": p["wte"]["embedding"][:VOCABULARY],
        "position_embd.weight": p["wpe"]["embedding"],
        "output_norm.weight": p["ln_f"]["scale"],
        "output_norm.bias": p["ln_f"]["bias"],
    }
    for i in range(N_LAYER):
        h, at = numpy_gpt2.layer(p["h"], i), f"blk.{i}."
        for ours, norm in (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")):
            named[f"{at}{norm}.weight"], named[f"{at}{norm}.bias"] = h[ours]["scale"], h[ours]["bias"]
        kernel, bias = h["attn"]["c_attn"]["kernel"], h["attn"]["c_attn"]["bias"]
        named[f"{at}attn_qkv.weight"] = np.concatenate([kernel[:, third].T for third in range(3)])
        named[f"{at}attn_qkv.bias"] = np.concatenate(list(bias))
        for part, ours, name in (
            ("attn", "c_proj", "attn_output"),
            ("mlp", "c_fc", "ffn_up"),
            ("mlp", "c_proj", "ffn_down"),
        ):
            named[f"{at}{name}.weight"], named[f"{at}{name}.bias"] = h[part][ours]["kernel"].T, h[part][ours]["bias"]
    return named


def is_matrix(name: str) -> bool:
    return name == "token_embd.weight" or any(
        name.endswith(f"{part}.weight") for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    )


def written(folder: pathlib.Path, dtype: str) -> pathlib.Path:
    file = folder / f"tiny-{dtype}.gguf"
    write_gguf(file, bundle(), dtype)
    return file


def test_biases_that_are_not_there_are_zeros(tmp_path: pathlib.Path) -> None:
    bare = {  # the reference without its biases
        "wte": reference()["wte"],
        "wpe": reference()["wpe"],
        "h": {
            **{norm: {"scale": reference()["h"][norm]["scale"]} for norm in ("ln_1", "ln_2")},
            **{
                part: {name: {"kernel": leaves["kernel"]} for name, leaves in reference()["h"][part].items()}
                for part in ("attn", "mlp")
            },
        },
        "ln_f": {"scale": reference()["ln_f"]["scale"]},
    }
    config = dataclasses.replace(CONFIG, bias=False)
    write_gguf(tmp_path / "bare.gguf", bundle(config, params=bare), "float32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "bare.gguf").tensors}
    for name, value in expected().items():
        zero = name.endswith(".bias")
        np.testing.assert_array_equal(found[name], np.zeros_like(value) if zero else value, err_msg=name)


@pytest.mark.parametrize("dtype", GGUF_TYPES)
def test_tensors(tmp_path: pathlib.Path, dtype: str) -> None:
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(written(tmp_path, dtype)).tensors}
    wanted = expected()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        tensor = found[name]
        assert tuple(tensor.shape[::-1]) == value.shape, name
        ours = dtype if is_matrix(name) else "float32"
        assert tensor.tensor_type.name == {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}[ours], name
        if ours == "float32":
            np.testing.assert_array_equal(tensor.data, value)
        elif ours == "float16":
            np.testing.assert_array_equal(tensor.data, value.astype(np.float16))
        else:  # blocks of 32: a float16 scale, then as many int8
            blocks = np.ascontiguousarray(tensor.data).reshape(-1, 34)
            scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
            whole = blocks[:, 2:].copy().view(np.int8).astype(np.float64)
            exact = value.astype(np.float64).reshape(-1, 32)
            step = np.abs(exact).max(axis=1, keepdims=True) / 127
            np.testing.assert_allclose(scale, step, rtol=2.0**-11)
            # Half a step, and what rounding the scale to float16 moves the value by.
            assert (np.abs(whole * scale - exact) <= step * (0.5 + 1e-6) + np.abs(whole) * step * 2.0**-11).all()
            assert np.abs(whole).max() == 127


def test_float32_comes_back_bit_for_bit(tmp_path: pathlib.Path) -> None:
    config, params = read_gguf(written(tmp_path, "float32"))
    shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "layer_norm_epsilon")
    assert all(getattr(config, name) == getattr(CONFIG, name) for name in shape)
    assert jax.tree.structure(params) == jax.tree.structure(reference())
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(reference()), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2.0**-11), ("q8_0", 0.5 / 127 + 2.0**-11)])
def test_smaller_types_come_back_near(tmp_path: pathlib.Path, dtype: str, tolerance: float) -> None:
    params = read_gguf(written(tmp_path, dtype))[1]
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(reference()), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=1.001 * tolerance * np.abs(want).max())
    assert not np.array_equal(params["wte"]["embedding"], reference()["wte"]["embedding"])
    np.testing.assert_array_equal(params["wpe"]["embedding"], reference()["wpe"]["embedding"])


@pytest.mark.parametrize(("dtype", "file_type"), [("float32", 0), ("float16", 1), ("q8_0", 7)])
def test_metadata(tmp_path: pathlib.Path, dtype: str, file_type: int) -> None:
    fields = gguf.GGUFReader(written(tmp_path, dtype)).fields
    found = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    symbols = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in symbols] + [chr(256 + i) for i in range(256 - len(symbols))]
    assert found.pop("gpt2.attention.layer_norm_epsilon") == np.float32(1e-6)
    assert found == {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": f"tiny-{dtype}",
        "general.file_type": file_type,
        **({"general.quantization_version": 2} if dtype == "q8_0" else {}),
        "gpt2.vocab_size": VOCABULARY,
        "gpt2.context_length": POSITIONS,
        "gpt2.embedding_length": WIDTH,
        "gpt2.feed_forward_length": 4 * WIDTH,
        "gpt2.block_count": N_LAYER,
        "gpt2.attention.head_count": N_HEAD,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*alphabet, "he", "ll", "hell", "<|endoftext|>", "[PAD260]", "[PAD261]"],
        "tokenizer.ggml.token_type": [1] * 259 + [3] + [5] * 2,  # normal, control, unused
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.eos_token_id": 259,
        "tokenizer.ggml.add_bos_token": False,
    }


def tokenizer_with(**changes: Any) -> Tokenizer:
    return dataclasses.replace(tokenizer_from_merges(MERGES), **changes)


def learned_characters() -> Tokenizer:
    return make_tokenizer("chars", texts=lambda: ["abc"])


def with_activation(activation: str) -> ModelConfig:
    config = dataclasses.replace(CONFIG)
    object.__setattr__(config, "activation", activation)
    return config


def large_value(where: tuple[str, ...], value: float) -> dict[str, Any]:
    params = reference()
    node: Any = params
    for name in where:
        node = node[name]
    node[(0,) * node.ndim] = value
    return params


@pytest.mark.parametrize(
    ("made", "dtype", "fragments"),
    [
        (lambda: bundle(tokenizer=tokenizer_with(normalization="nfc")), "float16", ["normalization=nfc", "none"]),
        (lambda: bundle(tokenizer=tokenizer_with(lowercase=True)), "float16", ["lowercase=True", "another format"]),
        (lambda: bundle(tokenizer=make_tokenizer("bytes")), "float16", ["tokenizer bytes", "bpe:N"]),
        (lambda: bundle(tokenizer=learned_characters()), "float16", ["tokenizer chars", "bpe:N"]),
        (lambda: bundle(with_activation("relu")), "float16", ["model.activation=relu", "gelu_tanh"]),
        (lambda: bundle(dataclasses.replace(CONFIG, n_embd=48)), "q8_0", ["n_embd=48", "32", "float16"]),
        (bundle, "bfloat16", ["'bfloat16'", *GGUF_TYPES]),
        (
            lambda: bundle(params=large_value(("h", "mlp", "c_fc", "kernel"), -7e4)),
            "float16",
            ["h.0.mlp.c_fc.weight", "70000", "write float32"],
        ),
        (lambda: bundle(params=large_value(("wte", "embedding"), 1e7)), "q8_0", ["wte.weight", "1e+07"]),
    ],
)
def test_what_gguf_cannot_express(
    tmp_path: pathlib.Path, made: Callable[[], Bundle], dtype: str, fragments: list[str]
) -> None:
    refused(tmp_path, made(), dtype, UsageError, fragments)


def test_tokenizer_of_another_model(tmp_path: pathlib.Path) -> None:
    made = bundle(dataclasses.replace(CONFIG, vocab_size=259))
    refused(tmp_path, made, "float16", DataError, ["260 ids", "259", "do not belong together"])


def refused(folder: pathlib.Path, made: Bundle, dtype: str, error: type[Gpt2JaxError], fragments: list[str]) -> None:
    file = folder / "model.gguf"
    file.write_bytes(b"before")
    with pytest.raises(error) as caught:
        write_gguf(file, made, dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in fragments), message
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("model.gguf", b"before")]


def test_values_that_only_float32_holds(tmp_path: pathlib.Path) -> None:
    for where, value, dtype in ((("h", "mlp", "c_fc", "kernel"), 1e7, "float32"), (("ln_f", "scale"), 1e7, "float16")):
        write_gguf(tmp_path / "model.gguf", bundle(params=large_value(where, value)), dtype)


def test_folder_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_gguf(tmp_path / "nowhere" / "model.gguf", bundle())


def test_without_the_library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install 'gpt2-jax\[gguf\]'"):
        write_gguf(tmp_path / "model.gguf", bundle())
    with pytest.raises(UsageError, match=r"pip install 'gpt2-jax\[gguf\]'"):
        read_gguf(tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_anywhere(tmp_path: pathlib.Path) -> None:
    whole = written(tmp_path, "float16").read_bytes()
    cut = tmp_path / "cut.gguf"
    # The last 32 bytes may be padding after the last tensor.
    for size in [0, 3, 4, 9, 20, 30, *range(100, len(whole) - 32, len(whole) // 40), len(whole) - 33]:
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cut.gguf: ") as caught:
            read_gguf(cut)
        assert "\n" not in str(caught.value)


def foreign(file: pathlib.Path, architecture: str = "gpt2", **changes: Any) -> None:
    """A file with all of GPT-2's metadata and the tensors of `changes`."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(changes.get("width", WIDTH))
    writer.add_block_count(N_LAYER)
    writer.add_head_count(N_HEAD)
    if changes.get("epsilon", True):
        writer.add_layer_norm_eps(1e-5)
    for name, value in {**expected(), **changes.get("tensors", {})}.items():
        if value is not None:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda file: foreign(file, "llama"), ["'llama'", "only gpt2"]),
        (lambda file: foreign(file, epsilon=False), ["gpt2.attention.layer_norm_epsilon is None", "float"]),
        (lambda file: foreign(file, width=30), ["n_embd=30", "n_head=4"]),
        (lambda file: foreign(file, width=64), ["token_embd.weight", "(262, 32)", "(262, 64)"]),
        (lambda file: foreign(file, tensors={"blk.1.ffn_up.bias": None}), ["blk.1.ffn_up.bias is missing"]),
        (
            lambda file: foreign(file, tensors={"output.weight": np.ones((VOCABULARY, WIDTH), np.float32)}),
            ["output.weight", "does not have"],
        ),
        (
            lambda file: foreign(file, tensors={"output_norm.bias": np.ones(WIDTH, np.int32)}),
            ["output_norm.bias has type I32", "F32, F16, Q8_0"],
        ),
        (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(100)), ["not a whole GGUF file"]),
        (lambda file: None, ["cannot be read", "No such file"]),
        (lambda file: file.mkdir(), ["cannot be read"]),
    ],
)
def test_foreign_files(tmp_path: pathlib.Path, make: Callable[[pathlib.Path], Any], fragments: list[str]) -> None:
    file = tmp_path / "foreign.gguf"
    make(file)
    with pytest.raises(DataError) as caught:
        read_gguf(file)
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in (str(file), *fragments)), message


def test_a_file_of_another_hand(tmp_path: pathlib.Path) -> None:
    foreign(tmp_path / "model.gguf")
    params = read_gguf(tmp_path / "model.gguf")[1]
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(reference()), strict=True):
        np.testing.assert_array_equal(got, want)
