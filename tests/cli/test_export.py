"""The commands `gpt2-jax export` and `gpt2-jax import`, on a tiny run of the real train.py."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import Finished, assert_identical, finished_run, kept_settings

import gpt2_jax
from gpt2_jax.cli import export as export_command
from gpt2_jax.cli import import_model as import_command
from gpt2_jax.cli.main import main
from gpt2_jax.exchange.export import FORMATS, IMPORTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return finished_run(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def exported(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The run as a Hugging Face folder. Look, do not touch."""
    out = tmp_path_factory.mktemp("exported") / "out"
    done = here("export", "--model", model, "--out", out)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{out}: huggingface, float32; read back, its logits differ by at most 0 (allowed 0, ")
    return out


def here(*arguments: object) -> Finished:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_settings():
        code = main([*map(str, arguments)])
    return Finished(code, out.getvalue(), err.getvalue())


def refused(done: Finished, code: int, *fragments: str) -> None:
    assert (done.code, done.out) == (code, ""), done
    assert done.err.count("\n") == 1
    assert done.err.startswith("gpt2-jax: error: ")
    assert all(fragment in done.err for fragment in fragments), done.err


def test_a_run_becomes_a_huggingface_folder(model: pathlib.Path, exported: pathlib.Path) -> None:
    """With the parameters that `load` gives, those of the best step."""
    run, params, tokenizer = gpt2_jax.load(model)
    config, read, read_tokenizer = gpt2_jax.load(exported)
    assert_identical(read, params)
    assert read_tokenizer.fingerprint == tokenizer.fingerprint
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        assert getattr(config.model, name) == getattr(run.model, name)
    report = json.loads((exported / "export.json").read_text())
    assert (report["difference"], report["allowed"]) == (0, 0)
    card = (exported / "README.md").read_text()
    assert "| data | text:corpus.txt |" in card
    assert "steps of 16 windows of 16 tokens" in card
    assert str(model.parent) not in card


def test_a_step(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = here("export", "--model", model, "--step=110", "--format=npz", "--dtype=float16", "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{tmp_path / 'out'}: npz, float16; read back, its logits differ by at most ")
    _, params, _ = gpt2_jax.load(model, 110)
    with np.load(tmp_path / "out" / "model.npz") as stored:
        want = np.asarray(params["h"]["mlp"]["c_fc"]["kernel"])[1].astype(np.float16)
        assert stored["h.1.mlp.c_fc.weight"].tobytes() == want.tobytes()
        best = np.asarray(gpt2_jax.load(model)[1]["h"]["mlp"]["c_fc"]["kernel"])[1].astype(np.float16)
        assert best.tobytes() != want.tobytes()
    assert "110 steps" in (tmp_path / "out" / "README.md").read_text()


def test_a_huggingface_folder_is_a_model(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Out to an archive and in again."""
    assert here("export", "--model", exported, "--format=npz", "--out", tmp_path / "npz").code == 0
    done = here("import", "--from=npz", "--model", tmp_path / "npz", "--out", tmp_path / "hf")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{tmp_path / 'hf'}: huggingface, float32, from npz; read back, its logits differ by ")
    before, after = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "hf"))
    assert_identical(after, before)
    refused(here("export", "--model", exported, "--step=3", "--out", tmp_path / "x"), 2, "has no steps", "step 3")


@pytest.mark.parametrize(
    ("flags", "code", "fragments"),
    [
        (("--format=onnx",), 2, ["--format=onnx", "huggingface, npz"]),
        (("--format=npz", "--dtype=bfloat16"), 2, ["--dtype=bfloat16", "npz: float32, float16"]),
        (("--dtype=int4",), 2, ["--dtype=int4", "float32, float16, bfloat16"]),
        (("--step=seven",), 2, ["--step", "'seven'"]),
        (("--step=7",), 3, ["no checkpoint of step 7", "110"]),
        (("--formt=npz",), 2, ["--formt=npz"]),
    ],
)
def test_bad_flags(
    model: pathlib.Path, tmp_path: pathlib.Path, flags: tuple[str, ...], code: int, fragments: list[str]
) -> None:
    refused(here("export", "--model", model, "--out", tmp_path / "out", *flags), code, *fragments)
    assert list(tmp_path.iterdir()) == []


def test_bad_places(model: pathlib.Path, exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("mine")
    for command in (("export", "--model", model), ("import", "--from=npz", "--model", exported)):
        refused(here(*command, "--out", exported), 2, f"--out={exported}", "something already")
        refused(here(*command, "--out", tmp_path / "file"), 2, f"--out={tmp_path / 'file'}", "something already")
    refused(here("export", "--model", model, "--out", tmp_path / "file" / "out"), 2, "--out=", "choose another folder")
    refused(here("export", "--model", tmp_path / "x", "--out", tmp_path / "out"), 2, "--model=", "no such folder")
    refused(here("export", "--model", tmp_path / "file", "--out", tmp_path / "out"), 2, "--model=", "no such folder")
    refused(here("export", "--model", tmp_path, "--out", tmp_path / "out"), 3, str(tmp_path), "not a run folder")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_bad_imports(model: pathlib.Path, exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = ("--out", tmp_path / "out")
    refused(here("import", "--from=onnx", "--model", exported, *out), 2, "--from=onnx", "npz")
    refused(here("import", "--from=npz", "--model", exported, *out), 3, "model.npz", "missing")
    refused(here("import", "--from=npz", "--model", model, *out), 3, "config.json", "model_type")
    refused(here("import", "--from=npz", "--model", tmp_path / "nothing", *out), 3, "config.json", "No such file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("export", "--model=x"), "--out"),
        (("export", "--out=x"), "--model"),
        (("import", "--from=npz", "--model=x"), "--out"),
        (("import", "--from=npz", "--out=x"), "--model"),
        (("import", "--model=x", "--out=x"), "--from"),
    ],
)
def test_missing_flags(arguments: tuple[str, ...], missing: str) -> None:
    refused(here(*arguments), 2, "required", missing)


def test_the_run_folder_is_not_changed(model: pathlib.Path, exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (*model.rglob("*"), *exported.rglob("*"))}
    here("export", "--model", model, "--format=npz", "--out", tmp_path / "one")
    here("export", "--model", exported, "--format=npz", "--out", tmp_path / "two")
    assert {file: file.stat().st_mtime_ns for file in (*model.rglob("*"), *exported.rglob("*"))} == before
    (one, two) = (np.load(tmp_path / name / "model.npz") for name in ("one", "two"))
    assert_identical(dict(one), dict(two))
    one.close(), two.close()


def test_help_names_the_formats() -> None:
    """Which are written there once more, so that it needs no JAX."""
    assert (set(export_command.FORMATS), set(import_command.FORMATS)) == (FORMATS.keys(), IMPORTS.keys())
    check = "import atexit, sys; atexit.register(lambda: print('jax' in sys.modules))"
    for command in ("export", "import"):
        script = f"{check}; from gpt2_jax.cli.main import main; main(['{command}', '--help'])"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("False\n")
        assert "npz" in done.stdout
