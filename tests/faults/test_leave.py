"""P2: SIGTERM to any one process: all save the same step and exit with 75. Ctrl-C: the step is saved, and 130."""

import pathlib
import signal
import time

import fault_runs
import pytest
from tiny_run import Workshop, workshop

from gpt2_jax.run.rendezvous import free_address

pytestmark = pytest.mark.faults
STEPS = fault_runs.SHORT["train.steps"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def alone(tiny: Workshop) -> str:
    """The hash of the last state of a run that was left alone."""
    folder = tiny.folder / "left_alone"
    (done,) = fault_runs.run(tiny, folder)
    assert done.code == 0, done.err
    return fault_runs.state_hash(folder)


def assert_one_line(err: str, *fragments: str) -> None:
    assert "Traceback" not in err, err
    assert not [fragment for fragment in fragments if fragment not in err.splitlines()[-1]], err


@pytest.mark.parametrize(
    ("point", "flags"),
    [
        ("compile=term", ()),
        ("step#7=term", ()),
        ("evaluate#2=term", ()),
        ("save.copied#2=term", ()),
        ("step#7=term", ("--no_distributed",)),
    ],
)
def test_one_process(tiny: Workshop, alone: str, tmp_path: pathlib.Path, point: str, flags: tuple[str, ...]) -> None:
    (left,) = fault_runs.run(tiny, tmp_path, *flags, faults=[point])
    assert left.code == 75, left.err
    step = fault_runs.saved_steps(tmp_path)[-1]
    assert_one_line(left.err, f"SIGTERM asked for room: step {step} is saved", "the same command goes on")
    if not point.startswith("evaluate"):
        return  # how saved steps are gone on from, test_kill.py shows
    (done,) = fault_runs.run(tiny, tmp_path)
    assert done.code == 0, done.err
    assert f"resumed after step {step}" in done.err
    assert fault_runs.state_hash(tmp_path) == alone


@pytest.mark.parametrize(("point", "victim"), [("compile=term", 1), ("step#7=term", 0), ("evaluate#2=term", 1)])
def test_two_processes(tiny: Workshop, tmp_path: pathlib.Path, point: str, victim: int) -> None:
    faults = ["", ""]
    faults[victim] = point
    ended = fault_runs.run(tiny, tmp_path, faults=faults)
    assert [done.code for done in ended] == [75, 75], [done.err[-2000:] for done in ended]
    step = fault_runs.saved_steps(tmp_path)[-1]
    for done in ended:
        assert_one_line(done.err, f"step {step} is saved")


@pytest.mark.parametrize("flags", [(), ("--no_distributed",)])
def test_while_the_data_is_prepared(tiny: Workshop, tmp_path: pathlib.Path, flags: tuple[str, ...]) -> None:
    settings = {"data.cache_dir": tmp_path / "tokens"}
    (left,) = fault_runs.run(tiny, tmp_path / "run", *flags, faults=["prepare=term"], settings=settings)
    assert left.code == 75, left.err
    assert_one_line(left.err, "before training had begun", "the same command")
    (done,) = fault_runs.run(tiny, tmp_path / "run", settings={**settings, "train.steps": 6})
    assert done.code == 0, done.err


@pytest.mark.parametrize("victim", [0, 1])
def test_while_others_wait_for_data(tiny: Workshop, tmp_path: pathlib.Path, victim: int) -> None:
    """One of them hangs while it prepares, and the other waits for it."""
    settings = {"data.cache_dir": tmp_path / "tokens"}
    with fault_runs.started(tiny, tmp_path / "run", faults=["prepare=hang"] * 2, settings=settings) as processes:
        end = time.monotonic() + 60
        while not list((tmp_path / "tokens").glob("*.partial")) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(3)
        processes[victim].send_signal(signal.SIGTERM)
        ended = [fault_runs.finish(process, 60) for process in processes]
    assert [done.code for done in ended] == [75, 75], [done.err[-2000:] for done in ended]


def test_while_the_others_have_not_come(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    place = (f"--coordinator_address={free_address()}", "--num_processes=2", "--process_id=0")
    with fault_runs.started(tiny, tmp_path / "run", *place) as (process,):
        time.sleep(8)
        process.send_signal(signal.SIGTERM)
        done = fault_runs.finish(process, 30)
    assert done.code == 75, done.err


# Ctrl-C


@pytest.mark.parametrize("flags", [(), ("--no_distributed",)])
def test_ctrl_c_saves(tiny: Workshop, alone: str, tmp_path: pathlib.Path, flags: tuple[str, ...]) -> None:
    (left,) = fault_runs.run(tiny, tmp_path, *flags, faults=["step#8=interrupt"])
    assert left.code == 130, left.err
    step = fault_runs.saved_steps(tmp_path)[-1]
    assert step >= 8
    assert_one_line(left.err, f"interrupted: step {step} is saved")
    assert "once more to end at once" in left.err
    if flags:
        return
    (done,) = fault_runs.run(tiny, tmp_path)
    assert done.code == 0, done.err
    assert fault_runs.state_hash(tmp_path) == alone


def test_ctrl_c_twice_leaves_whole_saves_only(tiny: Workshop, alone: str, tmp_path: pathlib.Path) -> None:
    """The second one comes during the save that the first one asked for."""
    with fault_runs.started(tiny, tmp_path, faults=["step#8=interrupt"], settings={"checkpoint.every": 24}) as (
        process,
    ):
        while not list(tmp_path.glob("checkpoints/*")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        left = fault_runs.finish(process, 60)
    assert left.code == 130, left.err
    (done,) = fault_runs.run(tiny, tmp_path)
    assert done.code == 0, done.err
    assert fault_runs.state_hash(tmp_path) == alone


def test_sigterm_twice(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    with fault_runs.started(tiny, tmp_path, faults=["save.begin=term"]) as (process,):
        while not list(tmp_path.glob("checkpoints/*")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        left = fault_runs.finish(process, 60)
    assert left.code == 75, left.err


def test_ctrl_c_in_a_terminal_with_two_processes(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    """All processes get it, each at another step."""
    ended = fault_runs.run(tiny, tmp_path, faults=["step#7=interrupt", "step#8=interrupt"])
    assert [done.code for done in ended] == [130, 130], [done.err[-2000:] for done in ended]
    step = fault_runs.saved_steps(tmp_path)[-1]
    for done in ended:
        assert_one_line(done.err, f"interrupted: step {step} is saved")
