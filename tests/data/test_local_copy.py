"""Token stores at gs:// against a storage server on this machine: what is copied, when, and what is refused."""

import concurrent.futures
import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest
from storage_emulator import Storage, storage

from gpt2_jax.data.local_copy import copy_token_store
from gpt2_jax.data.prepare import ensure_prepared, prepare
from gpt2_jax.data.token_store import TokenStore, open_token_store
from gpt2_jax.errors import DataError, UsageError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store of three files of text."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"{number} words " * 500)
    return prepare(source=f"text:{folder}/*.txt", tokenizer_name="chars", held_out=0.3, out=folder / "store", workers=1)


@pytest.fixture
def bucket(prepared: TokenStore, request: pytest.FixtureRequest) -> tuple[Storage, str]:
    """The server, and the name of a copy of the store in it."""
    server, name = storage(), f"stores/{request.node.name.partition('[')[0]}"
    server.put_folder(name, prepared.folder)
    return server, name


def manifest(store: TokenStore) -> dict[str, Any]:
    return json.loads((store.folder / "manifest.json").read_text())


def hashes(store: TokenStore) -> dict[str, str]:
    """Hash to file of everything that the manifest lists."""
    shards = [shard for split in store.manifest.splits.values() for shard in split]
    assert len(shards) > 1
    return {shard.sha256: shard.file for shard in shards} | {
        str(shard.lengths_sha256): str(shard.lengths_file) for shard in shards
    }


def test_the_copy_is_the_store(prepared: TokenStore, bucket: tuple[Storage, str], tmp_path: pathlib.Path) -> None:
    server, name = bucket
    copy = ensure_prepared(source=f"tokens:gs://bucket/{name}", cache_dir=tmp_path)
    copy.verify()
    assert copy.fingerprint == prepared.fingerprint
    assert copy.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    for split in ("train", "held_out"):
        ours, theirs = copy.split(split), prepared.split(split)
        np.testing.assert_array_equal(ours.read(0, len(ours)), theirs.read(0, len(theirs)))
        np.testing.assert_array_equal(ours.document_lengths, theirs.document_lengths)
    assert set(os.listdir(tmp_path / "shards")) == set(hashes(prepared))
    assert sorted(os.listdir(tmp_path)) == ["copies", "shards"]

    # Another address with the same content shares the files.
    server.put_folder(f"{name}-again", prepared.folder)
    copy_token_store(f"gs://bucket/{name}-again/", tmp_path)
    assert [server.reads(f"{name}-again/{file}") for file in hashes(prepared).values()] == [0] * len(hashes(prepared))


def test_only_what_is_missing_or_damaged_is_copied_again(
    prepared: TokenStore, bucket: tuple[Storage, str], tmp_path: pathlib.Path
) -> None:
    server, name = bucket
    copy_token_store(f"gs://bucket/{name}", tmp_path)
    missing, damaged, *_ = sorted(hashes(prepared))
    (tmp_path / "shards" / missing).unlink()
    content = bytearray((tmp_path / "shards" / damaged).read_bytes())
    content[-1] ^= 1
    (tmp_path / "shards" / damaged).write_bytes(content)
    (tmp_path / "shards" / f"{missing}.12345.tmp").write_text("of a process that was killed")
    open_token_store(copy_token_store(f"gs://bucket/{name}", tmp_path)).verify()
    reads = {sha256: server.reads(f"{name}/{file}") for sha256, file in hashes(prepared).items()}
    assert reads == {sha256: 2 if sha256 in (missing, damaged) else 1 for sha256 in reads}
    assert set(os.listdir(tmp_path / "shards")) == set(hashes(prepared))


def test_those_who_ask_at_once_copy_once(
    prepared: TokenStore, bucket: tuple[Storage, str], tmp_path: pathlib.Path
) -> None:
    server, name = bucket
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(copy_token_store, f"gs://bucket/{name}", tmp_path) for _ in range(4)]
        (folder,) = {done.result() for done in asked}
    open_token_store(folder).verify()
    assert [server.reads(f"{name}/{file}") for file in hashes(prepared).values()] == [1] * len(hashes(prepared))


def test_a_shard_that_is_not_what_the_manifest_says(
    prepared: TokenStore, bucket: tuple[Storage, str], tmp_path: pathlib.Path
) -> None:
    server, name = bucket
    sha256, file = min(hashes(prepared).items())
    server.put(f"{name}/{file}", b"other bytes")
    with pytest.raises(DataError, match=f"gs://bucket/{name}/{file}: sha256 is [0-9a-f]+, .* says {sha256}"):
        copy_token_store(f"gs://bucket/{name}", tmp_path)
    assert sha256 not in os.listdir(tmp_path / "shards")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("sha256", "../../evil", "no sha256"),
        ("sha256", 7, "no sha256"),
        ("file", "/etc/passwd", "own folder"),
        ("file", "../other/train.bin", "own folder"),
        ("lengths_sha256", None, "no sha256"),
    ],
)
def test_a_manifest_that_leads_elsewhere(
    prepared: TokenStore, bucket: tuple[Storage, str], tmp_path: pathlib.Path, field: str, value: Any, told: str
) -> None:
    server, name = bucket
    content = manifest(prepared)
    content["splits"]["train"][0][field] = value
    with pytest.raises(DataError) as refused:  # for the hashes are part of the fingerprint
        server.put(f"{name}/manifest.json", json.dumps(content).encode())
        copy_token_store(f"gs://bucket/{name}", tmp_path)
    if field == "file":
        assert told in str(refused.value)
    assert f"gs://bucket/{name}/manifest.json: " in str(refused.value)
    assert not list(tmp_path.rglob("*"))


def test_no_store_there(tmp_path: pathlib.Path) -> None:
    storage()
    with pytest.raises(UsageError, match="source 'tokens:gs://bucket/nothing': no manifest.json there"):
        ensure_prepared(source="tokens:gs://bucket/nothing", cache_dir=tmp_path)
    with pytest.raises(UsageError, match="s3://bucket/store: a path on this machine is needed"):
        ensure_prepared(source="tokens:s3://bucket/store", cache_dir=tmp_path)
