"""`gpt2_jax.load`: the right step, and one line for whatever is missing."""

import dataclasses
import functools
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import assert_identical

import gpt2_jax
from gpt2_jax.config import CheckpointConfig, ModelConfig, RunConfig
from gpt2_jax.errors import DataError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.run_folder import write_run
from gpt2_jax.tokenizer import make_tokenizer
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import TrainState, init_state

CONFIG = RunConfig(model=ModelConfig(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=257))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Steps 1, 2 and 3, of which the second has the lowest loss; parameters are the initial ones times the step."""
    folder = tmp_path_factory.mktemp("run")
    make_tokenizer("bytes").save(folder / "tokenizer")
    write_run(folder, CONFIG, {"folder": "/nowhere", "fingerprint": "0"})
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(keep_last=3))
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0}.items():
        checkpoints.save(state(step), {}, loss)
    checkpoints.close()
    return folder


@functools.cache
def first_state() -> TrainState:
    return jax.jit(lambda: init_state(GPT2(CONFIG.model), make_optimizer(CONFIG.optimizer, 10), 0))()


def state(step: int) -> TrainState:
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(step), first_state().params)
    return first_state().replace(step=jnp.int32(step), params=jax.device_put(params))


@pytest.mark.parametrize(("asked", "given"), [(None, 2), (1, 1), (3, 3)])
def test_the_best_step_or_the_one_that_is_asked_for(run_folder: pathlib.Path, asked: int | None, given: int) -> None:
    config, params, tokenizer = gpt2_jax.load(run_folder, asked)
    assert config == CONFIG
    assert tokenizer.decode(tokenizer.encode("text")) == "text"
    assert_identical(params, state(given).params)
    assert {leaf.device for leaf in jax.tree.leaves(params)} == {jax.devices()[0]}
    logits = GPT2(config.model).apply({"params": params}, np.zeros((1, 4), np.int32))
    assert logits.shape == (1, 4, 257)


def test_a_kernel_of_another_device_is_not_asked_for(run_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    on_tpu = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, attention="splash"))
    write_run(folder, on_tpu, {"folder": "/nowhere", "fingerprint": "0"})
    config, params, _ = gpt2_jax.load(folder)
    assert GPT2(config.model).apply({"params": params}, np.zeros((1, 4), np.int32)).shape == (1, 4, 257)


def test_a_step_that_was_not_saved(run_folder: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"no checkpoint of step 4; saved: \[1, 2, 3\]"):
        gpt2_jax.load(run_folder, 4)


def test_loading_in_a_thread(run_folder: pathlib.Path) -> None:
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(gpt2_jax.load(str(run_folder))))
    thread.start()
    thread.join()
    assert_identical(loaded[0][1], state(2).params)


def test_what_is_no_run(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path} is not a run folder"):
        gpt2_jax.load(tmp_path)
    write_run(tmp_path, CONFIG, {"folder": "/nowhere", "fingerprint": "0"})
    with pytest.raises(DataError, match="tokenizer"):
        gpt2_jax.load(tmp_path)
    make_tokenizer("bytes").save(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="has no checkpoints yet"):
        gpt2_jax.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(DataError, match="has no checkpoint of step None; saved: none"):
        gpt2_jax.load(tmp_path)
