"""What is noted of a spike, and of what nothing is: on a real store, with losses that are given."""

import io
import math
import pathlib

import numpy as np
import pytest

from gpt2_jax.config import TrainConfig
from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.skipped import Skip
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.data.windows import PackedWindows
from gpt2_jax.run.events import read_events
from gpt2_jax.run.progress import Progress
from gpt2_jax.run.step_watch import StepWatch

T, ROWS = 8, 4


@pytest.fixture
def store(tmp_path: pathlib.Path) -> TokenStore:
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text(chr(ord("A") + number) * (5 + number))
    return prepare(source=f"text:{tmp_path}/*.txt", tokenizer_name="bytes", out=tmp_path / "store")


def batches(store: TokenStore, **options: object) -> TrainBatches:
    return TrainBatches(PackedWindows(store.split("train"), T), batch_size=ROWS, seed=0, **options)


def watch(folder: pathlib.Path, store: TokenStore, **options: object) -> tuple[StepWatch, io.StringIO]:
    """One that has seen the losses of 40 steps."""
    said = io.StringIO()
    config = TrainConfig(spike_sigmas=6.0, max_skipped_steps=2)
    watch = StepWatch(config, 1, batches(store, **options), store, folder, Progress(0, 100, said))
    for step in range(1, 41):
        watch(step, values(3.0 + 0.1 * (step % 3)))
    return watch, said


def values(loss: float, weight: float = 32.0, **more: float) -> dict[str, float]:
    finite = {"loss_sum": loss * weight, "weight_sum": weight, "grad_norm": 1.0, "skipped": 0.0}
    return {**finite, "nonfinite_steps": 1.0, **more}


@pytest.mark.parametrize("skips", [(), (Skip(10, 5), Skip(41, 100))])
def test_all_rows_of_the_batch_are_named_whichever_host_feeds_them(
    store: TokenStore, tmp_path: pathlib.Path, skips: tuple[Skip, ...]
) -> None:
    spiked, said = watch(tmp_path, store, rows=[1, 2], skips=skips)
    spiked(41, values(9.0))
    (event,) = read_events(tmp_path / "events.jsonl")
    index = 40 + sum(skip.batches for skip in skips if skip.at <= 40)
    windows = batches(store).window_indices(index)
    assert event == {
        **{"event": "loss_spike", "step": 41, "loss": 9.0, "batch": index, "windows": windows},
        "mean": pytest.approx(3.1, abs=0.01),
        "deviation": pytest.approx(np.std([3.0, 3.1, 3.2]), abs=0.01),
        "documents": event["documents"],
    }
    # A document is a letter: which ones the windows touch is read off their texts.
    stream = store.split("train")
    order = list(dict.fromkeys(one for one in stream.read(0, len(stream)).tolist() if one != 256))
    letters = {one for window in windows for one in stream.read(window * T, window * T + T + 1).tolist()} - {256}
    assert {order[document] for document in event["documents"]} >= letters
    assert len(event["documents"]) <= len(letters) + ROWS  # those of which only the end is touched
    (line,) = said.getvalue().splitlines()
    assert "step 41: loss spike 9.0000, usual 3.1" in line
    assert line.endswith(f"gpt2-jax data blame --workdir={tmp_path} --step=41")


def test_what_is_none(store: TokenStore, tmp_path: pathlib.Path) -> None:
    spiked, said = watch(tmp_path, store)
    spiked(41, values(3.3))
    spiked(42, values(50.0, skipped=1.0, loss_scale=8.0))  # changed nothing
    spiked(45, values(5.0, weight=0.0))
    assert said.getvalue() == ""
    assert not (tmp_path / "events.jsonl").exists()
    spiked(46, values(50.0))
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [46]


def test_what_was_left_out_is_noted_once_for_each(store: TokenStore, tmp_path: pathlib.Path) -> None:
    spiked, said = watch(tmp_path, store)
    spiked(41, values(math.nan, skipped=1.0, nonfinite_steps=2.0))
    spiked(42, values(3.1, nonfinite_steps=2.0))
    spiked(43, values(math.inf, skipped=1.0, nonfinite_steps=3.0))
    first, second = read_events(tmp_path / "events.jsonl")
    assert (first["event"], first["step"], first["loss_sum"], first["nonfinite_steps"]) == ("not_finite", 41, "nan", 2)
    assert first["windows"] == batches(store).window_indices(40)
    assert (second["step"], second["loss_sum"], second["nonfinite_steps"]) == (43, "inf", 3)
    assert "step 41: loss or gradient not finite, left out (2 so far, 2 allowed)" in said.getvalue()


def test_documents_that_cannot_be_told_stop_nothing(store: TokenStore, tmp_path: pathlib.Path) -> None:
    spiked, said = watch(tmp_path, store)
    lengths = store.folder / "train_00000.lengths.npy"
    lengths.write_bytes(lengths.read_bytes()[:50])
    spiked(41, values(9.0))
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["documents"] is None
    assert event["windows"] == batches(store).window_indices(40)
    assert f"without its documents ({lengths}: not the document lengths" in said.getvalue()
