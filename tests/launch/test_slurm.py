"""The SLURM file without SLURM; `tests/check_slurm.py` runs it on a real one."""

import pathlib

import pytest
from fake_programs import LAUNCH, FakePrograms, refused

JOB = {"SLURM_JOB_NAME": "run-7", "SLURM_JOB_ID": "42"}


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> FakePrograms:
    (tmp_path / "launch").symlink_to(LAUNCH)
    (tmp_path / "train.py").touch()
    return FakePrograms(tmp_path)


@pytest.mark.parametrize(("code", "runs"), [(0, 1), (75, 1), (143, 1), (2, 1), (3, 1), (4, 1), (134, 4)])
def test_a_job_is_requeued_when_it_was_preempted_only(programs: FakePrograms, code: int, runs: int) -> None:
    programs.add("srun", f"exit {code}")
    programs.add("scontrol")
    programs.add("sleep")  # SLURM ends the script meanwhile
    done = programs.bash("launch/slurm.sbatch", "--config=c.py", "a b", "$x", env=JOB)
    preempted = code in (75, 143)
    assert (["sleep", "600"] in programs.calls("sleep")) == preempted
    assert done.returncode == (75 if preempted else code)
    assert programs.calls("scontrol") == ([["scontrol", "requeue", "42"]] if preempted else [])
    steps = programs.calls("srun")
    assert len(steps) == runs
    train = ["python", "train.py", "--workdir=runs/run-7", "--config=c.py", "a b", "$x"]
    assert steps[0] == ["srun", "--kill-on-bad-exit=0", "--wait=0", *train]


def test_what_sbatch_reads() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    # Without B:, which would send the signal to the shell alone.
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= {*options}
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch stops at the first command


def test_submitted_from_elsewhere_is_refused(programs: FakePrograms) -> None:
    (programs.folder / "train.py").unlink()
    programs.add("srun")
    refused(programs.bash("launch/slurm.sbatch", env=JOB), "submit from the repository's top folder")
    assert programs.calls() == []
