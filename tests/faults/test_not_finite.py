"""P5 in a real run: what is not finite is never applied, and the run says which step, windows and array."""

import pathlib
import re

import fault_runs
import pytest
from tiny_run import Workshop, workshop

from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.run.events import read_events

pytestmark = pytest.mark.faults
# The first update moves the parameters by 1e38: what comes next overflows.
BLOWN_UP = {
    "optimizer.learning_rate": 1e38,
    "optimizer.warmup_steps": 0,
    "checkpoint.every": 24,
    "train.eval_every": 24,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


def test_it_stops_with_4_and_says_where(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    (done,) = fault_runs.run(tiny, tmp_path, settings=BLOWN_UP)
    assert done.code == 4, done.err
    line = done.err.splitlines()[-1]
    assert re.search(r"error: step [12]: .* not finite; .*gradient.*windows \d+, \d+", line), line


def test_as_many_as_allowed_are_skipped_and_counted(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    (done,) = fault_runs.run(
        tiny, tmp_path, settings={**BLOWN_UP, "checkpoint.every": 24, "train.max_skipped_steps": 5}
    )
    assert done.code == 4, done.err
    assert re.search(r"error: step [678]: .* not finite", done.err.splitlines()[-1]), done.err
    events = read_events(tmp_path / "events.jsonl")
    assert [event["nonfinite_steps"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert {event["event"] for event in events} == {"not_finite"}
    order = TrainBatches(range(3582 // 16), batch_size=16, seed=0)
    for event in events:
        assert event["windows"] == order.window_indices(event["step"] - 1)
