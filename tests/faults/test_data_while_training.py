"""Token shards that are cut short, removed or written over while train.py reads them: a line, never a dead process."""

import os
import pathlib
import subprocess
import time

import numpy as np
import pytest
from tiny_run import Finished, Workshop, contents, finish, workshop

from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.token_store import TokenStore, open_token_store
from gpt2_jax.errors import DataError

LONG = {
    "train.steps": 100_000,
    "train.eval_every": 0,
    "train.sample_every": 0,
    "checkpoint.every": 20,
    "optimizer.schedule": "constant",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.fixture
def store(tiny: Workshop, tmp_path: pathlib.Path) -> TokenStore:
    source, out = f"text:{tiny.corpus}", tmp_path / "tokens"
    return prepare(source=source, tokenizer_name="bytes", out=out, workers=1, progress=False)


def shard_of(store: TokenStore, split: str) -> pathlib.Path:
    (shard,) = store.manifest.splits[split]
    return store.folder / shard.file


def training(tiny: Workshop, run: pathlib.Path, store: TokenStore, **settings: object) -> subprocess.Popen:
    """A run on the store, which has saved a step."""
    process = tiny.start(run, {**LONG, "data.source": f"tokens:{store.folder}", **settings}, quick=True)
    end = time.monotonic() + 200
    while not any(step.name.isdecimal() for step in (run / "checkpoints").glob("*")):
        assert process.poll() is None, finish(process).err
        assert time.monotonic() < end, "nothing is saved"
        time.sleep(0.05)
    return process


def ends_in_one_line(done: Finished, *fragments: str) -> None:
    assert done.code == 3, done.err
    assert "Traceback" not in done.err
    for fragment in ("train.py: error: ", *fragments):
        assert fragment in done.err.splitlines()[-1], done.err


@pytest.mark.faults
def test_a_shard_cut_short_ends_the_run_in_a_line_and_it_goes_on_when_it_is_back(
    tiny: Workshop, store: TokenStore, tmp_path: pathlib.Path
) -> None:
    shard, run = shard_of(store, "train"), tmp_path / "run"
    whole = shard.read_bytes()
    process = training(tiny, run, store)
    os.truncate(shard, 100)
    ends_in_one_line(finish(process), str(shard), "is cut off after 100 bytes", "put the file back")

    ends_in_one_line(tiny.run(run, {**LONG, "data.source": f"tokens:{store.folder}"}, quick=True), str(shard))
    shard.write_bytes(whole)
    saved = max(int(step.name) for step in (run / "checkpoints").glob("*") if step.name.isdecimal())
    more = {**LONG, "data.source": f"tokens:{store.folder}", "train.steps": saved + 5}
    done = tiny.run(run, more, quick=True)
    assert done.code == 0, done.err
    assert f"resumed after step {saved}" in done.err


@pytest.mark.faults
def test_removed_shards_are_harmless_to_a_run_that_has_opened_them_and_a_line_to_another(
    tiny: Workshop, store: TokenStore, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    process = training(tiny, run, store)
    shard_of(store, "train").unlink()
    before = contents(run / "checkpoints")
    end = time.monotonic() + 200
    while set(contents(run / "checkpoints")) <= set(before):  # it goes on, and saves again
        assert process.poll() is None, finish(process).err
        assert time.monotonic() < end
        time.sleep(0.1)
    process.kill()
    finish(process)
    settings = {**LONG, "data.source": f"tokens:{store.folder}"}
    ends_in_one_line(tiny.run(run, settings, quick=True), str(shard_of(store, "train")), "missing")


def test_what_is_read_is_what_was_checked_or_an_error(store: TokenStore) -> None:
    """Another program writes to a shard that is open."""
    shard = shard_of(store, "train")
    whole = shard.read_bytes()
    dtype = np.dtype(store.manifest.dtype).newbyteorder("<")
    ids = np.frombuffer(whole, dtype)
    stream = open_token_store(store.folder).split("train")
    np.testing.assert_array_equal(stream.read(0, len(stream)), ids)

    os.truncate(shard, 50 * dtype.itemsize)
    np.testing.assert_array_equal(stream.read(0, 50), ids[:50])
    for start, stop in ((0, 51), (49, 52), (60, 70)):
        with pytest.raises(DataError, match=f"{shard}: is cut off after [0-9]+ bytes, .*; put the file back"):
            stream.read(start, stop)
    with open(shard, "r+b") as opened:
        opened.write(np.full(50, store.manifest.vocab_size, dtype).tobytes())
    with pytest.raises(DataError, match=f"has an id {store.manifest.vocab_size}, more than its largest"):
        stream.read(10, 20)
    with open(shard, "r+b") as opened:
        opened.write(whole)
    np.testing.assert_array_equal(stream.read(0, len(stream)), ids)


def test_a_shard_that_is_gone_before_it_is_opened(store: TokenStore) -> None:
    stream = open_token_store(store.folder).split("train")
    shard_of(store, "train").unlink()
    with pytest.raises(DataError, match=r"cannot be opened \(No such file or directory\)"):
        stream.read(0, 1)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted through /proc")
def test_files_are_closed_with_their_stream(store: TokenStore) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        stream = store.split("train")
        stream.read(0, 5)
    del stream
    assert len(os.listdir("/proc/self/fd")) == before
