"""Mirrors of remote folders, against a storage server on this machine."""

import os
import pathlib
import sys

import pytest
from storage_emulator import Storage, storage

from gpt2_jax.errors import UsageError
from gpt2_jax.remote_folder import (
    _is_mirrored,
    address_of,
    check_writable,
    fetch,
    is_remote,
    list_files,
    make_mirror,
    pull,
    push,
)
from gpt2_jax.user_paths import expand_user


@pytest.fixture
def bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The server; mirrors are below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return storage()


def write(folder: pathlib.Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: pathlib.Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".remote.json"]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def test_only_what_changed_is_sent(bucket: Storage) -> None:
    bucket.put("sent/notes/mine.txt", b"the user's own")
    mirror = make_mirror("gs://bucket/sent/", "runs")
    assert (mirror.name, address_of(mirror)) == ("sent", "gs://bucket/sent")
    write(mirror, {"config.json": "{}", "metrics.jsonl": "1\n", "samples/a b.txt": "text", "huggingface/w": "weights"})
    write(mirror, {"config.json.7.tmp": "", "run.lock": "", "checkpoints/1/x": "", "huggingface.new/w": ""})
    push(mirror)
    first = bucket.names("sent")
    assert set(first) == {"config.json", "metrics.jsonl", "samples/a b.txt", "huggingface/w", "notes/mine.txt"}
    assert bucket.get("sent/metrics.jsonl") == b"1\n"
    # The mark of a run comes last, so that what is killed meanwhile is none.
    assert max(first, key=lambda name: int(first[name])) == "config.json"

    write(mirror, {"metrics.jsonl": "1\n2\n"})
    (mirror / "huggingface").rename(mirror / "huggingface.1")
    push(make_mirror("gs://bucket/sent", "runs"))
    second = bucket.names("sent")
    assert set(second) == {"config.json", "metrics.jsonl", "samples/a b.txt", "huggingface.1/w", "notes/mine.txt"}
    assert bucket.get("sent/metrics.jsonl") == b"1\n2\n"
    assert {name for name in first if second.get(name) == first[name]} == {
        *("config.json", "samples/a b.txt", "notes/mine.txt")
    }
    push(mirror)
    assert bucket.names("sent") == second


def test_what_is_pulled_is_what_is_there(bucket: Storage) -> None:
    for name in ("config.json", "tokenizer/t.json", "checkpoints/5/big", "samples/"):
        bucket.put(f"pulled/{name}", name.encode())
    mirror = make_mirror("gs://bucket/pulled", "runs")
    write(mirror, {"old/metrics.jsonl": "of another run"})
    pull(mirror)
    assert read(mirror) == {"config.json": "config.json", "tokenizer/t.json": "tokenizer/t.json"}
    assert not (mirror / "old").exists()

    bucket.put("pulled/config.json", b"changed there")
    write(mirror, {"tokenizer/t.json": "changed here, and longer"})
    seen = os.stat(mirror / "config.json").st_ino
    pull(mirror)
    assert read(mirror) == {"config.json": "changed there", "tokenizer/t.json": "tokenizer/t.json"}
    assert os.stat(mirror / "config.json").st_ino != seen

    reads = bucket.reads("pulled/config.json")
    pull(mirror)
    assert bucket.reads("pulled/config.json") == reads
    pull(mirror, lambda name: "/" not in name)
    assert read(mirror) == {"config.json": "changed there"}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//x", "a/", ".", "checkpoints/5/x", ".remote.json"])
def test_names_that_are_not_taken_from_a_bucket(name: str) -> None:
    assert not _is_mirrored(name)  # the server of these tests refuses to store most of them; Google's does not


def test_a_folder_of_its_own_is_left_alone(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"config.json": "{}"})
    pull(tmp_path)
    push(tmp_path)
    assert address_of(tmp_path) == str(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_copy_is_whole_or_not_there(bucket: Storage, tmp_path: pathlib.Path) -> None:
    bucket.put("copy/file", b"new")
    place = tmp_path / "file"
    place.write_text("old")

    def refuse(address: str, copy: pathlib.Path, file: pathlib.Path) -> None:
        assert (address, copy.read_text(), file.read_text()) == ("gs://bucket/copy/file", "new", "old")
        raise KeyError("refused")

    with pytest.raises(KeyError):
        fetch([("gs://bucket/copy/file", place)], refuse)
    with pytest.raises(UsageError, match="gs://bucket/copy/none"):
        fetch([("gs://bucket/copy/none", place)])
    assert place.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    fetch([("gs://bucket/copy/file", place)])
    assert place.read_text() == "new"


def test_a_bucket_that_is_not_there(bucket: Storage) -> None:
    check_writable("gs://bucket/anything")
    assert bucket.names("anything") == {}
    for ask in (check_writable, list_files):
        with pytest.raises(UsageError, match="gs://no-such-bucket/run: .*check the bucket's name") as raised:
            ask("gs://no-such-bucket/run")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["gs://", "gs://bucket", "gs://bucket/", "gs://B/x", "gs://bucket/../x"])
@pytest.mark.parametrize("ending", ["", "/a b", "/run#1", "/*"])
def test_what_is_no_address(address: str, ending: str) -> None:
    if address + ending not in ("gs://bucket", "gs://bucket/"):
        with pytest.raises(UsageError, match="write gs://BUCKET/PATH"):
            is_remote(address + ending)


def test_what_is_an_address() -> None:
    assert is_remote("gs://bucket-1.name/run_2/a-b")
    assert not is_remote("runs/gs")
    for elsewhere in ("s3://bucket/run", "http://host/run", "gs://bucket/run"):
        with pytest.raises(UsageError, match=f"{elsewhere}: a path on this machine .* gs://BUCKET/PATH can be"):
            expand_user(elsewhere)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"pip install 'gpt2-jax\[gcs\]'"):
        check_writable("gs://bucket/run")
