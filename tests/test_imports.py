"""What is imported when: no TensorFlow or torch ever, no JAX before it is needed, and files in one order."""

import pathlib
import shutil
import subprocess
import sys

import pytest

import gpt2_jax
from gpt2_jax.cli.main import COMMANDS

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.smoke


def modules_after(script: str, *arguments: str) -> set[str]:
    """Top-level modules that are loaded in a fresh interpreter after `script`."""
    report = "\nimport sys; print('\\nMODULES', *{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", script + report, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_training_loads_neither_tensorflow_nor_torch(tmp_path: pathlib.Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a few words of text, again and again. " * 50)
    script = (
        "import sys, gpt2_jax, gpt2_jax.cli.prepare\n"
        "from gpt2_jax.cli.train import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "for name in gpt2_jax.__all__: getattr(gpt2_jax, name)\n"
    )
    overrides = {
        "data.source": f"text:{corpus}",
        "data.cache_dir": tmp_path / "tokens",
        "tokenizer.name": "bytes",
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.n_embd": 16,
        "model.n_positions": 8,
        "train.steps": 2,
        "train.batch_size": 4,
        "optimizer.warmup_steps": 1,
    }
    loaded = modules_after(
        script,
        f"--config={REPOSITORY / 'configs' / 'gpt2_124m.py'}",
        f"--workdir={tmp_path / 'run'}",
        "--compile_cache=off",
        "--config.train.microbatches=1",
        "--config.train.eval_windows=0",
        "--config.model.vocab_size=0",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    )
    assert {"jax", "orbax", "grain", "gpt2_jax"} <= loaded
    assert not loaded & {"tensorflow", "torch", "transformers"}


def test_package_and_help_are_light() -> None:
    assert not modules_after("import gpt2_jax; gpt2_jax.__version__") & {"jax", "numpy"}
    script = "from gpt2_jax.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    assert not modules_after(script) & {"jax", "numpy", "tiktoken"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_needs_no_jax(command: str) -> None:
    script = (
        "import contextlib, io, sys\n"
        "from gpt2_jax.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):\n"
        "    main([sys.argv[1], '--help'])\n"
        "assert f'usage: gpt2-jax {sys.argv[1]} ' in shown.getvalue(), shown.getvalue()\n"
    )
    assert not modules_after(script, command) & {"jax", "orbax", "grain", "tensorflow", "torch"}


def test_preparing_data_needs_no_jax(tmp_path: pathlib.Path) -> None:
    (tmp_path / "corpus.txt").write_text("some text " * 100)
    script = "import sys; from gpt2_jax.cli.main import main; assert main(sys.argv[1:]) == 0\n"
    source, out = f"text:{tmp_path / 'corpus.txt'}", str(tmp_path / "tokens")
    loaded = modules_after(script, "prepare", "--source", source, "--tokenizer", "bytes", "--out", out)
    assert "gpt2_jax" in loaded
    assert not loaded & {"jax", "tensorflow", "torch"}


def test_public_names_resolve() -> None:
    for name in gpt2_jax.__all__:
        assert getattr(gpt2_jax, name) is not None
    assert set(gpt2_jax.__all__) <= set(dir(gpt2_jax))
    with pytest.raises(AttributeError, match="no_such_name"):
        gpt2_jax.no_such_name  # noqa: B018


def test_files_import_only_from_what_stands_before_them() -> None:
    command = pathlib.Path(sys.executable).with_name("lint-imports")
    found = str(command) if command.exists() else shutil.which("lint-imports")
    if found is None:
        pytest.skip("import-linter is not installed: pip install 'gpt2-jax[dev]'")
    done = subprocess.run([found, "--no-cache"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout
