"""Mirrors of the metrics that break: training goes on, with one warning."""

import pathlib
import subprocess

import pytest
from tiny_run import Workshop, workshop

from gpt2_jax.run.metrics import Mirror, read_reports

FEW = {
    "train.steps": 40,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.sample_every": 0,
    "checkpoint.every": 40,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.mark.faults
@pytest.mark.parametrize(
    ("options", "reason"), [("size=4k", "No space left on device"), ("ro", "Read-only file system")], ids=["full", "ro"]
)
def test_training_goes_on_without_tensorboard(
    tiny: Workshop, tmp_path: pathlib.Path, options: str, reason: str
) -> None:
    """A disk of its own for TensorBoard, which is full after some ten reports, or cannot be written at all."""
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "run" / "tensorboard"
    folder.mkdir(parents=True)
    prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} none "{folder}" && exec "$@"', "sh"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    done = tiny.run(tmp_path / "run", FEW, "--tensorboard", quick=True, prefix=prefix)
    assert done.code == 0, done.err
    warnings = [line for line in done.err.splitlines() if "warning" in line]
    assert len(warnings) == 1, done.err
    assert warnings[0].startswith("train.py: warning: --tensorboard is given up: ") and reason in warnings[0]
    assert "Traceback" not in done.err
    steps = [report["step"] for report in read_reports(tmp_path / "run" / "metrics.jsonl") if "loss" in report]
    assert steps == list(range(1, 41))


class Breaking:
    """A service that fails at its third call."""

    def __init__(self, calls: list[str], allowed: int) -> None:
        self.calls, self.allowed = calls, allowed
        self._count("init")

    def _count(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) > self.allowed:
            raise ConnectionError(f"the service is gone,\nat call {len(self.calls)}")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._count(f"write {step}")

    def close(self) -> None:
        self._count("close")


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (0, ["init"]),
        (1, ["init", "write 1"]),
        (2, ["init", "write 1", "write 2"]),
        (3, ["init", "write 1", "write 2", "close"]),
        (4, ["init", "write 1", "write 2", "close"]),
    ],
)
def test_a_mirror_that_fails_is_told_once_and_left_alone(
    capsys: pytest.CaptureFixture[str], allowed: int, expected: list[str]
) -> None:
    calls: list[str] = []
    mirror = Mirror("--wandb", lambda: Breaking(calls, allowed))
    for step in (1, 2):
        mirror.write(step, {"loss": 1.0})
    mirror.close()
    assert calls == expected
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (allowed < 4)
    if told:
        assert "--wandb is given up: ConnectionError: the service is gone, at call" in told[0]
