"""P1: kill -9 at any moment loses no saved step, and what goes on from there is what would have been, bit for bit.

`tests/check_kill_points.py` goes through 40 of these points, ten with two processes; here are twelve.
"""

import pathlib
import signal

import fault_runs
import pytest
from tiny_run import Workshop, workshop

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(("seed", "kills", "processes"), [(1, 10, 1), (3, 2, 2)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    tiny: Workshop, tmp_path: pathlib.Path, seed: int, kills: int, processes: int
) -> None:
    fault_runs.check_kills(tiny, tmp_path, fault_runs.kill_plans(kills, seed), processes)


def test_a_leftover_of_a_killed_save_is_cleared_away(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    (killed,) = fault_runs.run(tiny, folder, faults=["save.seal#2=kill"])
    assert killed.code == -signal.SIGKILL
    names = sorted(entry.name for entry in (folder / "checkpoints").iterdir())
    assert names[0] == "3"
    assert any("tmp" in name for name in names), names
    (done,) = fault_runs.run(tiny, folder)
    assert done.code == 0, done.err
    assert "resumed after step 3" in done.err
    assert not list((folder / "checkpoints").glob("*tmp*"))
