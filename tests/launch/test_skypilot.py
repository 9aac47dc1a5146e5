"""The SkyPilot file: what it asks for, and what its script starts on a node."""

import pathlib
from typing import Any

import pytest
import yaml
from fake_programs import LAUNCH, FakePrograms

from gpt2_jax.cli.train import main

ENVIRONMENT = {
    "RUN_NAME": "run-7",
    "BUCKET": "gs://bu cket$x",
    "CONFIG": str(LAUNCH.parent / "configs/gpt2_124m.py"),
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
}


@pytest.fixture(scope="module")
def task() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> FakePrograms:
    (tmp_path / "launch").symlink_to(LAUNCH)
    return FakePrograms(tmp_path)


def test_only_a_preempted_run_is_recovered_by_skypilot(task: dict[str, Any]) -> None:
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 0}


@pytest.mark.parametrize(("code", "runs"), [(0, 1), (75, 1), (2, 1), (134, 4)])
def test_a_node_starts_its_process(programs: FakePrograms, task: dict[str, Any], code: int, runs: int) -> None:
    programs.add(".venv/bin/python", f"exit {code}")
    done = programs.bash("-c", task["run"], env=ENVIRONMENT)
    assert done.returncode == code
    calls = programs.calls()
    assert len(calls) == runs
    assert calls[0] == [
        "python",
        "train.py",
        f"--config={ENVIRONMENT['CONFIG']}",
        "--config.train.microbatches=4",
        "--config.data.source=tokens:gs://bu cket$x/tokens",
        "--workdir=gs://bu cket$x/runs/run-7",
        "--coordinator_address=10.0.0.1:8476",
        "--num_processes=2",
        "--process_id=1",
    ]
    assert main([*calls[0][2:], "--print_config"]) == 0  # train.py knows the flags
