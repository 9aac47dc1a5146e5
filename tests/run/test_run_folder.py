"""The run folder's small files, and which settings a resumed run may change."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import fields_by_key, run_config
from gpt2_jax.data.skipped import Skip
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.run.run_folder import (
    check_unchanged,
    holds_run,
    make_folder,
    read_config,
    read_data,
    read_skipped,
    write_run,
)

pytestmark = pytest.mark.smoke

DATA = {"folder": "/somewhere", "fingerprint": "f" * 64}

# Another value for every key, such that the whole stays valid.
OTHER = {
    "model": {
        **{"n_layer": 3, "n_head": 6, "n_embd": 144, "n_positions": 2048, "vocab_size": 999, "embd_pdrop": 0.2},
        **{"attn_pdrop": 0.2, "resid_pdrop": 0.2, "layer_norm_epsilon": 1e-6, "initializer_range": 0.03},
        **{"dtype": "bfloat16", "remat": "full", "scan_unroll": 2, "activation": "gelu_erf", "bias": False},
        "attention": "xla",
    },
    "tokenizer": {"name": "bytes", "path": "/merges", "normalization": "nfc", "lowercase": True},
    "data": {"source": "text:x", "text_field": "body", "held_out": 0.2, "windows": "padded", "cache_dir": "/tokens"},
    "optimizer": {
        **{"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 7, "decay_steps": 5, "end_fraction": 0.5},
        **{"b1": 0.8, "b2": 0.8, "eps": 1e-6, "weight_decay": 0.2, "clip_norm": 2.0, "ema_decay": 0.5},
    },
    "train": {
        **{"steps": 2000, "batch_size": 64, "context_length": 512, "context_lengths": [256], "microbatches": 2},
        **{"loss_chunk": 128, "log_every": 3, "eval_every": 3, "eval_windows": 3, "sample_every": 3},
        "spike_sigmas": 3.0,
    },
    "checkpoint": {"every": 3, "keep_last": 3, "keep_best": 3, "export_best": False},
    "mesh": {"data": 2, "fsdp": -1, "tensor": 2, "dcn_data": 2},
    "seed": 5,
    "init_from": "/run",
}
WITH = {  # what else a value needs
    "tokenizer.normalization": {"tokenizer": {"name": "bytes"}},
    "tokenizer.lowercase": {"tokenizer": {"name": "bytes"}},
    "optimizer.decay_steps": {"optimizer": {"schedule": "wsd"}},
    "mesh.fsdp": {"mesh": {"data": 1}},
}
FREE = {
    *("train.log_every", "train.eval_every", "train.eval_windows", "train.sample_every", "train.loss_chunk"),
    "train.spike_sigmas",
    *("model.remat", "model.scan_unroll", "model.attention"),
    *("data.source", "data.text_field", "data.held_out", "data.cache_dir", "tokenizer.path"),
    *("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_best", "checkpoint.export_best"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.dcn_data"),
}


def changed(key: str) -> RunConfig:
    *path, name = key.split(".")
    values: dict[str, Any] = {section: dict(keys) for section, keys in WITH.get(key, {}).items()}
    source, target = OTHER, values
    for part in path:
        source, target = source[part], target.setdefault(part, {})
    target[name] = source[name]
    return run_config(values)


@pytest.mark.parametrize("key", list(fields_by_key()))
def test_only_what_does_not_change_the_numbers_may_change(key: str, tmp_path: pathlib.Path) -> None:
    if key in FREE:
        check_unchanged(RunConfig(), changed(key), tmp_path)
        return
    with pytest.raises(UsageError) as raised:
        check_unchanged(RunConfig(), changed(key), tmp_path)
    message = str(raised.value)
    assert f" {key} " in message
    assert str(tmp_path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("schedule", "allowed"),
    [("constant", True), ("inverse_sqrt", True), ("cosine", False), ("linear", False)],
)
def test_more_steps_where_the_rate_does_not_depend_on_them(
    schedule: str, allowed: bool, tmp_path: pathlib.Path
) -> None:
    stored = run_config({"optimizer": {"schedule": schedule}})
    longer = dataclasses.replace(stored, train=dataclasses.replace(stored.train, steps=5000))
    if allowed:
        check_unchanged(stored, longer, tmp_path)
    else:
        with pytest.raises(UsageError, match="train.steps 1000 -> 5000"):
            check_unchanged(stored, longer, tmp_path)


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
    write_run(tmp_path, RunConfig(), DATA, [Skip(40, 5)])
    assert json.loads((tmp_path / "run.json").read_text())["skipped"] == [{"at": 40, "batches": 5}]
    write_run(tmp_path, run_config({"train": {"log_every": 3}}), {**DATA, "folder": "/elsewhere"})
    assert read_skipped(tmp_path) == (Skip(40, 5),)
    assert read_data(tmp_path)["folder"] == "/elsewhere"
    write_run(tmp_path, RunConfig(), DATA, [*read_skipped(tmp_path), Skip(60, 1)])
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


def test_a_folder_without_a_run_is_named(tmp_path: pathlib.Path) -> None:
    for read in (read_config, read_data):
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
