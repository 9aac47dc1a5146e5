"""Token stores: reading across shards, and everything that can be wrong in a folder."""

import dataclasses
import hashlib
import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from gpt2_jax.data import token_store
from gpt2_jax.data.token_store import Manifest, Shard, TokenStream, open_token_store
from gpt2_jax.errors import DataError
from gpt2_jax.tokenizer import make_tokenizer

# train: documents of 3, 1 and 4 tokens in two shards; held_out: one document
TRAIN = [[10, 11, 256, 256, 12], [13, 14, 256]]
LENGTHS = [[3, 1, 1], [3]]
HELD_OUT = [20, 256]


def sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_shard(folder: pathlib.Path, name: str, tokens: list[int], lengths: list[int], dtype: str = "<u2") -> Shard:
    file, lengths_file = folder / f"{name}.bin", folder / f"{name}.lengths.npy"
    file.write_bytes(np.array(tokens, dtype).tobytes())
    np.save(lengths_file, np.array(lengths, np.int64))
    return Shard(
        file=file.name,
        tokens=len(tokens),
        max_id=max(tokens),
        sha256=sha256(file),
        documents=len(lengths),
        lengths_file=lengths_file.name,
        lengths_sha256=sha256(lengths_file),
    )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    store = tmp_path / "store"
    tokenizer = make_tokenizer("bytes")
    tokenizer.save(store)
    train = tuple(write_shard(store, f"train_{n}", *part) for n, part in enumerate(zip(TRAIN, LENGTHS, strict=True)))
    held_out = (write_shard(store, "held_out_0", HELD_OUT, [2]),)
    Manifest(
        key="k",
        source="made by hand",
        tokenizer="bytes",
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=257,
        dtype="uint16",
        empty_documents=0,
        splits={"train": train, "held_out": held_out},
    ).write(store)
    return store


def edit(folder: pathlib.Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: pathlib.Path, *arguments: object) -> str:
    with pytest.raises(DataError) as error:
        open_token_store(folder, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_streams(folder: pathlib.Path) -> None:
    store = open_token_store(folder)
    stream = store.split("train")
    flat = TRAIN[0] + TRAIN[1]
    assert len(stream) == len(flat)
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            tokens = stream.read(start, stop)
            assert tokens.dtype == np.int32
            assert tokens.tolist() == flat[start:stop]
    assert stream.document_lengths.tolist() == [3, 1, 1, 3]
    assert store.split("held_out").read(0, 2).tolist() == HELD_OUT
    assert (store.num_documents("train"), store.num_documents("held_out")) == (4, 1)
    assert store.tokenizer.name == "bytes"
    store.verify()


@pytest.mark.parametrize("start, stop", [(-1, 2), (0, 9), (3, 2), (9, 9)])
def test_reading_outside_the_stream(folder: pathlib.Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        open_token_store(folder).split("train").read(start, stop)


def test_streams_are_pickled_without_their_data(folder: pathlib.Path) -> None:
    stream = open_token_store(folder).split("train")
    stream.read(0, 8)
    copy = pickle.loads(pickle.dumps(stream))
    assert copy._opened == {}
    assert copy.read(4, 7).tolist() == [12, 13, 14]


def test_few_files_are_open_at_a_time(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "_OPEN_SHARDS", 1)
    stream = open_token_store(folder).split("train")
    assert stream.read(0, 8).tolist() == TRAIN[0] + TRAIN[1]
    assert len(stream._opened) == 1


def test_large_ids(tmp_path: pathlib.Path) -> None:
    shard = write_shard(tmp_path, "train", [70_000, 1], [2], "<u4")
    assert TokenStream("train", tmp_path, (shard,), np.dtype("<u4")).read(0, 2).tolist() == [70_000, 1]


def test_fingerprint_is_of_the_content(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(folder, tmp_path / "moved")
    edit(tmp_path / "moved", source="elsewhere", key="other")
    store, moved = open_token_store(folder), open_token_store(tmp_path / "moved")
    assert store.fingerprint == moved.fingerprint
    splits = store.manifest.splits
    swapped = splits | {"train": splits["train"][::-1]}
    for change in ({"splits": swapped}, {"tokenizer_fingerprint": "x"}, {"dtype": "uint32"}):
        assert dataclasses.replace(store.manifest, **change).fingerprint != store.fingerprint


def test_tokenizer_must_be_the_same(folder: pathlib.Path) -> None:
    own, other = make_tokenizer("bytes"), make_tokenizer("bytes", lowercase=True)
    open_token_store(folder, own)
    open_token_store(folder, own.fingerprint)
    message = refused(folder, other)
    assert own.fingerprint in message and other.fingerprint in message
    other.save(folder)
    with pytest.raises(DataError, match="made by the tokenizer bytes"):
        _ = open_token_store(folder).tokenizer


def test_no_store(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    assert "gpt2-jax prepare" in refused(tmp_path)
    assert "gpt2-jax prepare" in refused(folder / "train_0.bin")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "format version None"),
        ('{"format_version": 2}', "format version 2"),
        ('{"format_version": 1}', "damaged"),
        ('{"format_version": 1, "splits": {"train": [3], "held_out": []}}', "damaged"),
        ('{"format_version": 1, "splits": {"train": [{"x": 1}], "held_out": []}}', "damaged"),
    ],
)
def test_damaged_manifest(folder: pathlib.Path, content: str, message: str) -> None:
    (folder / "manifest.json").write_text(content)
    assert message in refused(folder)


@pytest.mark.parametrize("change", [{"dtype": "uint32"}, {"dtype": "nonsense"}, {"tokenizer_fingerprint": "x"}])
def test_edited_manifest(folder: pathlib.Path, change: dict) -> None:
    edit(folder, **change)
    refused(folder)


def test_truncated_shard(folder: pathlib.Path) -> None:
    file = folder / "train_0.bin"
    file.write_bytes(file.read_bytes()[:-1])
    message = refused(folder)
    assert str(file) in message and "9 bytes" in message and "take 10" in message


def test_missing_shard(folder: pathlib.Path) -> None:
    (folder / "train_1.bin").unlink()
    assert "train_1.bin: missing" in refused(folder)


def test_id_outside_the_vocabulary(folder: pathlib.Path) -> None:
    edit(folder, vocab_size=256)
    assert "largest id 256 is outside the vocabulary, 0 to 255" in refused(folder)


@pytest.mark.parametrize("file", ["train_1.bin", "train_1.lengths.npy"])
def test_verify_finds_a_flipped_byte(folder: pathlib.Path, file: str) -> None:
    data = bytearray((folder / file).read_bytes())
    data[-2] ^= 1
    (folder / file).write_bytes(data)
    store = open_token_store(folder)
    with pytest.raises(DataError, match=file):
        store.verify()


def test_damaged_lengths(folder: pathlib.Path) -> None:
    stream = open_token_store(folder).split("train")
    (folder / "train_0.lengths.npy").write_bytes(b"not an array")
    with pytest.raises(DataError, match=r"train_0\.lengths\.npy: not the document lengths"):
        _ = stream.document_lengths
    np.save(folder / "train_0.lengths.npy", np.array([3, 1]))
    with pytest.raises(DataError, match="2 documents of 4 tokens; the manifest says 3 of 5"):
        _ = stream.document_lengths
