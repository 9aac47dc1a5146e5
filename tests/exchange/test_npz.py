"""The archive as NumPy sees it, and archives that NumPy writes."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from tiny_run import assert_identical

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.export import import_bundle
from gpt2_jax.exchange.npz import write_npz
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.tokenizer import make_tokenizer, tokenizer_from_characters

D = 4
CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=D, n_positions=3, vocab_size=6)
# Written out by hand.
SHAPES = {
    "wte.weight": (6, 4),
    "wpe.weight": (3, 4),
    "ln_f.weight": (4,),
    "ln_f.bias": (4,),
    "h.0.ln_1.weight": (4,),
    "h.0.ln_1.bias": (4,),
    "h.0.attn.c_attn.weight": (4, 12),
    "h.0.attn.c_attn.bias": (12,),
    "h.0.attn.c_proj.weight": (4, 4),
    "h.0.attn.c_proj.bias": (4,),
    "h.0.ln_2.weight": (4,),
    "h.0.ln_2.bias": (4,),
    "h.0.mlp.c_fc.weight": (4, 16),
    "h.0.mlp.c_fc.bias": (16,),
    "h.0.mlp.c_proj.weight": (16, 4),
    "h.0.mlp.c_proj.bias": (4,),
    "h.1.ln_1.weight": (4,),
    "h.1.ln_1.bias": (4,),
    "h.1.attn.c_attn.weight": (4, 12),
    "h.1.attn.c_attn.bias": (12,),
    "h.1.attn.c_proj.weight": (4, 4),
    "h.1.attn.c_proj.bias": (4,),
    "h.1.ln_2.weight": (4,),
    "h.1.ln_2.bias": (4,),
    "h.1.mlp.c_fc.weight": (4, 16),
    "h.1.mlp.c_fc.bias": (16,),
    "h.1.mlp.c_proj.weight": (16, 4),
    "h.1.mlp.c_proj.bias": (4,),
}


def make_params(bias: bool = True) -> Params:
    """Every number another; the token table has 122 rows of padding, which are zero."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def projection(inputs: int, *outputs: int) -> Params:
        return {"kernel": draw(2, inputs, *outputs), **({"bias": draw(2, *outputs)} if bias else {})}

    def norm(*stack: int) -> Params:
        return {"scale": draw(*stack, D), **({"bias": draw(*stack, D)} if bias else {})}

    return {
        "wte": {"embedding": np.concatenate([draw(6, D), np.zeros((122, D), np.float32)])},
        "wpe": {"embedding": draw(3, D)},
        "ln_f": norm(),
        "h": {
            "ln_1": norm(2),
            "attn": {"c_attn": projection(D, 3, D), "c_proj": projection(D, D)},
            "ln_2": norm(2),
            "mlp": {"c_fc": projection(D, 4 * D), "c_proj": projection(4 * D, D)},
        },
    }


BUNDLE = Bundle(CONFIG, make_params(), tokenizer_from_characters("abcd\u00e9"), {})


def load(folder: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(folder / "model.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def test_names_and_shapes(tmp_path: pathlib.Path) -> None:
    write_npz(tmp_path, BUNDLE)
    stored = load(tmp_path)
    assert {name: value.shape for name, value in stored.items()} == SHAPES
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float32)}


def test_each_value_is_where_it_should_be(tmp_path: pathlib.Path) -> None:
    write_npz(tmp_path, BUNDLE)
    stored, h = load(tmp_path), BUNDLE.params["h"]
    want = {
        "wte.weight": BUNDLE.params["wte"]["embedding"][:6],
        "wpe.weight": BUNDLE.params["wpe"]["embedding"],
        "ln_f.weight": BUNDLE.params["ln_f"]["scale"],
        "ln_f.bias": BUNDLE.params["ln_f"]["bias"],
    }
    for layer in (0, 1):
        at = f"h.{layer}."
        for third in range(3):  # queries, keys, values
            columns = slice(third * D, (third + 1) * D)
            kernel, bias = (h["attn"]["c_attn"][part][layer, ..., third, :] for part in ("kernel", "bias"))
            np.testing.assert_array_equal(stored[f"{at}attn.c_attn.weight"][:, columns], kernel)
            np.testing.assert_array_equal(stored[f"{at}attn.c_attn.bias"][columns], bias)
        for norm in ("ln_1", "ln_2"):
            want |= {f"{at}{norm}.weight": h[norm]["scale"][layer], f"{at}{norm}.bias": h[norm]["bias"][layer]}
        for part, name in (("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            want[f"{at}{part}.{name}.weight"] = h[part][name]["kernel"][layer]
            want[f"{at}{part}.{name}.bias"] = h[part][name]["bias"][layer]
    assert {*want, *(f"h.{layer}.attn.c_attn.{part}" for layer in (0, 1) for part in ("weight", "bias"))} == {*SHAPES}
    for name, value in want.items():
        np.testing.assert_array_equal(stored[name], value, err_msg=name)


def test_half_precision_is_numpys(tmp_path: pathlib.Path) -> None:
    write_npz(tmp_path, BUNDLE, "float16")
    stored = load(tmp_path)
    assert stored["wpe.weight"].tobytes() == BUNDLE.params["wpe"]["embedding"].astype(np.float16).tobytes()
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float16)}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    read = import_bundle("npz", tmp_path).params
    assert_identical(read, jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), BUNDLE.params))


def test_what_is_written_is_read_bit_by_bit(tmp_path: pathlib.Path) -> None:
    write_npz(tmp_path, BUNDLE)
    read = import_bundle("npz", str(tmp_path))
    assert_identical(read.params, BUNDLE.params)
    assert read.config == CONFIG
    assert (read.tokenizer.characters, read.tokenizer.fingerprint) == ("abcd\u00e9", BUNDLE.tokenizer.fingerprint)


def test_options_of_the_model(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, bias=False, activation="gelu_erf", layer_norm_epsilon=1e-6, attn_pdrop=0.25)
    write_npz(tmp_path, Bundle(config, make_params(bias=False), BUNDLE.tokenizer, {}))
    assert {*load(tmp_path)} == {name for name in SHAPES if not name.endswith("bias")}
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["activation_function"], fields["gpt2_jax_bias"], fields["n_positions"]) == ("gelu", False, 3)
    read = import_bundle("npz", tmp_path)
    assert read.config == config
    assert_identical(read.params, make_params(bias=False))


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.astype(np.float64),
        lambda value: value.astype(">f4"),
        np.asfortranarray,
    ],
    ids=["float64", "big-endian", "Fortran order"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_that_others_save(
    tmp_path: pathlib.Path, save: Callable[..., None], change: Callable[[np.ndarray], np.ndarray]
) -> None:
    write_npz(tmp_path, BUNDLE)
    save(tmp_path / "model.npz", **{name: change(value) for name, value in load(tmp_path).items()})
    assert_identical(import_bundle("npz", tmp_path).params, BUNDLE.params)


def test_compressed_padding_is_no_bomb(tmp_path: pathlib.Path) -> None:
    """Zeros are packed a thousand to one; what decides is what the shapes say."""
    tokenizer = make_tokenizer("bytes")
    config = ModelConfig(n_layer=1, n_head=1, n_embd=256, n_positions=4, vocab_size=257)
    zeros = Bundle(config, jax.tree.map(np.asarray, zero_params(config)), tokenizer, {})
    write_npz(tmp_path, zeros)
    np.savez_compressed(tmp_path / "model.npz", **load(tmp_path))
    assert (tmp_path / "model.npz").stat().st_size < 20_000
    assert_identical(import_bundle("npz", tmp_path).params, zeros.params)


def zero_params(config: ModelConfig) -> Params:
    width, layers = config.n_embd, config.n_layer

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def norm(*stack: int) -> Params:
        return {"scale": zeros(*stack, width), "bias": zeros(*stack, width)}

    def projection(inputs: int, *outputs: int) -> Params:
        return {"kernel": zeros(layers, inputs, *outputs), "bias": zeros(layers, *outputs)}

    return {
        "wte": {"embedding": zeros(384, width)},
        "wpe": {"embedding": zeros(config.n_positions, width)},
        "ln_f": norm(),
        "h": {
            "ln_1": norm(layers),
            "attn": {"c_attn": projection(width, 3, width), "c_proj": projection(width, width)},
            "ln_2": norm(layers),
            "mlp": {"c_fc": projection(width, 4 * width), "c_proj": projection(4 * width, width)},
        },
    }


def test_a_value_too_large_for_half_precision(tmp_path: pathlib.Path) -> None:
    params = make_params()
    params["h"]["mlp"]["c_fc"]["kernel"][1, 2, 3] = 70_000
    with pytest.raises(UsageError, match=r"dtype=float16 cannot hold h\.1\.mlp\.c_fc\.weight.*7e\+04"):
        write_npz(tmp_path, dataclasses.replace(BUNDLE, params=params), "float16")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match="--from=onnx; allowed: npz"):
        import_bundle("onnx", tmp_path)
