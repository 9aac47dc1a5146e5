"""Runs that end with a Hugging Face folder, and runs that start from one."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import Workshop, workshop

import gpt2_jax
from gpt2_jax.exchange.export import export
from gpt2_jax.run.bundle import load_bundle

SETTINGS = {
    **{"train.steps": 6, "train.eval_every": 2, "train.sample_every": 0, "checkpoint.every": 2},
    **{"optimizer.warmup_steps": 1, "optimizer.schedule": "constant", "checkpoint.export_best": True},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


def equal(first: Any, second: Any) -> bool:
    return all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_a_run_ends_with_its_best_parameters_for_others(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    done = tiny.run_here(run, SETTINGS)
    assert done.code == 0, done.err
    assert str(run / "huggingface") in done.out
    config, params, tokenizer = gpt2_jax.load(run)
    exported = gpt2_jax.load(run / "huggingface")
    assert equal(params, exported[1])
    assert exported[2].fingerprint == tokenizer.fingerprint
    card = (run / "huggingface" / "README.md").read_text(encoding="utf-8")
    tokens = 6 * config.train.batch_size * config.model.n_positions
    for words in ("text:corpus.txt", "6 steps", f"{tokens:,} tokens", "held-out loss", "| tokenizer | bytes |"):
        assert words in card
    assert str(tiny.folder) not in card

    written = (run / "huggingface" / "model.safetensors").stat().st_mtime_ns
    assert tiny.run_here(run, SETTINGS).code == 0  # done already: nothing is written again
    assert (run / "huggingface" / "model.safetensors").stat().st_mtime_ns == written
    assert tiny.run_here(run, {**SETTINGS, "train.steps": 8}).code == 0
    assert equal(gpt2_jax.load(run)[1], gpt2_jax.load(run / "huggingface")[1])
    assert "8 steps" in (run / "huggingface" / "README.md").read_text(encoding="utf-8")
    assert "6 steps" in (run / "huggingface.1" / "README.md").read_text(encoding="utf-8")  # nothing is deleted
    assert not (run / "huggingface.new").exists()


@pytest.mark.slow
def test_no_export_where_none_is_wanted(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    assert tiny.run_here(tmp_path / "run", {**SETTINGS, "checkpoint.export_best": False}).code == 0
    assert not (tmp_path / "run" / "huggingface").exists()


@pytest.mark.parametrize(
    "tokenizer", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("bytes", "chars")), "bpe:30"]
)
def test_training_starts_from_a_huggingface_folder(tiny: Workshop, tmp_path: pathlib.Path, tokenizer: str) -> None:
    settings = {**SETTINGS, "tokenizer.name": tokenizer, "optimizer.ema_decay": 0.0}
    assert tiny.run_here(tmp_path / "first", settings).code == 0
    source = tmp_path / "first" / "huggingface"
    other = tmp_path / "other.txt"
    other.write_text("12 plus 34 is 46. " * 60)
    settings |= {"init_from": source, "data.source": f"text:{other}", "optimizer.learning_rate": 0.0}
    settings |= {"checkpoint.export_best": False}
    done = tiny.run_here(tmp_path / "second", settings)
    assert done.code == 0, done.err
    first, second = gpt2_jax.load(source), gpt2_jax.load(tmp_path / "second")
    assert first[2].fingerprint == second[2].fingerprint
    assert equal(first[1], second[1])  # at rate 0 it ends as it began


@pytest.mark.slow
def test_positions_beyond_a_shorter_context_stay(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    assert tiny.run_here(tmp_path / "first", SETTINGS).code == 0
    source = tmp_path / "first" / "huggingface"
    settings = {**SETTINGS, "init_from": source, "train.context_length": 8}
    settings |= {"optimizer.weight_decay": 0.0, "optimizer.ema_decay": 0.0}  # an average of equal numbers may round
    done = tiny.run_here(tmp_path / "second", settings)
    assert done.code == 0, done.err
    before, (config, after, _) = gpt2_jax.load(source)[1], gpt2_jax.load(tmp_path / "second")
    assert config.model.n_positions == 16
    table, tuned = (np.asarray(params["wpe"]["embedding"]) for params in (before, after))
    np.testing.assert_array_equal(tuned[8:], table[8:])
    assert (tuned[:8] != table[:8]).any(axis=1).all()


@pytest.mark.slow
def test_the_vocabulary_of_a_source_that_has_more_ids_than_its_tokenizer(
    tiny: Workshop, tmp_path: pathlib.Path
) -> None:
    first = {**SETTINGS, "model.vocab_size": 300}
    assert tiny.run_here(tmp_path / "first", first).code == 0
    source = tmp_path / "first" / "huggingface"
    assert tiny.run_here(tmp_path / "second", {**SETTINGS, "init_from": source}).code == 0
    assert gpt2_jax.load(tmp_path / "second")[0].model.vocab_size == 300


@pytest.mark.slow
def test_another_model_is_refused_by_the_name_of_its_key(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    assert tiny.run_here(tmp_path / "first", {**SETTINGS, "model.bias": False}).code == 0
    bundle = load_bundle(tmp_path / "first")
    assert "bias" not in bundle.params["ln_f"]
    config = dataclasses.replace(bundle.config, activation="gelu_erf")
    export(dataclasses.replace(bundle, config=config), "huggingface", tmp_path / "source")
    settings = {**SETTINGS, "init_from": tmp_path / "source"}
    flags = "--config.model.activation=gelu_erf --config.model.bias=False"
    tiny.run_here(tmp_path / "run", settings).says(2, "model.activation=gelu_tanh, model.bias=True, but", flags)
    settings |= {"model.activation": "gelu_erf", "model.bias": False}
    assert tiny.run_here(tmp_path / "run", settings).code == 0
    assert json.loads((tmp_path / "run" / "huggingface" / "config.json").read_text())["activation_function"] == "gelu"


def test_a_source_that_is_none(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    settings = {**SETTINGS, "init_from": tmp_path}
    tiny.run_here(tmp_path / "run", settings).says(2, f"init_from={tmp_path}", "no model there")
