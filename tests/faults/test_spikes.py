"""A loss spike in a real run, provoked by real data: it is noted with its windows and documents, and shown."""

import contextlib
import io
import json
import pathlib

import numpy as np
import pytest
from recorded_run import RecordedBatch, recorded_run
from tiny_run import Finished, Workshop, workshop

from gpt2_jax.cli.main import main
from gpt2_jax.run.events import read_events

T, ROWS, STEPS = 16, 8, 400
PLAIN = "the cat sat on the mat. " * 17
ODD = "".join(chr(code) for code in np.random.default_rng(0).integers(0x2600, 0x2700, 20))  # 60 bytes, all above 127
SETTINGS = {
    **{"train.steps": STEPS, "train.batch_size": ROWS, "train.microbatches": 1, "train.sample_every": 0},
    **{"train.eval_every": 0, "train.log_every": 50, "checkpoint.every": 1000, "optimizer.ema_decay": 0.0},
    **{"model.embd_pdrop": 0.0, "model.attn_pdrop": 0.0, "model.resid_pdrop": 0.0},
}

Spiked = tuple[pathlib.Path, list[RecordedBatch], Finished]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def spiked(tiny: Workshop) -> Spiked:
    """Thirty documents of one sentence, and in one of them something that training has not seen."""
    files = tiny.folder / "one odd document"
    files.mkdir()
    for number in range(30):
        (files / f"{number:02d}.txt").write_text(PLAIN + ODD + PLAIN if number == 17 else PLAIN)
    folder = tiny.folder / "spiked"
    return folder, *recorded_run(tiny, folder, {**SETTINGS, "data.source": f"text:{files}/*.txt"})


def odd_targets(batch: RecordedBatch) -> int:
    return sum(128 <= target < 256 for row in batch["targets"] for target in row)


def blame(folder: pathlib.Path, step: int) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["data", "blame", f"--workdir={folder}", f"--step={step}", "--json"]) == 0
    return out.getvalue()


def test_spikes_are_noted_where_the_odd_text_was_read_and_nowhere_else(spiked: Spiked) -> None:
    folder, batches, done = spiked
    events = read_events(folder / "events.jsonl")
    assert {event["event"] for event in events} == {"loss_spike"}
    noted = [event["step"] for event in events]
    assert len(set(noted)) == len(noted)
    odd = {step: odd_targets(batch) for step, batch in enumerate(batches, start=1)}
    assert set(noted) <= {step for step, count in odd.items() if count}
    late = {step for step, count in odd.items() if count >= T // 2 and step > 250}
    assert len(late) >= 5
    assert late <= set(noted)
    for event in events:
        assert event["loss"] > event["mean"] + 6 * event["deviation"]
        assert f"step {event['step']}: loss spike {event['loss']:.4f}" in done.err
    said = [line for line in done.err.splitlines() if "loss spike" in line]
    assert len(said) == len(events)


def test_the_events_name_the_windows_and_the_document(spiked: Spiked) -> None:
    folder, batches, _ = spiked
    store = pathlib.Path(json.loads((folder / "run.json").read_text())["data"]["folder"])
    ids = np.concatenate([np.fromfile(file, "<u2") for file in sorted(store.glob("train_*.bin"))])
    places = np.flatnonzero((ids >= 128) & (ids < 256))
    holding = {int(place - 1) // T for place in places}  # as targets
    document = int((ids[: places[0]] == 256).sum())  # each before it has ended
    for event in read_events(folder / "events.jsonl"):
        batch = batches[event["step"] - 1]
        assert event["batch"] == event["step"] - 1
        assert len(event["windows"]) == ROWS
        for window, tokens in zip(event["windows"], batch["tokens"], strict=True):
            assert ids[window * T : window * T + T].tolist() == tokens
        assert set(event["windows"]) & holding
        assert document in event["documents"]
        ends = np.flatnonzero(ids == 256)
        spans = {int(np.searchsorted(ends, w * T + n)) for w in event["windows"] for n in range(T + 1)}
        assert event["documents"] == sorted(spans)


def test_blame_shows_the_text(spiked: Spiked) -> None:
    folder, batches, done = spiked
    for event in read_events(folder / "events.jsonl"):
        assert f"gpt2-jax data blame --workdir={folder} --step={event['step']}\n" in done.err
        rows = [json.loads(line) for line in blame(folder, event["step"]).splitlines()]
        assert [row["window"] for row in rows] == event["windows"]
        shown = [
            row["text"]
            for row, targets in zip(rows, batches[event["step"] - 1]["targets"], strict=True)
            if sum(128 <= target < 256 for target in targets) > 6
        ]
        assert all(any(character in text for character in ODD) for text in shown)


@pytest.mark.faults
def test_no_spikes_without_odd_text_or_where_they_are_off(tiny: Workshop, spiked: Spiked) -> None:
    """The ordinary noise of small batches, and the fall of the loss at the beginning, are none."""
    ordinary = tiny.folder / "ordinary"
    assert tiny.run(ordinary, {"train.steps": 300, "train.eval_every": 0, "train.sample_every": 0}).code == 0
    assert not (ordinary / "events.jsonl").exists()
    settings = {**SETTINGS, "data.source": f"text:{tiny.folder / 'one odd document'}/*.txt", "train.spike_sigmas": 0}
    assert tiny.run(tiny.folder / "off", settings).code == 0
    assert not (tiny.folder / "off" / "events.jsonl").exists()
