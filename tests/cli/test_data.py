"""The command `gpt2-jax data blame`: against a recording of what a real training put on its devices."""

import contextlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from recorded_run import RecordedBatch, recorded_run
from storage_emulator import storage
from tiny_run import Finished, Workshop, kept_settings, workshop

from gpt2_jax.cli.main import main
from gpt2_jax.config_file import from_json, run_config
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.token_store import open_token_store
from gpt2_jax.remote_folder import pull, push
from gpt2_jax.run.run_folder import make_folder, write_run

STEPS = 8

Recorded = tuple[pathlib.Path, list[RecordedBatch]]

SMALL = {
    **{"train.steps": STEPS, "train.batch_size": 4, "train.microbatches": 1, "train.sample_every": 0},
    **{"train.eval_every": 0, "train.log_every": 4, "checkpoint.every": 100, "optimizer.warmup_steps": 1},
    **{"model.n_layer": 1, "optimizer.ema_decay": 0.0, "data.held_out": 0.2},
    "seed": 1,
}
KINDS = {
    "packed": {"train.context_lengths": "8,16"},
    "padded": {"data.windows": "padded", "train.context_lengths": "4,16"},
}


def documents(tiny: Workshop) -> dict[str, str]:
    """Names and texts of the corpus of several files."""
    return {f"{n:02d}.txt": f"document {n}: " + f"{n} and\t{n}\n" * (1 + n % 7) for n in range(40)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    tiny = workshop(tmp_path_factory.getbasetemp())
    (tiny.folder / "files").mkdir()
    for name, text in documents(tiny).items():
        (tiny.folder / "files" / name).write_text(text)
    return tiny


@pytest.fixture(scope="module", params=list(KINDS))
def recorded(request: pytest.FixtureRequest, tiny: Workshop) -> Recorded:
    """A run of one kind, and what it read in each step. Look, do not touch."""
    folder = tiny.folder / f"recorded {request.param}"
    settings = {**SMALL, **KINDS[request.param], "data.source": f"text:{tiny.folder / 'files'}/*.txt"}
    return folder, recorded_run(tiny, folder, settings)[0]


def blame(*arguments: object) -> Finished:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_settings():
        code = main(["data", "blame", *map(str, arguments)])
    return Finished(code, out.getvalue(), err.getvalue())


def rows_of(folder: pathlib.Path | str, step: int, *more: str) -> list[dict[str, Any]]:
    done = blame(f"--workdir={folder}", f"--step={step}", "--json", *more)
    assert (done.code, done.err) == (0, "")
    return [json.loads(line) for line in done.out.splitlines()]


def refused(done: Finished, code: int, *fragments: str) -> None:
    assert (done.code, done.out) == (code, ""), done
    assert done.err.count("\n") == 1
    assert done.err.startswith("gpt2-jax: error: ")
    assert all(fragment in done.err for fragment in fragments), done.err


def assert_read(rows: list[dict[str, Any]], batch: RecordedBatch) -> None:
    """The rows are those of a recorded batch, bit for bit, but for its padding."""
    assert len(rows) == len(batch["tokens"])
    for row, tokens, targets, weights in zip(rows, batch["tokens"], batch["targets"], batch["weights"], strict=True):
        count = sum(weight > 0 for weight in weights)
        assert row["ids"][:-1] == tokens[:count]
        assert row["ids"][1:] == targets[:count]


def test_it_shows_what_training_read(recorded: Recorded, tiny: Workshop) -> None:
    folder, batches = recorded
    texts = list(documents(tiny).values())
    assert len(batches) == STEPS
    assert len({len(batch["tokens"]) for batch in batches}) == 2  # both lengths were drawn
    of_documents = 0
    for step, batch in enumerate(batches, start=1):
        rows = rows_of(folder, step)
        assert_read(rows, batch)
        for number, row in enumerate(rows):
            assert (row["step"], row["batch"], row["row"]) == (step, step - 1, number)
            # Bytes are the ids of `bytes`, and 256 ends a text: so the text and its documents are read off the ids.
            assert row["text"].replace("<|endoftext|>", "") == bytes(id for id in row["ids"] if id < 256).decode()
            for piece in row["documents"]:
                if piece["offset"] == 0 and piece["tokens"] > 13:
                    assert any(text[:12] in row["text"] for text in texts)
                    of_documents += 1
    assert of_documents > 3


def test_documents_are_those_of_the_corpus(recorded: Recorded, tiny: Workshop) -> None:
    """A document's number, offset and length cut the row's own bytes out of the files that were kept for training."""
    folder, _ = recorded
    store = open_token_store(json.loads((folder / "run.json").read_text())["data"]["folder"])
    stream = store.split("train")
    whole = bytes(id if id < 256 else 0 for id in stream.read(0, len(stream)).tolist())
    kept = whole.split(b"\0")[:-1]  # in the order of the split
    assert set(kept) < {text.encode() for text in documents(tiny).values()}
    for step in range(1, STEPS + 1):
        for row in rows_of(folder, step):
            cut = b"".join(
                (kept[piece["document"]] + b"\0")[piece["offset"] : piece["offset"] + piece["tokens"]]
                for piece in row["documents"]
            )
            ids = bytes(id if id < 256 else 0 for id in row["ids"])
            # Padded windows put an end-of-text, which is of no document, ahead of each.
            assert cut == ids or (cut == ids[1:] and ids[0] == 0)


def test_skipped_batches_are_honoured(recorded: Recorded, tmp_path: pathlib.Path) -> None:
    folder, batches = recorded
    for name in ("run.json", "config.json"):
        shutil.copy(folder / name, tmp_path)
    about = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**about, "skipped": [{"at": 2, "batches": 3}]}))
    for step, number in ((1, 0), (2, 1), (3, 5), (4, 6), (5, 7)):
        rows = rows_of(tmp_path, step)
        assert_read(rows, batches[number])
        assert {row["batch"] for row in rows} == {number}
    done = blame(f"--workdir={tmp_path}", "--step=3")
    assert "step 3: batch 5, counted from 0 (3 batches skipped); " in done.out
    (tmp_path / "run.json").write_text(json.dumps({**about, "skipped": [{"at": 2, "batches": 0}]}))
    refused(blame(f"--workdir={tmp_path}", "--step=3"), 3, "run.json: skipped[0]: ")


def test_as_text(recorded: Recorded) -> None:
    folder, _ = recorded
    rows = rows_of(folder, 2)
    done = blame(f"--workdir={folder}", "--step=2", "--chars=0")
    head, *lines = done.out.splitlines()
    assert head.startswith(f"step 2: batch 1, counted from 0; {len(rows)} rows; ")
    assert len(lines) == 2 * len(rows)  # line breaks in texts are shown, not printed
    for row, about, text in zip(rows, lines[::2], lines[1::2], strict=True):
        assert about.startswith(f"row {row['row']}: window {row['window']}, {len(row['ids'])} tokens")
        for piece in row["documents"]:
            last = piece["offset"] + piece["tokens"] - 1
            assert f"{piece['document']} (tokens {piece['offset']} to {last})" in about
        assert text == "    " + row["text"].replace("\n", r"\n").replace("\t", r"\t")
    some = blame(f"--workdir={folder}", "--step=2", "--rows=1:2", "--chars=3").out.splitlines()
    assert [line.partition(":")[0] for line in some[1::2]] == ["row 1", "row 2"]
    for row, text in zip(rows[1:3], some[2::2], strict=True):
        wanted = row["text"] if len(row["text"]) <= 3 else row["text"][:3] + "..."
        assert text == "    " + wanted.replace("\n", r"\n").replace("\t", r"\t")
    cut = rows_of(folder, 2, "--chars=5", "--rows=0:0")
    assert [row["text"] for row in cut] == [rows[0]["text"][:5]]


def test_it_needs_no_device(recorded: Recorded, tiny: Workshop) -> None:
    """On a machine where JAX finds none."""
    folder, batches = recorded
    script = "import sys; from gpt2_jax.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "data", "blame", f"--workdir={folder}", "--step=3", "--json"],
        env={**tiny.environment(), "JAX_PLATFORMS": "a_device_of_tomorrow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_read([json.loads(line) for line in done.stdout.splitlines()], batches[2])


def test_what_is_asked_for_wrongly(recorded: Recorded, tmp_path: pathlib.Path) -> None:
    folder, batches = recorded
    for step in (0, -1, STEPS + 1):
        refused(blame(f"--workdir={folder}", f"--step={step}"), 2, f"--step={step}", f"has the steps 1 to {STEPS}")
    last = len(batches[0]["tokens"]) - 1
    for rows in ("1", "2:1", f"0:{last + 1}", "-1:2", "a:b", ":"):
        refused(blame(f"--workdir={folder}", "--step=1", f"--rows={rows}"), 2, f"--rows={rows}", f"from 0 to {last}")
    refused(blame(f"--workdir={folder}", "--step=1", "--chars=-1"), 2, "--chars=-1")
    refused(blame(f"--workdir={folder}", "--step=one"), 2, "--step", "gpt2-jax data blame --help")
    refused(blame(f"--workdir={folder}"), 2, "--step")
    refused(blame(f"--workdir={tmp_path}", "--step=1"), 3, f"{tmp_path} is not a run folder")
    refused(blame(f"--workdir={folder}", "--step=1", f"--data={tmp_path / 'none'}"), 2, "none")


def copied(recorded: Recorded, to: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A run folder and a token store like those recorded, to be damaged."""
    run, store = to / "run", to / "store"
    run.mkdir()
    for name in ("run.json", "config.json"):
        shutil.copy(recorded[0] / name, run)
    about = json.loads((run / "run.json").read_text())
    shutil.copytree(about["data"]["folder"], store)
    about["data"]["folder"] = str(store)
    (run / "run.json").write_text(json.dumps(about))
    return run, store


def test_data_that_was_moved_is_found_where_it_is_said_to_be(recorded: Recorded, tmp_path: pathlib.Path) -> None:
    run, store = copied(recorded, tmp_path)
    store.rename(tmp_path / "moved")
    refused(blame(f"--workdir={run}", "--step=1"), 3, str(run), str(store), "not there", "--data=DIR")
    assert_read(rows_of(run, 1, f"--data={tmp_path / 'moved'}"), recorded[1][0])


def test_data_that_was_changed_is_refused(recorded: Recorded, tiny: Workshop, tmp_path: pathlib.Path) -> None:
    run, store = copied(recorded, tmp_path)
    shard = store / "train_00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1  # as long as before, and in the manifest as before
    shard.write_bytes(content)
    refused(blame(f"--workdir={run}", "--step=1"), 3, str(shard), "sha256")
    shutil.rmtree(store)
    source = f"--source=text:{tiny.corpus}"
    assert main(["prepare", source, "--tokenizer=bytes", f"--out={store}"]) == 0
    refused(blame(f"--workdir={run}", "--step=1"), 3, str(run), str(store), "was trained on data ")


def test_nanogpt_files_do_not_know_their_documents(tmp_path: pathlib.Path) -> None:
    """In the folder of a run that has saved no step yet."""
    for name, count in (("train.bin", 400), ("val.bin", 100)):
        (tmp_path / name).write_bytes(np.arange(count, dtype="<u2").tobytes())
    store = prepare(source=f"nanogpt:{tmp_path}", tokenizer_name="gpt2", out=tmp_path / "store")
    train = {"steps": 5, "batch_size": 4, "context_length": 16}
    config = run_config({"train": train, "optimizer": {"warmup_steps": 1}})
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", config, {"folder": str(store.folder), "fingerprint": store.fingerprint})
    rows, text = rows_of(tmp_path / "run", 2), blame(f"--workdir={tmp_path / 'run'}", "--step=2").out
    assert [row["documents"] for row in rows] == [None] * 4
    assert len({row["window"] for row in rows}) == 4
    for row in rows:
        first = 16 * row["window"]
        assert row["ids"] == list(range(first, first + 17))
    assert "where its documents begin is not recorded" in text


def test_a_run_in_a_bucket(recorded: Recorded, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = storage()
    folder, batches = recorded
    mirror = make_folder("gs://bucket/runs/blamed")
    pull(mirror)
    for name in ("run.json", "config.json"):
        shutil.copy(folder / name, mirror)
    push(mirror)
    done = blame("--workdir=gs://bucket/runs/blamed", "--step=2", "--json")
    assert done.code == 0, done.err
    assert_read([json.loads(line) for line in done.out.splitlines()], batches[1])
    assert from_json(bucket.get("runs/blamed/config.json").decode()).train.steps == STEPS
    nothing = blame("--workdir=gs://bucket/runs/nothing", "--step=1")
    assert (nothing.code, nothing.out) == (3, "")
    assert "gs://bucket/runs/nothing is not a run folder" in nothing.err
