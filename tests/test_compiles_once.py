"""A run compiles its train step and its evaluation step once each, whatever it does besides."""

import collections
import pathlib
import re

import pytest
from tiny_run import workshop


def test_a_run_compiles_each_step_once(
    tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With evaluations, saves and samples between its steps, and no cache of programs."""
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    settings = {"train.steps": 25, "train.eval_every": 10, "train.sample_every": 10}
    done = workshop(tmp_path_factory.getbasetemp()).run(tmp_path / "run", settings, "--compile_cache=off")
    assert done.code == 0, done.err
    compiled = collections.Counter(re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.err))
    assert compiled["train_step"] == compiled["eval_step"] == 1, compiled
