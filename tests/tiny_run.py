"""Tiny runs of the real train.py, as a command or in this process.

A workshop is a folder that all tests of a session share: a corpus, a config file and the cache of token stores. With
that of compiled programs (see conftest.py) the second run of a kind starts in a few seconds.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from gpt2_jax.cli.train import main

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

CONFIG = """
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import config_dict


def get_config():
    return config_dict(RunConfig())
"""

# Dropout, a moving average and microbatches are on, so that a resumed run has everything to carry over.
TINY = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.n_positions": 16,
    "tokenizer.name": "bytes",
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 5,
    "optimizer.ema_decay": 0.9,
    "train.steps": 120,
    "train.batch_size": 16,
    "train.microbatches": 2,
    "train.log_every": 5,
    "train.eval_every": 20,
    "train.sample_every": 30,
    "checkpoint.every": 10,
    "checkpoint.export_best": False,
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def says(self, code: int, *fragments: str) -> None:
        """Asserts that it failed with `code` and one line on stderr that holds all fragments."""
        assert self.code == code, self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("train.py: "), self.err
        for fragment in fragments:
            assert fragment in lines[0], self.err


class Workshop:
    """Runs train.py with the settings `TINY`, unless a test gives others."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.corpus = folder / "corpus.txt"
        self.corpus.write_text(" ".join(f"{n} plus one is {n + 1}." for n in range(200)))
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG)

    def arguments(self, workdir: pathlib.Path, settings: Mapping[str, Any] | None = None, *flags: str) -> list[str]:
        """The command line after `train.py`."""
        basis = {"data.source": f"text:{self.corpus}", "data.cache_dir": self.folder / "tokens"}
        overrides = {**basis, **TINY, **(settings or {})}
        return [
            f"--config={self.config}",
            f"--workdir={workdir}",
            f"--compile_cache={os.environ.get('GPT2_JAX_TEST_COMPILE_CACHE') or self.folder / 'xla'}",
            *(f"--config.{key}={value}" for key, value in overrides.items()),
            *flags,
        ]

    def start(
        self,
        workdir: pathlib.Path,
        settings: Mapping[str, Any] | None = None,
        *flags: str,
        quick: bool = False,
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen:
        """The command, running, on one device; `quick` compiles in half the time to slower programs."""
        command = [sys.executable, str(REPOSITORY / "train.py"), *self.arguments(workdir, settings, *flags)]
        environment = self.environment()
        if quick:
            environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        return subprocess.Popen(
            [*prefix, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(
        self,
        workdir: pathlib.Path,
        settings: Mapping[str, Any] | None = None,
        *flags: str,
        quick: bool = False,
        prefix: Sequence[str] = (),
    ) -> Finished:
        """The command, done."""
        return finish(self.start(workdir, settings, *flags, quick=quick, prefix=prefix))

    def python(self, script: str, *arguments: object) -> Finished:
        """A Python program, done."""
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False, timeout=300)
        return Finished(done.returncode, done.stdout, done.stderr)

    def run_here(self, workdir: pathlib.Path, settings: Mapping[str, Any] | None = None, *flags: str) -> Finished:
        """The same in this process, on its eight devices: quick where nothing is compiled."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_settings():
            code = main(self.arguments(workdir, settings, *flags))
        return Finished(code, out.getvalue(), err.getvalue())

    def environment(self) -> dict[str, str]:
        """That of the commands."""
        # JAX, imported here, has lowered the log level for its children.
        inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
        return {
            **inherited,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(REPOSITORY),
            "MPLCONFIGDIR": str(self.folder / "matplotlib"),
            "WANDB_MODE": "offline",
        }


@functools.cache
def workshop(base: pathlib.Path) -> Workshop:
    """The workshop below the session's base folder for temporary files."""
    folder = base / "workshop"
    folder.mkdir()
    return Workshop(folder)


@functools.cache
def finished_run(base: pathlib.Path) -> tuple[pathlib.Path, Finished]:
    """The folder of one complete run with the settings `TINY`, and what it said. Look, do not touch."""
    tiny = workshop(base)
    folder = tiny.folder / "straight"
    return folder, tiny.run(folder, None, "--tensorboard", "--profile=3:4")


def mounted(folder: pathlib.Path, options: str) -> list[str]:
    """What to put before a command so that it sees an empty file system at `folder`."""
    prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} none "{folder}" && exec "$@"', "sh"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    return prefix


def finish(process: subprocess.Popen, seconds: float = 300) -> Finished:
    """Waits for a command."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return Finished(process.returncode, out, err)


def contents(folder: pathlib.Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def assert_identical(actual: Any, expected: Any) -> None:
    """Equal structure, and every array equal bit by bit, its type included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


@contextlib.contextmanager
def kept_settings() -> Iterator[None]:
    """Takes back what the command sets for its whole process."""
    level, cache = os.environ.get("TF_CPP_MIN_LOG_LEVEL"), jax.config.jax_compilation_cache_dir
    hook, logs = sys.unraisablehook, logging.getLogger("absl").level
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
        logging.getLogger("absl").setLevel(logs)
        sys.unraisablehook = hook
        if level is None:
            os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)
