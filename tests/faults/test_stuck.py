"""P4: a dead, raising or stuck process ends the whole job, not with 0, within the heartbeat and ten seconds."""

import pathlib
import signal
import time

import fault_runs
import pytest
from tiny_run import Finished, Workshop, workshop

pytestmark = pytest.mark.faults
PATIENCE = fault_runs.HEARTBEAT + 10
STEPS = {"train.steps": 100000, "checkpoint.every": 100000, "train.eval_every": 100000, "train.sample_every": 100000}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


def ended_after(tiny: Workshop, folder: pathlib.Path, faults: list[str], seconds: float, *flags: str) -> list[Finished]:
    """How the two processes end; fails where it takes longer after the first one noticed step 40."""
    with fault_runs.started(tiny, folder, *flags, faults=faults, settings=STEPS) as processes:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and '"step": 40,' in metrics.read_text()):
            assert all(process.poll() is None for process in processes), [
                fault_runs.finish(process, 1).err for process in processes
            ]
            time.sleep(0.02)
        start = time.monotonic()
        ended = [fault_runs.finish(process, seconds + 30) for process in processes]
    assert time.monotonic() - start < seconds
    assert all(done.code not in (0, 75) for done in ended), [(done.code, done.err[-2000:]) for done in ended]
    return ended


@pytest.mark.parametrize("victim", [0, 1])
def test_one_raises(tiny: Workshop, tmp_path: pathlib.Path, victim: int) -> None:
    faults = ["", ""]
    faults[victim] = "step#41=raise"
    ended = ended_after(tiny, tmp_path, faults, PATIENCE)
    assert ended[victim].code == 1
    assert ended[victim].err.rstrip().endswith("RuntimeError: fault point step"), ended[victim].err


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed(tiny: Workshop, tmp_path: pathlib.Path, victim: int) -> None:
    faults = ["", ""]
    faults[victim] = "step#41=kill"
    assert ended_after(tiny, tmp_path, faults, PATIENCE)[victim].code == -signal.SIGKILL


def test_one_is_stuck(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    ended = ended_after(tiny, tmp_path, ["", "step#41=hang"], 6 + PATIENCE, "--watchdog=6")
    assert "Timeout (0:00:06)!" in ended[1].err
    assert "in reach" in ended[1].err
    assert "fault_points.py" in ended[1].err


def test_alone_it_ends_too_but_not_while_it_compiles(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    """Compiling may take ten times as long, and so may the first step after a save."""
    folder = tmp_path / "run"
    (done,) = fault_runs.run(tiny, folder, "--watchdog=3", "--compile_cache=off", faults=["step#6=hang"])
    assert done.code == 1
    assert "Timeout (0:00:03)!" in done.err
    assert fault_runs.saved_steps(folder) == [3]
