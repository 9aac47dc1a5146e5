"""P6: back to a saved step, and on without the batches that came next; recorded, and done once."""

import json
import pathlib
import re
import shutil

import fault_runs
import pytest
from tiny_run import TINY, Workshop, workshop

from gpt2_jax.cli.main import main
from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.run.events import read_events

pytestmark = pytest.mark.faults
STEPS, ROWS, WINDOWS = fault_runs.SHORT["train.steps"], TINY["train.batch_size"], 3582 // 16
KEEP_ALL = {"checkpoint.keep_last": 100}
REWIND = ("--rewind_to=12", "--skip_batches=5")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def whole(tiny: Workshop) -> pathlib.Path:
    folder = tiny.folder / "kept_all"
    (done,) = fault_runs.run(tiny, folder, settings=KEEP_ALL)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def copy(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_it_goes_back_and_leaves_the_batches_out(
    tiny: Workshop, copy: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    before = {step: fault_runs.state_hash(copy, step) for step in (12, STEPS)}
    losses = fault_runs.losses(copy)
    (tmp_path / "notes").mkdir()
    (done,) = fault_runs.run(tiny, copy, *REWIND, settings=KEEP_ALL, notes=tmp_path / "notes")
    assert done.code == 0, done.err
    assert "resumed after step 12" in done.err
    assert "skipped   batches 5 after step 12" in done.err
    order = TrainBatches(range(WINDOWS), batch_size=ROWS, seed=0)
    expected = {step: sorted(order.window_indices(step + 5)) for step in range(12, STEPS)}
    assert fault_runs.batch_order([*(tmp_path / "notes").iterdir()]) == expected

    assert json.loads((copy / "run.json").read_text())["skipped"] == [{"at": 12, "batches": 5}]
    (event,) = read_events(copy / "events.jsonl")
    moved = [*range(15, STEPS + 1, 3)]
    assert event == {"event": "rewind", "step": STEPS, "to": 12, "skip_batches": 5, "moved": moved}
    assert sorted(int(step.name) for step in (copy / "checkpoints" / "rewound").iterdir()) == moved
    assert fault_runs.state_hash(copy, 12) == before[12]
    assert fault_runs.state_hash(copy, STEPS) != before[STEPS]
    after = fault_runs.losses(copy)
    assert {key: loss for key, loss in after.items() if key[0] <= 12} == {
        key: loss for key, loss in losses.items() if key[0] <= 12
    }
    # The texts of a step are those that it read now.
    capsys.readouterr()
    assert main(["data", "blame", f"--workdir={copy}", "--step=13", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(row["window"] for row in rows) == expected[12]


def test_the_same_command_rewinds_once_and_a_killed_one_ends_alike(
    tiny: Workshop, copy: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(copy, again)
    (done,) = fault_runs.run(tiny, copy, *REWIND, settings=KEEP_ALL)
    assert done.code == 0, done.err
    (killed,) = fault_runs.run(tiny, again, *REWIND, settings=KEEP_ALL, faults=["step#8=kill"])
    assert killed.code == -9
    (done,) = fault_runs.run(tiny, again, *REWIND, settings=KEEP_ALL)
    assert done.code == 0, done.err
    assert re.search("resumed after step 1[58]", done.err), done.err  # the save of step 18 may have been in its midst
    assert len(read_events(again / "events.jsonl")) == 1
    assert fault_runs.state_hash(again) == fault_runs.state_hash(copy)
    # Without the flags it stays so.
    (done,) = fault_runs.run(tiny, copy, settings=KEEP_ALL)
    assert "was done already" in done.out


def test_two_processes_go_back_together(tiny: Workshop, copy: pathlib.Path) -> None:
    for done in fault_runs.run(tiny, copy, *REWIND, settings=KEEP_ALL, faults=["", ""]):
        assert done.code == 0, done.err
    assert json.loads((copy / "run.json").read_text())["skipped"] == [{"at": 12, "batches": 5}]
    assert fault_runs.saved_steps(copy)[-1] == STEPS


def test_what_is_refused(tiny: Workshop, copy: pathlib.Path) -> None:
    for flags, fragments in (
        (("--rewind_to=13", "--skip_batches=5"), ("--rewind_to=13", "not saved", "0 for the beginning, 3, 6")),
        (("--rewind_to=12",), ("go together",)),
        (("--skip_batches=3",), ("go together",)),
        (("--rewind_to=12", "--skip_batches=0"), ("--skip_batches", "integer from 1")),
    ):
        (done,) = fault_runs.run(tiny, copy, *flags, settings=KEEP_ALL)
        done.says(2, *fragments)
    assert fault_runs.saved_steps(copy)[-1] == STEPS
