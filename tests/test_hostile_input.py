"""What users get wrong, through the real command: one line, the right exit code, and nothing half-written."""

import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from tiny_run import Workshop, contents, finished_run, mounted, workshop

from gpt2_jax.data.prepare import prepare
from gpt2_jax.folder_lock import folder_lock
from gpt2_jax.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.fixture
def run_copy(tmp_path_factory: pytest.TempPathFactory, tmp_path: pathlib.Path) -> pathlib.Path:
    """A finished run to be damaged."""
    folder, done = finished_run(tmp_path_factory.getbasetemp())
    assert done.code == 0, done.err
    return shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("profile"))


def store(folder: pathlib.Path, tiny: Workshop) -> pathlib.Path:
    source = f"text:{tiny.corpus}"
    return prepare(source=source, tokenizer_name="bytes", out=folder, workers=1, progress=False).folder


def refused(tiny: Workshop, tmp_path: pathlib.Path, settings: dict[str, Any], code: int, *fragments: str) -> None:
    """Runs it in a new folder, and looks that neither that nor the cache has anything half-done."""
    cache = tmp_path / "tokens"
    tiny.run_here(tmp_path / "run", {"data.cache_dir": cache, **settings}).says(code, *fragments)
    assert contents(tmp_path / "run") == {}
    assert not list(cache.glob("*.partial"))


# The corpus


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (b"", ["corpus.txt", "no text"]),
        (b"fine so far \xff\xfe not any more", ["bad.txt", "utf-8", "byte 12"]),
        (b"abc", ["split of", "context length 16", "more text"]),
    ],
    ids=["empty", "not UTF-8", "shorter than a window"],
)
def test_a_corpus_that_cannot_be_used(
    tiny: Workshop, tmp_path: pathlib.Path, text: bytes, fragments: list[str]
) -> None:
    file = tmp_path / ("bad.txt" if b"\xff" in text else "corpus.txt")
    file.write_bytes(text)
    refused(tiny, tmp_path, {"data.source": f"text:{file}"}, 3, *fragments)


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        ("txt:corpus.txt", ["data.source=", "text:...", "did you mean text?"]),
        ("text:/no/such/*.txt", ["/no/such/*.txt", "no file"]),
        ("text:", ["data.source='text:'", "allowed"]),
        ("tfds:no_such_set", ["no_such_set"]),
    ],
)
def test_a_source_that_names_nothing(tiny: Workshop, tmp_path: pathlib.Path, source: str, fragments: list[str]) -> None:
    refused(tiny, tmp_path, {"data.source": source}, 2, *fragments)


def test_a_vocabulary_smaller_than_the_tokenizers(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    fragments = ["model.vocab_size=100", "257 ids", "257 or more, or 0"]
    refused(tiny, tmp_path, {"model.vocab_size": 100}, 2, *fragments)


def test_a_profile_of_steps_that_the_run_does_not_have(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    tiny.run_here(tmp_path / "run", None, "--profile=119:121").says(2, "--profile=119:121", "train.steps=120")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_split(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    settings = {"train.batch_size": 6, "train.microbatches": 1}
    refused(tiny, tmp_path, settings, 2, "train.batch_size / train.microbatches = 6", "= 8")


# A prepared store


def test_a_truncated_shard(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    folder = store(tmp_path / "store", tiny)
    shard = folder / json.loads((folder / "manifest.json").read_text())["splits"]["train"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(tiny, tmp_path, {"data.source": f"tokens:{folder}"}, 3, str(shard), "bytes", "prepare")


def test_a_shard_with_other_ids(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    folder = store(tmp_path / "store", tiny)
    shard = folder / json.loads((folder / "manifest.json").read_text())["splits"]["train"][0]["file"]
    shard.write_bytes(b"\xff" * shard.stat().st_size)  # ids beyond the vocabulary
    refused(tiny, tmp_path, {"data.source": f"tokens:{folder}"}, 3, str(shard), "sha256", "prepare")


def test_a_store_with_the_tokenizer_of_another(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    folder = store(tmp_path / "store", tiny)
    make_tokenizer("chars", texts=lambda: ["abc"]).save(folder)
    refused(tiny, tmp_path, {"data.source": f"tokens:{folder}"}, 3, str(folder), "tokenizer", "fingerprint")


def test_a_store_of_another_tokenizer_than_the_configured(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    folder = store(tmp_path / "store", tiny)
    settings = {"data.source": f"tokens:{folder}", "tokenizer.name": "chars"}
    refused(tiny, tmp_path, settings, 3, "tokenizer.name=bytes, the config has tokenizer.name=chars")


def test_a_folder_that_is_no_store(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    refused(tiny, tmp_path, {"data.source": f"tokens:{tmp_path}"}, 3, str(tmp_path), "manifest.json", "missing")


# The run folder


def test_a_folder_where_another_process_trains(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with folder_lock(tmp_path / "run" / "run"):
        tiny.run_here(tmp_path / "link").says(2, str(tmp_path / "run"), "another job works there")
        tiny.run_here(tmp_path / "run").says(2, str(tmp_path / "run"), "another job works there")
    assert contents(tmp_path / "run") == {}


def test_a_run_without_its_config(tiny: Workshop, run_copy: pathlib.Path) -> None:
    (run_copy / "config.json").unlink()
    before = contents(run_copy)
    tiny.run_here(run_copy, {"optimizer.learning_rate": 0.5}).says(3, str(run_copy), "config.json")
    assert contents(run_copy) == before


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard", "tensorboardX"), ("--wandb=p", "wandb")])
def test_a_mirror_that_is_not_installed(
    tiny: Workshop, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, flag: str, package: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    tiny.run_here(tmp_path / "run", None, flag).says(2, package, "pip install")
    assert not (tmp_path / "run").exists()


def test_a_folder_below_a_file(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("mine")
    workdir = tmp_path / "file" / "run"
    tiny.run_here(workdir).says(2, f"--workdir={workdir}", "Not a directory", "choose a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_disk(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    done = tiny.run(tmp_path / "run", prefix=mounted(tmp_path, "ro"))
    done.says(2, f"--workdir={tmp_path / 'run'}", "Read-only file system", "choose a folder")


@pytest.mark.parametrize("size", ["8k", "400k"], ids=["at once", "while saving"])
def test_a_full_disk(tiny: Workshop, tmp_path_factory: pytest.TempPathFactory, size: str) -> None:
    disk = tmp_path_factory.mktemp("disk")
    done = tiny.run(disk / "run", prefix=mounted(disk, f"size={size}"))
    assert done.code == 1, done.err
    assert "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("train.py: error: ")
    assert "No space left on device" in line


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda run: cut(run / "config.json"), ["config.json", "not JSON"]),
        (lambda run: cut(run / "run.json"), ["run.json", "damaged"]),
        (lambda run: (run / "run.json").unlink(), ["run.json", "No such file"]),
        (
            lambda run: [cut(file) for file in run.glob("checkpoints/*/params/**/d/*")],
            ["no saved step can be used", "checkpoints/120 cannot be restored", "another --workdir"],
        ),
    ],
    ids=["config.json", "run.json", "no run.json", "checkpoint"],
)
def test_a_damaged_run(
    tiny: Workshop, run_copy: pathlib.Path, damage: Callable[[pathlib.Path], Any], fragments: list[str]
) -> None:
    damage(run_copy)
    before = contents(run_copy)
    tiny.run(run_copy).says(3, str(run_copy), *fragments)
    assert contents(run_copy) == before


def test_init_from_what_is_no_run(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    settings = {"init_from": tmp_path / "nothing"}
    refused(tiny, tmp_path, settings, 2, f"init_from={tmp_path / 'nothing'}", "no model there")


def test_data_that_changed_since_the_run_began(tiny: Workshop, run_copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    about = json.loads((run_copy / "run.json").read_text())
    about["data"]["folder"] = str(tmp_path / "gone")
    (run_copy / "run.json").write_text(json.dumps(about))
    config = json.loads((run_copy / "config.json").read_text())
    other = tmp_path / "other.txt"
    other.write_text(tiny.corpus.read_text().replace("plus", "and"))
    config["data"]["source"] = f"text:{other}"
    (run_copy / "config.json").write_text(json.dumps(config))
    before = contents(run_copy)
    done = tiny.run_here(run_copy, {"data.source": f"text:{other}", "data.cache_dir": tmp_path / "tokens"})
    done.says(3, f"{run_copy} was trained on data", "bring the old data back")
    assert contents(run_copy) == before
