"""Exporting a model: every format, what is left behind, and that nothing is where something went wrong."""

import dataclasses
import errno
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from reference import numpy_gpt2
from safetensors.numpy import load_file, save_file
from tiny_run import assert_identical, contents

import gpt2_jax
from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.export import FORMATS, Parity, export, import_bundle
from gpt2_jax.exchange.tokenizer_json import write_tokenizer
from gpt2_jax.model.gpt2 import GPT2, init_params
from gpt2_jax.run.bundle import load_bundle
from gpt2_jax.tokenizer import Tokenizer, tokenizer_from_characters, tokenizer_from_merges

MERGES = ["h e", "l l", "he ll"]
FACTS = {"data": "text:tales.txt", "training": "7 steps", "held-out loss": "1.2345 nats | per token"}
NEEDS = {"gguf": "gguf", "stablehlo": "flatbuffers"}
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make_bundle(tokenizer: Tokenizer, **options: Any) -> Bundle:
    """Parameters that are far from those at the start, biases that are not zero."""
    size = tokenizer.vocab_size + 3 * bool(tokenizer.merges)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 8, **options}
    config = ModelConfig(**shape, vocab_size=size)
    shapes = jax.eval_shape(lambda: init_params(GPT2(config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    params["wte"]["embedding"][size:] = 0
    return Bundle(config, params, tokenizer, FACTS)


def byte_pairs(**options: Any) -> Bundle:
    return make_bundle(tokenizer_from_merges(MERGES), **options)


def characters(**options: Any) -> Bundle:
    return make_bundle(tokenizer_from_characters(" abc\u00e9"), **options)


def changed(bundle: Bundle, value: float) -> Bundle:
    """Another value in one weight of the second layer."""
    params = jax.tree.map(np.copy, bundle.params)
    params["h"]["mlp"]["c_proj"]["kernel"][1, 5, 6] = value
    return dataclasses.replace(bundle, params=params)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *(("huggingface", dtype) for dtype in STORED),
        *(("npz", dtype) for dtype in ("float32", "float16")),
        *(("nanogpt", dtype) for dtype in STORED),
        *(("gguf", dtype) for dtype in ("float32", "float16", "q8_0")),
        *(("stablehlo", dtype) for dtype in ("float32", "float16")),
    ],
)
def test_every_format(tmp_path: pathlib.Path, form: str, dtype: str) -> None:
    if importlib.util.find_spec(NEEDS.get(form, "numpy")) is None:
        pytest.skip(f"{NEEDS[form]} is not installed")
    bundle = characters(activation="gelu_erf") if form == "nanogpt" else byte_pairs(n_embd=32)
    out = tmp_path / "out"
    parity = export(bundle, form, out, dtype)
    assert parity.difference <= parity.allowed < 0.2 * parity.spread
    assert dtype == "float32" or parity.difference > parity.allowed / 100  # the bound is near what rounding does
    if dtype == "float32" and form != "stablehlo":
        assert parity.difference == 0
    report = json.loads((out / "export.json").read_text())
    assert (report["format"], report["dtype"]) == (form, dtype)
    assert Parity(*(report[name] for name in ("difference", "allowed", "spread", "erf_difference"))) == parity
    assert report["prompt"] == "numpy.random.default_rng(0).integers(0, vocab_size, n_positions)"
    card = (out / "README.md").read_text()
    for row in ("| data | text:tales.txt |", "| training | 7 steps |", r"| held-out loss | 1.2345 nats \| per token |"):
        assert row in card
    assert f"GPT-2, 2 layers, 2 heads, width {bundle.config.n_embd}" in card
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_every_format_is_tested() -> None:
    (mark,) = test_every_format.pytestmark  # type: ignore[attr-defined]
    assert {form for form, _ in mark.args[1]} == FORMATS.keys()


def test_the_parity_is_that_of_the_logits(tmp_path: pathlib.Path) -> None:
    """By GPT-2 in NumPy float64, with the weights rounded by hand."""
    bundle = byte_pairs()
    parity = export(bundle, "huggingface", tmp_path / "out", "bfloat16")
    tokens = np.random.default_rng(0).integers(0, bundle.config.vocab_size, (1, bundle.config.n_positions))
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), bundle.params)
    ours, theirs = (
        numpy_gpt2.logits(params, tokens, n_head=2, vocab_size=bundle.config.vocab_size, epsilon=1e-5)
        for params in (bundle.params, rounded)
    )
    assert parity.difference == pytest.approx(np.abs(ours - theirs).max(), rel=1e-2)
    spread = np.abs(ours - ours.mean(axis=-1, keepdims=True)).max()
    assert parity.spread == pytest.approx(spread, rel=1e-4)
    assert parity.allowed == pytest.approx(0.1 * spread, rel=1e-4)


def test_the_tolerance_is_not_of_what_all_logits_have_in_common(tmp_path: pathlib.Path) -> None:
    """OpenAI's logits are all far below zero; what is far from zero must not hide what is wrong."""
    bundle = byte_pairs()
    near = export(bundle, "huggingface", tmp_path / "near", "bfloat16")
    params = jax.tree.map(np.array, bundle.params)
    for value in (params["wte"]["embedding"], params["ln_f"]["scale"]):
        value[..., 0] = 0
    params["wte"]["embedding"][:263, 0] = 1
    params["ln_f"]["bias"][0] = -100  # to each logit
    far = export(dataclasses.replace(bundle, params=params), "huggingface", tmp_path / "far", "bfloat16")
    assert far.allowed < 2 * near.allowed


def test_huggingface_bit_by_bit(tmp_path: pathlib.Path) -> None:
    bundle = byte_pairs()
    export(bundle, "huggingface", tmp_path / "first")
    config, params, tokenizer = gpt2_jax.load(tmp_path / "first")
    assert_identical(params, bundle.params)
    assert (config.model, tokenizer.fingerprint) == (bundle.config, bundle.tokenizer.fingerprint)
    export(Bundle(config.model, params, tokenizer, {}), "huggingface", tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert_identical(second, first)
    assert first["transformer.wte.weight"].shape == (263, 16)  # without the rows of padding
    kernel = bundle.params["h"]["attn"]["c_attn"]["kernel"]
    np.testing.assert_array_equal(first["transformer.h.1.attn.c_attn.weight"][:, 16:32], kernel[1, :, 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_numpys(tmp_path: pathlib.Path, dtype: str) -> None:
    bundle = changed(byte_pairs(), 1 + 2**-8 + 2**-12)  # just above half way for bfloat16
    FORMATS["huggingface"].write(tmp_path, bundle, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {np.dtype(STORED[dtype])}
    for layer in range(2):
        want = bundle.params["h"]["mlp"]["c_proj"]["kernel"][layer].astype(STORED[dtype])
        assert stored[f"transformer.h.{layer}.mlp.c_proj.weight"].tobytes() == want.tobytes()
    if dtype == "bfloat16":
        assert float(stored["transformer.h.1.mlp.c_proj.weight"][5, 6]) == 1 + 2**-7


@pytest.mark.parametrize("options", [{"bias": False}, {"activation": "gelu_erf"}], ids=["no biases", "gelu_erf"])
@pytest.mark.parametrize("form", ["huggingface", "npz"])
def test_options_of_the_model(tmp_path: pathlib.Path, form: str, options: dict[str, Any]) -> None:
    bundle = byte_pairs(**options)
    assert export(bundle, form, tmp_path / "out").difference == 0
    if form == "npz":
        read = import_bundle("npz", tmp_path / "out")
        config, params = read.config, read.params
    else:
        loaded, params, _ = gpt2_jax.load(tmp_path / "out")
        config = loaded.model
        if not config.bias:  # transformers has them
            stored = load_file(tmp_path / "out" / "model.safetensors")
            assert stored["transformer.h.1.mlp.c_fc.bias"].shape == (64,)
            assert not stored["transformer.h.1.mlp.c_fc.bias"].any()
    assert config == bundle.config
    assert_identical(params, bundle.params)


def test_from_npz_to_huggingface(tmp_path: pathlib.Path) -> None:
    bundle = characters()
    export(bundle, "npz", tmp_path / "npz")
    export(import_bundle("npz", tmp_path / "npz"), "huggingface", tmp_path / "hf")
    _, params, tokenizer = gpt2_jax.load(tmp_path / "hf")
    assert_identical(params, bundle.params)
    assert tokenizer.characters == bundle.tokenizer.characters


@pytest.mark.parametrize("form", ["huggingface", "npz"])
def test_a_value_too_large_for_the_type(tmp_path: pathlib.Path, form: str) -> None:
    with pytest.raises(UsageError, match=r"dtype=float16 cannot hold h\.1\.mlp\.c_proj\.weight"):
        export(changed(byte_pairs(), 1e5), form, tmp_path / "out", "float16")
    assert list(tmp_path.iterdir()) == []


def damage_huggingface(folder: pathlib.Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["transformer.h.1.mlp.c_fc.weight"][3, 4] += 0.1
    save_file(stored, folder / "model.safetensors")


def damage_npz(folder: pathlib.Path) -> None:
    with np.load(folder / "model.npz") as archive:
        stored = {name: archive[name] for name in archive.files}
    stored["wte.weight"][262, 0] += 0.1
    np.savez(folder / "model.npz", **stored)


def cut_weights(folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def full_disk(folder: pathlib.Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.safetensors"))


def after_writing(monkeypatch: pytest.MonkeyPatch, form: str, damage: Callable[[pathlib.Path], None]) -> None:
    """What the format has written is damaged before it is read back."""
    right = FORMATS[form]

    def write(folder: pathlib.Path, bundle: Bundle, dtype: str) -> None:
        right.write(folder, bundle, dtype)
        damage(folder)

    monkeypatch.setitem(FORMATS, form, dataclasses.replace(right, write=write))


def other_tokenizer(folder: pathlib.Path) -> None:
    """Another one of the same size."""
    write_tokenizer(folder, tokenizer_from_merges(["a b", "c d", "e f"]), 8)


@pytest.mark.parametrize(
    ("form", "damage", "error", "words"),
    [
        ("huggingface", damage_huggingface, DataError, "logits that are off by .* nothing was kept"),
        ("npz", damage_npz, DataError, "logits that are off by .* nothing was kept"),
        ("huggingface", cut_weights, DataError, "not a whole safetensors file"),
        ("huggingface", other_tokenizer, DataError, "tokenizer among the exported files"),
        ("npz", other_tokenizer, DataError, "tokenizer among the exported files"),
        ("huggingface", full_disk, UsageError, "--out=.*No space left on device"),
    ],
)
def test_what_was_not_written_well_is_not_kept(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    damage: Callable[[pathlib.Path], None],
    error: type[Exception],
    words: str,
) -> None:
    after_writing(monkeypatch, form, damage)
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=words) as caught:
        export(byte_pairs(), form, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def occupied(kind: str, out: pathlib.Path) -> None:
    if kind == "a file":
        out.write_text("mine")
    elif kind == "a folder with a file":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif kind == "a link to a folder":
        (out.parent / "elsewhere").mkdir()
        out.symlink_to(out.parent / "elsewhere")
    else:
        out.symlink_to(out.parent / "nowhere")


@pytest.mark.parametrize("kind", ["a file", "a folder with a file", "a link to a folder", "a link to nothing"])
def test_a_place_that_is_taken(tmp_path: pathlib.Path, kind: str) -> None:
    occupied(kind, tmp_path / "out")
    before = {file: file.lstat().st_mtime_ns for file in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match=f"--out={tmp_path / 'out'}: there is something already"):
        export(byte_pairs(), "huggingface", tmp_path / "out")
    assert {file: file.lstat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_a_place_below_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"--out=.*/file/out: (Not a directory|File exists)"):
        export(byte_pairs(), "huggingface", tmp_path / "file" / "out")
    assert contents(tmp_path).keys() == {"file"}


def test_a_place_that_cannot_be_written_to(tmp_path: pathlib.Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        out = pathlib.Path("/proc/out")  # root may write anywhere but there
        if not out.parent.is_dir():
            pytest.skip("there is no folder here that cannot be written to")
    else:
        out = tmp_path / "closed" / "out"
    with pytest.raises(UsageError, match=f"--out={out}: .*choose another folder"):
        export(byte_pairs(), "huggingface", out)
    assert list((tmp_path / "closed").iterdir()) == []


def test_an_empty_folder_and_parents_that_are_missing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep" / "out"):
        export(characters(), "npz", out)
        assert (out / "model.npz").is_file()
        assert [file.name for file in out.parent.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("form", "dtype", "words"),
    [
        ("onnx", "float32", "--format=onnx; allowed: huggingface, npz"),
        ("npz", "bfloat16", "--dtype=bfloat16; allowed for npz: float32, float16"),
        ("huggingface", "int8", "--dtype=int8; allowed for huggingface: float32, float16, bfloat16"),
    ],
)
def test_unknown_formats_and_types(tmp_path: pathlib.Path, form: str, dtype: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export(byte_pairs(), form, tmp_path / "new" / "out", dtype)
    assert list(tmp_path.iterdir()) == []


QUICK = "--xla_backend_optimization_level=0"  # compiles in half the time
KILLED = """
import dataclasses, pathlib, sys, time
import test_export
from gpt2_jax.exchange.export import FORMATS, export

def stop(*arguments):
    print("stopped", flush=True)
    time.sleep(100)

if sys.argv[2] == "write":
    FORMATS["npz"] = dataclasses.replace(FORMATS["npz"], write=lambda folder, bundle, dtype: (
        (folder / "model.npz").write_bytes(b"half"), stop()))
else:
    sys.modules["os"].replace = stop
export(test_export.characters(), "npz", sys.argv[1])
"""


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_killed(tmp_path: pathlib.Path, moment: str) -> None:
    """As the first file is half written, and as all are there but for the name of the folder."""
    out = tmp_path / "out"
    here = pathlib.Path(__file__).resolve()
    path = os.pathsep.join(map(str, (here.parents[2], here.parents[1], here.parent)))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": QUICK}
    command = [sys.executable, "-c", KILLED, str(out), moment]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert not out.exists()
    left = [file.name for file in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    export(characters(), "npz", out)  # what was left does not stand in the way
    assert (out / "export.json").is_file()


@pytest.mark.parametrize("form", ["huggingface", "npz", "nanogpt"])
def test_a_disk_that_is_full(tmp_path: pathlib.Path, form: str) -> None:
    """By a limit of the system on the size of files, in a process of its own."""
    bundle = characters(activation="gelu_erf") if form == "nanogpt" else byte_pairs()
    export(bundle, form, tmp_path / "model")
    code = """
import resource, signal, sys
from gpt2_jax.errors import UsageError
from gpt2_jax.exchange import export
form, source, out = sys.argv[1:]
if form == "huggingface":
    from gpt2_jax.run.bundle import load_bundle
    bundle = load_bundle(source)
else:
    import pathlib
    bundle = export.IMPORTS[form](pathlib.Path(source))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
try:
    export.export(bundle, form, out)
except UsageError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, form, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith(f"--out={tmp_path / 'out'}: ")
    assert "make room" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_files_are_as_private_as_the_user_wants(tmp_path: pathlib.Path) -> None:
    before = os.umask(0o077)
    try:
        export(byte_pairs(), "huggingface", tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o077 for file in ((tmp_path / "out"), *(tmp_path / "out").iterdir())} == {0}


def test_the_folder_one_is_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--out=.: the folder that you are in"):
        export(byte_pairs(), "npz", ".")


def test_erf_is_accepted_for_nanogpt_only(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match="--accept_erf is for --format=nanogpt"):
        export(byte_pairs(), "huggingface", tmp_path / "out", accept_erf=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "file"), [("npz", "model.npz"), ("nanogpt", "ckpt.pt")])
def test_a_folder_that_must_be_imported_first(tmp_path: pathlib.Path, form: str, file: str) -> None:
    bundle = characters(activation="gelu_erf") if form == "nanogpt" else byte_pairs()
    export(bundle, form, tmp_path / "out")
    for load in (gpt2_jax.load, load_bundle):
        with pytest.raises(DataError, match=f"{file} is not read as it is.*gpt2-jax import --from {form} --model"):
            load(tmp_path / "out")
    assert_identical(import_bundle(form, tmp_path / "out" / file).params, bundle.params)
