"""What `benchmarks.sweep` prints is what its runs reach."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs" / "shakespeare_char_cpu.py"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}


def sweep(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.sweep", f"--config={CONFIG}"),
            *(f"--config.model.{name}={value}" for name, value in SHAPE.items()),
            *flags,
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )


@pytest.mark.slow
def test_a_loss_on_the_way_is_that_of_a_run_that_ends_there(tmp_path: pathlib.Path) -> None:
    """With a constant rate; that it was evaluated on the way changes nothing that comes after."""
    (tmp_path / "corpus.txt").write_text(" ".join(str(number * number) for number in range(4000)))
    constant = (
        "--config.optimizer.schedule=constant",
        "--config.optimizer.warmup_steps=2",
        f"--config.data.source=text:{tmp_path / 'corpus.txt'}",
    )
    done = sweep(*constant, "--vary", "train.steps=12,24", "--at=6,12")
    assert done.returncode == 0, done.stderr[-3000:]
    short, long = sorted(json.loads(done.stdout.splitlines()[-1])["results"], key=lambda row: int(row["train.steps"]))
    assert short["loss_at_12"] == short["loss"] == long["loss_at_12"]
    assert short["loss_at_6"] == long["loss_at_6"]
    assert short["loss_at_6"]["median"] > short["loss"]["median"] > long["loss"]["median"]


def test_steps_that_a_run_does_not_make_are_refused() -> None:
    done = sweep("--config.train.steps=100", "--at=12,101")
    assert done.returncode == 2
    assert "--at=12,101: of steps 1 to train.steps=100" in done.stderr
