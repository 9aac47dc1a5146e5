"""metrics.jsonl and its mirrors, read back by other means than they were written."""

import json
import math
import pathlib
import struct

import pytest

from gpt2_jax.config import RunConfig
from gpt2_jax.run.metrics import JsonLines, TensorBoard, WeightsAndBiases, read_reports

pytestmark = pytest.mark.smoke


def write(file: pathlib.Path, resume_step: int, steps: range) -> None:
    writer = JsonLines(file, resume_step)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


def test_resuming_drops_what_will_be_made_again(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, 0, range(1, 8))
    write(file, 4, range(5, 10))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert lines[4] == {"step": 5, "loss": 0.2}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_line_cut_short_is_left_out(tmp_path: pathlib.Path, cut: int) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, 0, range(1, 5))
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    steps = [report["step"] for report in read_reports(file)]
    # Less only the line break, the last line is whole.
    assert steps == ([1, 2, 3, 4] if cut == 1 else [1, 2, 3])
    write(file, 3, range(4, 6))
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_numbers_that_are_not_finite_stay_json(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "metrics.jsonl"
    writer = JsonLines(file, 0)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.5})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads(file.read_text(), parse_constant=refuse)
    assert report == {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.5}


def scalars(file: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of a TensorBoard event file, by its record format: length, checksum, bytes, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorboardX")
    writer = TensorBoard(tmp_path, 0)
    writer.write(10, {"loss": 2.5, "learning_rate": 0.125})
    writer.write(20, {"loss": 1.5})
    writer.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    assert scalars(file) == [(10, "loss", 2.5), (10, "learning_rate", 0.125), (20, "loss", 1.5)]


def test_weights_and_biases_offline(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'gpt2-jax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (10, 20):  # started, then resumed
        writer = WeightsAndBiases(tmp_path, "a-project", RunConfig())
        writer.write(step, {"loss": 2.5})
        writer.close()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files
    assert {file.stem for file in files} == {f"run-{(tmp_path / 'wandb_id.txt').read_text()}"}
