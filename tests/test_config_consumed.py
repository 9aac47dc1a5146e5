"""Every key of the config is read by the code that it is meant to steer: none is decoration."""

import dataclasses
import pathlib
import sys
from typing import Any

import pytest

from gpt2_jax import config as schema
from gpt2_jax.cli.train import main
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import fields_by_key

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# Reading a key to check, print, store or compare it is no use of it.
_PACKAGE = pathlib.Path(schema.__file__).parent
_NO_USE = {"config.py", "config_file.py", "dataclasses.py", "copy.py", "changes.py"}


def record_reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Notes each config key that is read from now on by product code."""
    read: set[str] = set()

    def recording(cls: type, prefix: str) -> None:
        names = {field.name for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(field.type)}

        def get(self: Any, name: str) -> Any:
            if name in names:
                frame = sys._getframe(1)
                # The property `context_length` resolves a key for whoever asks.
                while frame.f_code.co_name in ("context_length", "get") and frame.f_back is not None:
                    frame = frame.f_back
                file = pathlib.Path(frame.f_code.co_filename)
                if file.name not in _NO_USE and _PACKAGE in file.parents:
                    read.add(f"{prefix}{name}")
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", get)

    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.type):
            recording(field.type, f"{field.name}.")  # type: ignore[arg-type]
    recording(schema.RunConfig, "")
    return read


def test_every_key_is_consumed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "corpus.txt").write_text("some text to learn from, over and over again. " * 200)
    read = record_reads(monkeypatch)
    overrides = {
        "data.source": f"text:{tmp_path / 'corpus.txt'}",
        "data.cache_dir": tmp_path / "tokens",
        "tokenizer.name": "bytes",
        "train.steps": 4,
        "train.batch_size": 8,
        "model.n_layer": 1,
        "model.n_head": 1,
        "model.n_embd": 8,
        "model.n_positions": 8,
        "optimizer.warmup_steps": 1,
        "optimizer.schedule": "wsd",
        "optimizer.decay_steps": 2,
    }
    arguments = [
        f"--config={REPOSITORY / 'configs' / 'quickstart.py'}",
        f"--workdir={tmp_path / 'run'}",
        "--compile_cache=off",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]
    assert main(arguments) == 0
    assert set(fields_by_key()) - read == set()


def test_recording_tells_use_from_checking(monkeypatch: pytest.MonkeyPatch) -> None:
    read = record_reads(monkeypatch)
    config = RunConfig()
    dataclasses.asdict(config)
    assert config.train.steps == 1000  # a test is no product code
    assert read == set()
