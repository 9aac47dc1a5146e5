"""events.jsonl: whole lines, whatever a killed process left."""

import json
import pathlib

import pytest

from gpt2_jax.errors import DataError
from gpt2_jax.run.events import Events, read_events

pytestmark = pytest.mark.smoke


def write(file: pathlib.Path, *steps: int) -> None:
    for step in steps:
        Events(file).write("loss_spike", step, loss=1.5, windows=[step, 2], documents=None, text="Ωmega")


def test_a_line_per_event(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "events.jsonl"
    assert read_events(file) == []
    events = Events(file)
    assert not file.exists()  # before there is any
    events.write("loss_spike", 3, loss=2.5)
    events.write("other", 2)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"event": "loss_spike", "step": 3, "loss": 2.5}, {"event": "other", "step": 2}]
    assert read_events(file) == lines
    with pytest.raises(ValueError, match="not JSON compliant"):
        events.write("loss_spike", 4, loss=float("nan"))
    assert read_events(file) == lines


def test_a_line_cut_short_anywhere_is_left_out_and_replaced(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "events.jsonl"
    write(file, 1, 2)
    whole = file.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second, len(whole) + 1):
        file.write_bytes(whole[:cut])
        # Less only the line break, the last line is whole.
        kept = [1, 2] if cut >= len(whole) - 1 else [1]
        assert [event["step"] for event in read_events(file)] == kept
        write(file, 3)
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [*kept, 3]
        assert [event["step"] for event in read_events(file)] == [*kept, 3]


def test_the_first_line_cut_short(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'{"event": "lo')
    assert read_events(file) == []
    write(file, 3)
    assert [event["step"] for event in read_events(file)] == [3]


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b""])
def test_a_damaged_line_is_named(tmp_path: pathlib.Path, line: bytes) -> None:
    file = tmp_path / "events.jsonl"
    write(file, 1)
    file.write_bytes(file.read_bytes() + line + b"\n")
    write(file, 2)
    with pytest.raises(DataError, match=r"events.jsonl: line 2 is damaged"):
        read_events(file)
