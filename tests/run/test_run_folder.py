"""The run folder's small files."""

import json
import pathlib
from typing import Any

import pytest

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import run_config
from gpt2_jax.data.skipped import Skip
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.run.run_folder import (
    holds_run,
    make_folder,
    read_changes,
    read_config,
    read_data,
    read_skipped,
    write_run,
)

pytestmark = pytest.mark.smoke

DATA = {"folder": "/somewhere", "fingerprint": "f" * 64}


def test_what_is_written_is_read(tmp_path: pathlib.Path) -> None:
    config = run_config({"seed": 3, "train": {"context_lengths": [128, 256]}})
    write_run(tmp_path, config, DATA)
    assert read_config(tmp_path) == config
    assert read_data(tmp_path) == DATA
    about = json.loads((tmp_path / "run.json").read_text())
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "grain"} <= set(about["versions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run.json"]


def test_skipped_batches_are_kept_until_others_are_given(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, RunConfig(), DATA)
    assert read_skipped(tmp_path) == ()
    assert "skipped" not in json.loads((tmp_path / "run.json").read_text())
    write_run(tmp_path, RunConfig(), DATA, skipped=[Skip(40, 5)])
    assert json.loads((tmp_path / "run.json").read_text())["skipped"] == [{"at": 40, "batches": 5}]
    write_run(tmp_path, run_config({"train": {"log_every": 3}}), {**DATA, "folder": "/elsewhere"})
    assert read_skipped(tmp_path) == (Skip(40, 5),)
    assert read_data(tmp_path)["folder"] == "/elsewhere"
    write_run(tmp_path, RunConfig(), DATA, skipped=[*read_skipped(tmp_path), Skip(60, 1)])
    assert read_skipped(tmp_path) == (Skip(40, 5), Skip(60, 1))


@pytest.mark.parametrize("skipped", [3, {"at": 1, "batches": 1}, [{"at": -1, "batches": 1}], [[1, 2]], None])
def test_a_damaged_list_of_skipped_batches_is_named_and_not_overwritten(tmp_path: pathlib.Path, skipped: Any) -> None:
    text = json.dumps({"data": DATA, "skipped": skipped})
    (tmp_path / "run.json").write_text(text)
    for use in (read_skipped, lambda folder: write_run(folder, RunConfig(), DATA)):
        with pytest.raises(DataError, match="run.json: skipped"):
            use(tmp_path)
    assert (tmp_path / "run.json").read_text() == text


def test_a_run_is_held_from_its_first_save_on(tmp_path: pathlib.Path) -> None:
    assert not holds_run(tmp_path)
    write_run(tmp_path, RunConfig(), DATA)
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not holds_run(tmp_path)
    (tmp_path / "checkpoints" / "10").mkdir()
    assert holds_run(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"n_layers": 2}}', '{"seed": "x"}', "\xff"])
def test_a_damaged_config_is_named(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="config.json") as raised:
        read_config(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": 1}', '{"data": {}}', '{"data": {"folder": "x"}}'])
def test_a_damaged_run_file_is_named(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match="run.json is damaged"):
        read_data(tmp_path)


def test_changes_are_read_as_they_were_written(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, RunConfig(), DATA)
    assert read_changes(tmp_path) == []
    changes = [
        {"step": 3, "key": "seed", "before": 0, "after": 1},
        {"step": 9, "key": "data", "before": "a", "after": "b"},
    ]
    write_run(tmp_path, RunConfig(), DATA, changes)
    assert read_changes(tmp_path) == changes
    assert read_data(tmp_path) == DATA


@pytest.mark.parametrize("changes", ["1", "{}", "[1]", '[{"step": 1}]'])
def test_damaged_changes_are_named(tmp_path: pathlib.Path, changes: str) -> None:
    (tmp_path / "run.json").write_text(f'{{"data": {json.dumps(DATA)}, "changes": {changes}}}')
    with pytest.raises(DataError, match="run.json is damaged: its changes"):
        read_changes(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path: pathlib.Path) -> None:
    for read in (read_config, read_data, read_changes):
        with pytest.raises(DataError, match="is not a run folder"):
            read(tmp_path)


def test_a_file_is_old_or_new_but_never_half(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.json"
    write_text_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(file, "half of the text is \ud800")
    assert file.read_text() == "old"
    write_text_atomically(file, "new")
    assert file.read_text() == "new"


def test_make_folder(tmp_path: pathlib.Path) -> None:
    folder = make_folder(str(tmp_path / "a" / "b"))
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"--workdir={path}: .*choose a folder"):
            make_folder(str(path))
