"""nanoGPT's files, against names, shapes and numbers that are written out here, and with Python's own pickle."""

import dataclasses
import hashlib
import json
import pathlib
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from reference import numpy_gpt2
from reference.torch_load import load

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.export import export
from gpt2_jax.exchange.nanogpt import DTYPES, read_nanogpt, write_nanogpt
from gpt2_jax.exchange.plain_pickle import Call, Global, Persistent
from gpt2_jax.exchange.torch_file import StoredTensor, open_torch_file, tensor_in_pickle, write_torch_file
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_characters, tokenizer_from_merges

CHARACTERS = "\n abcdefgé東"
N_LAYER, N_HEAD, WIDTH, POSITIONS, VOCABULARY = 2, 2, 8, 5, len(CHARACTERS)
CONFIG = ModelConfig(
    n_layer=N_LAYER,
    n_head=N_HEAD,
    n_embd=WIDTH,
    n_positions=POSITIONS,
    vocab_size=VOCABULARY,
    embd_pdrop=0.2,
    attn_pdrop=0.2,
    resid_pdrop=0.2,
    activation="gelu_erf",
)
BARE = dataclasses.replace(CONFIG, bias=False)


def reference(config: ModelConfig = CONFIG) -> dict[str, Any]:
    drawn = numpy_gpt2.random_params(
        np.random.default_rng(0),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        padded_vocab_size=-(-config.vocab_size // 128) * 128,
    )

    def without_biases(tree: dict[str, Any]) -> dict[str, Any]:
        return {
            name: without_biases(node) if isinstance(node, dict) else node.astype(np.float32)
            for name, node in tree.items()
            if config.bias or name != "bias"
        }

    return without_biases(drawn)


def bundle(config: ModelConfig = CONFIG, tokenizer: Tokenizer | None = None) -> Bundle:
    return Bundle(config, reference(config), tokenizer or tokenizer_from_characters(CHARACTERS))


def expected(bias: bool = True) -> dict[str, np.ndarray]:
    """The reference's numbers under nanoGPT's names and in its shapes."""
    p = reference()
    named = {
        "transformer.wte.weight": p["wte"]["embedding"][:VOCABULARY],
        "transformer.wpe.weight": p["wpe"]["embedding"],
        "transformer.ln_f.weight": p["ln_f"]["scale"],
        "transformer.ln_f.bias": p["ln_f"]["bias"],
        "lm_head.weight": p["wte"]["embedding"][:VOCABULARY],
    }
    for i in range(N_LAYER):
        h, at = numpy_gpt2.layer(p["h"], i), f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            named[f"{at}{norm}.weight"], named[f"{at}{norm}.bias"] = h[norm]["scale"], h[norm]["bias"]
        kernel = h["attn"]["c_attn"]["kernel"]
        named[f"{at}attn.c_attn.weight"] = np.concatenate([kernel[:, third].T for third in range(3)])
        named[f"{at}attn.c_attn.bias"] = np.concatenate(list(h["attn"]["c_attn"]["bias"]))
        for part, name in (("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            named[f"{at}{part}.{name}.weight"] = h[part][name]["kernel"].T
            named[f"{at}{part}.{name}.bias"] = h[part][name]["bias"]
    biases = {f"transformer.h.{i}.{name}.bias" for i in range(N_LAYER) for name in BIASES} | {"transformer.ln_f.bias"}
    return {name: value for name, value in named.items() if bias or name not in biases}


BIASES = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def assert_same_params(found: Any, params: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("config", [CONFIG, BARE], ids=["biases", "no biases"])
def test_names_and_numbers_of_what_is_written(config: ModelConfig, tmp_path: pathlib.Path) -> None:
    write_nanogpt(tmp_path, bundle(config))
    found = load(tmp_path / "ckpt.pt")
    want = expected(config.bias)
    assert found["model"].keys() == want.keys()
    for name, value in want.items():
        assert found["model"][name].dtype == np.float32
        np.testing.assert_array_equal(found["model"][name], value, err_msg=name, strict=True)
    assert np.shares_memory(found["model"]["lm_head.weight"], found["model"]["transformer.wte.weight"])
    assert found["model_args"] == {
        "n_layer": N_LAYER,
        "n_head": N_HEAD,
        "n_embd": WIDTH,
        "block_size": POSITIONS,
        "bias": config.bias,
        "vocab_size": VOCABULARY,
        "dropout": 0.2,
    }
    assert found["config"] == {"dataset": "gpt2_jax"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "meta.pkl"]


def test_characters_are_written_as_sample_py_reads_them(tmp_path: pathlib.Path) -> None:
    write_nanogpt(tmp_path, bundle())
    assert pickle.loads((tmp_path / "meta.pkl").read_bytes()) == {
        "vocab_size": VOCABULARY,
        "itos": dict(enumerate(CHARACTERS)),
        "stoi": {character: number for number, character in enumerate(CHARACTERS)},
    }


@pytest.mark.parametrize("config", [CONFIG, BARE], ids=["biases", "no biases"])
def test_what_is_written_is_read_bit_by_bit(config: ModelConfig, tmp_path: pathlib.Path) -> None:
    write_nanogpt(tmp_path, bundle(config))
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        found = read_nanogpt(path)
        assert found.config == config
        assert found.tokenizer.fingerprint == tokenizer_from_characters(CHARACTERS).fingerprint
        assert found.facts == {"trained with": "nanoGPT"}
        assert_same_params(found.params, reference(config))
    again = tmp_path / "again"
    again.mkdir()
    write_nanogpt(again, found)
    for name in ("ckpt.pt", "meta.pkl"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype: str, tmp_path: pathlib.Path) -> None:
    write_nanogpt(tmp_path, bundle(), dtype)
    rounded = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    want = jax.tree.map(lambda leaf: leaf.astype(rounded).astype(np.float32), reference())
    assert_same_params(read_nanogpt(tmp_path).params, want)


def test_gpt2s_tokenizer(tmp_path: pathlib.Path, data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    cached = tmp_path / "cache" / hashlib.sha1(url.encode()).hexdigest()
    cached.parent.mkdir()
    shutil.copy(data_dir / "gpt2-bpe" / "vocab.bpe", cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cached.parent))
    tokenizer = make_tokenizer("gpt2")
    folder = tmp_path / "model"
    folder.mkdir()
    for vocab_size in (50257, 50304):
        config = dataclasses.replace(CONFIG, n_layer=1, n_embd=2, vocab_size=vocab_size)
        write_nanogpt(folder, bundle(config, tokenizer))
        assert [path.name for path in folder.iterdir()] == ["ckpt.pt"]
        assert "config" not in load(folder / "ckpt.pt")
        found = read_nanogpt(folder)
        assert found.config == config
        assert found.tokenizer.fingerprint == tokenizer.fingerprint
        assert_same_params(found.params, reference(config))
    with pytest.raises(UsageError, match=r"model.vocab_size=50305 cannot .* gpt2; allowed: 50257 to 50304$"):
        write_nanogpt(folder, bundle(dataclasses.replace(config, vocab_size=50305), tokenizer))


def meta(**changed: Any) -> dict[str, Any]:
    stoi = {character: number for number, character in enumerate(CHARACTERS)}
    return {"vocab_size": VOCABULARY, "itos": {i: c for c, i in stoi.items()}, "stoi": stoi, **changed}


class Checkpoint:
    """What train.py saves, to be changed: tensors and what is put among them, model_args, and the rest."""

    def __init__(self, bias: bool = True) -> None:
        self.tensors: dict[Any, np.ndarray] = expected(bias)
        self.args: dict[Any, Any] = {
            **{"n_layer": N_LAYER, "n_head": N_HEAD, "n_embd": WIDTH, "block_size": POSITIONS},
            **{"bias": bias, "vocab_size": VOCABULARY, "dropout": 0.2},
        }
        self.top: dict[str, Any] = {"iter_num": 5000, "best_val_loss": 1.46973, "config": {"dataset": "x"}}
        self.inserted: dict[str, Any] = {}

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        model = {
            name: tensor_in_pickle(key, value.dtype, value.shape)
            for key, (name, value) in enumerate(self.tensors.items())
        }
        top = {"model": {**model, **self.inserted}, "model_args": self.args, **self.top}
        write_torch_file(folder / "ckpt.pt", top, self.tensors.values())
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta()))
        return folder


def test_what_train_py_saves(tmp_path: pathlib.Path) -> None:
    found = read_nanogpt(Checkpoint().write(tmp_path))
    assert found.config == CONFIG
    assert found.facts == {
        "trained with": "nanoGPT",
        "training": "5,000 steps",
        "best held-out loss": "1.4697 nats per token",
    }
    assert found.tokenizer.characters == CHARACTERS
    assert_same_params(found.params, reference())


def test_what_may_differ(tmp_path: pathlib.Path) -> None:
    """The prefix of torch.compile, causal masks, another type, an output head by itself, no options, a loss tensor."""
    checkpoint = Checkpoint()
    masks = {f"transformer.h.{i}.attn.bias": np.tri(POSITIONS)[None, None] for i in range(N_LAYER)}
    weights = {name: value.astype(np.float64) for name, value in checkpoint.tensors.items()}
    loss = np.array(1.25, np.float32)
    checkpoint.tensors = {f"_orig_mod.{name}": value for name, value in {**weights, **masks}.items()}
    checkpoint.tensors["transformer.h.9.attn.bias"] = loss  # for its storage
    checkpoint.top = {"best_val_loss": tensor_in_pickle(len(checkpoint.tensors) - 1, loss.dtype, ())}
    del checkpoint.args["bias"], checkpoint.args["dropout"]
    found = read_nanogpt(checkpoint.write(tmp_path))
    assert found.config == dataclasses.replace(CONFIG, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    assert found.facts == {"trained with": "nanoGPT", "best held-out loss": "1.2500 nats per token"}
    assert_same_params(found.params, reference())


def change(name: str, value: Any) -> Callable[[Checkpoint], None]:
    def apply(checkpoint: Checkpoint) -> None:
        checkpoint.tensors[name] = value(checkpoint.tensors[name])

    return apply


def with_args(**args: Any) -> Callable[[Checkpoint], None]:
    return lambda checkpoint: checkpoint.args.update(args)


def with_top(**top: Any) -> Callable[[Checkpoint], None]:
    return lambda checkpoint: checkpoint.top.update(top)


def with_one(value: float, dtype: Any = np.float32) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        changed = array.astype(dtype)
        changed.flat[3] = value
        return changed

    return apply


WTE, KERNEL = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"
SYSTEM = Call(Global("os", "system"), ("true",))


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (lambda checkpoint: checkpoint.tensors.pop(KERNEL), f"{KERNEL} missing from the weights"),
        (lambda checkpoint: checkpoint.tensors.pop("lm_head.weight"), "lm_head.weight missing"),
        (lambda checkpoint: checkpoint.tensors.clear(), "and 26 more missing"),
        (lambda checkpoint: checkpoint.tensors.update({"rotary\n": np.ones(2)}), r"'rotary\\n' in the weights"),
        (lambda checkpoint: checkpoint.inserted.update({"5": None}), "5 in the weights"),
        (
            lambda checkpoint: checkpoint.tensors.update({f"_orig_mod.{KERNEL}": checkpoint.tensors[KERNEL]}),
            f"{KERNEL} is there twice",
        ),
        (change(KERNEL, np.transpose), rf"{KERNEL} has another shape than \(32, 8\)"),
        (change(KERNEL, lambda value: value.astype(np.int64)), f"{KERNEL} has type int64; allowed: float64, float32"),
        (change(KERNEL, with_one(np.nan)), f"{KERNEL} has values that are not finite"),
        (change(KERNEL, with_one(1e300, np.float64)), f"{KERNEL} has values that are not finite"),
        (change("lm_head.weight", with_one(7)), f"lm_head.weight differs from {WTE}"),
        (lambda checkpoint: checkpoint.inserted.update({KERNEL: None}), f"{KERNEL} is no tensor"),
        (lambda checkpoint: checkpoint.inserted.update({KERNEL: SYSTEM}), "asks for 'os.system'"),
        (with_top(optimizer=SYSTEM), "asks for 'os.system'"),
        (with_top(model=None), "no dicts model and model_args"),
        (with_top(model_args=()), "no dicts model and model_args"),
        (with_top(iter_num="1"), "iter_num is no integer"),
        (with_top(best_val_loss="1"), "best_val_loss is no tensor"),
        (with_top(best_val_loss=tensor_in_pickle(0, np.dtype("f4"), (VOCABULARY, WIDTH))), "is not one number"),
        (with_args(n_kv_head=1, rope=2), "model_args has n_kv_head, rope, which"),
        (with_args(n_layer=None), "model_args.n_layer is not there"),
        (with_args(n_layer=True), "model_args.n_layer is not there, or no integer"),
        (with_args(n_layer=0), "model_args.n_layer is not there, or no integer"),
        (with_args(vocab_size=2**500), "model_args.vocab_size is not there, or no integer"),
        (with_args(n_layer=3), "and 9 more missing"),
        (with_args(n_layer=10_000), "more missing"),
        (with_args(n_layer=20_000), "model_args: model.n_layer=20000"),
        (with_args(n_head=3), "model_args: model.n_embd=8 is not divisible by model.n_head=3"),
        (with_args(n_embd=16), "has another shape"),
        (with_args(block_size=1024), "wpe.weight has another shape"),
        (with_args(bias=False), "in the weights, which nanoGPT's GPT does not have"),
        (with_args(bias=1), "bias is not true or false"),
        (with_args(dropout=1.0), "dropout is no number"),
        (with_args(dropout=2**2000), "dropout is no number"),
        (with_args(dropout=float("nan")), "dropout is no number"),
        (with_args(vocab_size=50304), r"meta.pkl: 11 characters, where the model beside it has 50304 ids"),
    ],
)
def test_what_is_refused(apply: Callable[[Checkpoint], None], reason: str, tmp_path: pathlib.Path) -> None:
    checkpoint = Checkpoint()
    apply(checkpoint)
    folder = checkpoint.write(tmp_path)
    with pytest.raises(DataError, match=reason) as error:
        read_nanogpt(folder)
    assert str(error.value).startswith((f"{folder / 'ckpt.pt'}: ", f"{folder / 'meta.pkl'}: "))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_model_of_one_value_repeated_is_refused_before_memory_is_taken(tmp_path: pathlib.Path) -> None:
    """A file of kilobytes whose tensors would be gigabytes, all of them views of one small storage."""
    D = 64
    args = {**Checkpoint().args, "n_layer": 2000, "n_embd": D, "n_head": 1, "bias": False}
    kernels = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
    storage = Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 4 * D * D))

    def view(*shape: int) -> Call:
        return Call(
            Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, (shape[-1], 1)[-len(shape) :], False, {})
        )

    model = {WTE: view(VOCABULARY, D), "lm_head.weight": view(VOCABULARY, D)}
    model |= {"transformer.wpe.weight": view(POSITIONS, D), "transformer.ln_f.weight": view(D)}
    for i in range(2000):
        model |= {f"transformer.h.{i}.{norm}.weight": view(D) for norm in ("ln_1", "ln_2")}
        for name, (rows, columns) in kernels.items():
            model[f"transformer.h.{i}.{name}.weight"] = view(rows * D, columns * D)
    Checkpoint().write(tmp_path)
    write_torch_file(tmp_path / "ckpt.pt", {"model": model, "model_args": args}, [np.zeros(4 * D * D, np.float32)])
    with pytest.raises(DataError, match="they share storages"):
        read_nanogpt(tmp_path)


def order(characters: str) -> dict[str, Any]:
    return meta(itos=dict(enumerate(characters)), stoi={c: i for i, c in enumerate(characters)})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not stoi and itos"),
        ({}, "not stoi and itos"),
        (meta(stoi=[]), "not stoi and itos"),
        (meta(itos={}), "not stoi and itos"),
        (meta(itos=dict(enumerate(CHARACTERS[::-1]))), "not stoi and itos"),
        (meta(stoi={"ab": 0}, itos={0: "ab"}), "not stoi and itos between single characters"),
        (meta(stoi={"a": 1}, itos={1: "a"}), "from 0 up"),
        (meta(stoi={"a": 0.0}, itos={0: "a"}), "not stoi and itos"),
        (order(CHARACTERS[::-1]), "sorted, each once"),
        (order(""), "one or more"),
        (order("ab"), "2 characters, where the model beside it has 11 ids"),
        (order("\ud800" + CHARACTERS[1:]), "not UTF-8"),
        (pathlib.PurePosixPath("x"), "asks for|instruction"),
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "asks for 'os.system'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "instruction"),
        (b"", "ends too early"),
        (b" " * 5_000_000, "a pickle of plain values may have"),
    ],
)
def test_characters_that_are_refused(content: Any, reason: str, tmp_path: pathlib.Path) -> None:
    file = Checkpoint().write(tmp_path) / "meta.pkl"
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(DataError, match=reason) as error:
        read_nanogpt(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_characters_that_are_missing(tmp_path: pathlib.Path) -> None:
    (Checkpoint().write(tmp_path) / "meta.pkl").unlink()
    with pytest.raises(DataError, match=r"vocabulary of 11 is not GPT-2's.*copy meta\.pkl from"):
        read_nanogpt(tmp_path)


def test_files_that_are_missing(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "other.pt"):
        with pytest.raises(DataError, match=r"\.pt: no such file"):
            read_nanogpt(path)


MERGED = tokenizer_from_merges(["h e"])


@pytest.mark.parametrize(
    ("changed", "tokenizer", "dtype", "reason"),
    [
        ({}, None, "int8", "dtype=int8; allowed for nanogpt: float32, float16, bfloat16"),
        ({"vocab_size": 257}, make_tokenizer("bytes"), "float32", "tokenizer bytes cannot .* has gpt2 and chars"),
        ({"vocab_size": 258}, MERGED, "float32", "tokenizer bpe:1 cannot .* has gpt2 and chars"),
        ({}, tokenizer_from_characters(CHARACTERS, "nfc"), "float32", "tokenizer.normalization=nfc cannot"),
        ({}, tokenizer_from_characters(CHARACTERS, lowercase=True), "float32", "tokenizer.lowercase=True cannot"),
        ({"vocab_size": 64}, None, "float32", "model.vocab_size=64 cannot .* chars; allowed: 11$"),
        ({"layer_norm_epsilon": 1e-6}, None, "float32", "model.layer_norm_epsilon=1e-06 cannot .* has 1e-05"),
        ({"activation": "gelu_tanh"}, None, "float32", "model.activation=gelu_tanh cannot .*gelu_erf"),
    ],
)
def test_what_nanogpt_cannot_express(
    changed: dict[str, Any], tokenizer: Tokenizer | None, dtype: str, reason: str, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(CONFIG, **changed)
    with pytest.raises(UsageError, match=reason) as error:
        write_nanogpt(tmp_path, bundle(config, tokenizer), dtype)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_other_activation_is_measured_where_it_is_accepted(tmp_path: pathlib.Path) -> None:
    tanh = bundle(dataclasses.replace(CONFIG, activation="gelu_tanh"))
    with pytest.raises(UsageError, match="gelu_tanh"):
        export(tanh, "nanogpt", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    parity = export(tanh, "nanogpt", tmp_path / "out", accept_erf=True)
    assert read_nanogpt(tmp_path / "out").config == CONFIG
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, POSITIONS), np.int32)
    by_tanh, by_erf = (GPT2(config).apply({"params": tanh.params}, tokens) for config in (tanh.config, CONFIG))
    difference = float(np.abs(by_tanh - by_erf).max())
    assert parity.difference == 0
    assert report["erf_difference"] == parity.erf_difference == pytest.approx(difference, rel=0.05)
    assert parity.erf_difference > 1e-5
    assert "| trained with GELU | by tanh |" in (tmp_path / "out" / "README.md").read_text()


def test_a_weight_that_its_type_cannot_hold(tmp_path: pathlib.Path) -> None:
    wrong = bundle()
    wrong.params["ln_f"]["scale"][0] = 1e6
    with pytest.raises(UsageError, match="dtype=float16 cannot hold transformer.ln_f.weight"):
        write_nanogpt(tmp_path, wrong, "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["meta.pkl"]


def test_tensors_are_read_where_they_lie(tmp_path: pathlib.Path) -> None:
    """A kernel that lies transposed in its storage, and a position table that was cropped."""
    checkpoint = Checkpoint()
    wpe = checkpoint.tensors["transformer.wpe.weight"]
    checkpoint.tensors["transformer.wpe.weight"] = np.concatenate([wpe, wpe + 1])
    checkpoint.tensors[KERNEL] = checkpoint.tensors[KERNEL].T
    folder = checkpoint.write(tmp_path)
    with open_torch_file(folder / "ckpt.pt") as opened:
        contents = opened.contents
        values = list(checkpoint.tensors.values())
        for name, shape, stride in (
            ("transformer.wpe.weight", (POSITIONS, WIDTH), (WIDTH, 1)),
            (KERNEL, (4 * WIDTH, WIDTH), (1, 4 * WIDTH)),
        ):
            call = contents["model"][name]
            storage, offset, _, _, *others = call.arguments
            contents["model"][name] = Call(call.function, (storage, offset, shape, stride, *others))
            assert isinstance(opened.tensor(contents["model"][name], name), StoredTensor)
    write_torch_file(folder / "ckpt.pt", contents, values)
    assert_same_params(read_nanogpt(folder).params, reference())
