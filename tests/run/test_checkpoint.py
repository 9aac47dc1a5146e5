"""Saved states: what goes in comes out, on any mesh, and the right ones are kept."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import assert_identical

from gpt2_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
from gpt2_jax.errors import DamagedError, DataError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.run.checkpoint import Checkpoints, abstract_on_one_device
from gpt2_jax.sharding import make_mesh
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import TrainState, abstract_state

META = {"data_fingerprint": "d" * 64, "config": {"seed": 3, "lengths": [1, 2]}}


def model(dtype: str = "float16") -> GPT2:
    return GPT2(ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=19, dtype=dtype))


def abstract(mesh: tuple[int, int, int], dtype: str = "float16", ema: bool = True) -> TrainState:
    devices = jax.devices()[: np.prod(mesh)]
    optimizer = make_optimizer(OptimizerConfig(), 10)
    return abstract_state(model(dtype), optimizer, make_mesh(MeshConfig(*mesh), devices), ema=ema)


def drawn(like: TrainState, step: int) -> TrainState:
    """Random bits in every array, so that no two are equal by chance."""
    rng = np.random.default_rng(step)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        bits = rng.integers(0, 2**31 - 1, leaf.shape, np.int32)
        values = bits if leaf.dtype == np.int32 else (bits / 2**30 - 1).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    replicated = like.step.sharding
    return jax.tree.map(draw, like).replace(step=jax.device_put(np.int32(step), replicated))


def save(folder: pathlib.Path, losses: dict[int, float | None], config: CheckpointConfig, ema: bool = True) -> None:
    """Saves small states, as one process does."""
    checkpoints = Checkpoints(folder, config)
    for step, loss in losses.items():
        checkpoints.save(drawn(abstract((1, 1, 1), ema=ema), step), META, loss)
    checkpoints.close()


def saved_steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 1), (1, 4, 1)], ids=str)
def test_a_state_comes_back_bit_by_bit_on_any_mesh(tmp_path: pathlib.Path, mesh: tuple[int, int, int]) -> None:
    state = drawn(abstract((2, 2, 2)), 7)
    assert state.ema is not None
    assert state.loss_scale is not None
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state, META, 1.5)
    checkpoints.close()

    like = abstract(mesh)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    restored, meta = checkpoints.restore(7, like)
    checkpoints.close()
    assert meta == META
    assert_identical(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding


def test_a_state_without_average_and_loss_scale(tmp_path: pathlib.Path) -> None:
    like = abstract((1, 1, 1), "float32", ema=False)
    state = drawn(like, 1)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state, META, None)
    restored, _ = checkpoints.restore(1, like)
    checkpoints.close()
    assert restored.ema is None
    assert restored.loss_scale is None
    assert_identical(restored, state)


@pytest.mark.parametrize("ema", [False, True])
def test_evaluation_gets_the_average_if_one_was_kept(tmp_path: pathlib.Path, ema: bool) -> None:
    save(tmp_path, {4: None}, CheckpointConfig(), ema)
    state = drawn(abstract((1, 1, 1), ema=ema), 4)
    checkpoints = Checkpoints(tmp_path)
    params = checkpoints.restore_params(4, abstract_on_one_device(state.params))
    checkpoints.close()
    assert_identical(params, state.ema if ema else state.params)


# Which steps are kept


def test_the_newest_and_the_best_are_kept_by_every_process(tmp_path: pathlib.Path) -> None:
    """The best save is known from the disk alone: each line below is another process."""
    config = CheckpointConfig(keep_last=2, keep_best=1)
    save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0}, config)
    assert saved_steps(tmp_path) == [2, 3]
    save(tmp_path, {4: 1.5, 5: None}, config)
    assert saved_steps(tmp_path) == [2, 4, 5]
    save(tmp_path, {6: 1.2, 7: 1.1}, config)
    assert saved_steps(tmp_path) == [2, 6, 7]
    reader = Checkpoints(tmp_path)
    assert (reader.best_step(), reader.steps()) == (2, [2, 6, 7])
    reader.close()
    save(tmp_path, {8: 0.5, 9: None, 10: None}, config)
    assert saved_steps(tmp_path) == [8, 9, 10]
    reader = Checkpoints(tmp_path)
    assert reader.best_step() == 8
    reader.close()


def test_more_and_none_of_the_best(tmp_path: pathlib.Path) -> None:
    losses = {1: 1.0, 2: 4.0, 3: 2.0, 4: 3.0, 5: 5.0}
    save(tmp_path / "two", losses, CheckpointConfig(keep_last=1, keep_best=2))
    assert saved_steps(tmp_path / "two") == [1, 3, 5]
    save(tmp_path / "none", losses, CheckpointConfig(keep_last=2, keep_best=0))
    assert saved_steps(tmp_path / "none") == [4, 5]


def test_without_a_measured_loss_the_newest_is_the_best(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {1: None, 2: None}, CheckpointConfig())
    for checkpoints in (Checkpoints(tmp_path), Checkpoints(tmp_path, CheckpointConfig())):
        assert checkpoints.best_step() == 2
        checkpoints.close()
    empty = Checkpoints(tmp_path / "empty", CheckpointConfig())
    assert (empty.steps(), empty.best_step()) == ([], None)
    empty.close()


@pytest.mark.parametrize("again", [3, 2])
def test_a_step_is_saved_once_only(tmp_path: pathlib.Path, again: int) -> None:
    save(tmp_path, {3: None}, CheckpointConfig())
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(DataError, match=f"step {again} was not saved"):
        checkpoints.save(drawn(abstract((1, 1, 1)), again), META, None)
    checkpoints.close()


def test_reading_does_not_disturb_a_run_in_progress(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {3: None}, CheckpointConfig())
    in_writing = tmp_path / "6.orbax-checkpoint-tmp"
    in_writing.mkdir()
    (in_writing / "part").write_text("half")
    before = sorted(tmp_path.rglob("*"))
    reader = Checkpoints(tmp_path)
    assert reader.steps() == [3]
    reader.restore_params(3, abstract_on_one_device(abstract((1, 1, 1)).params))
    reader.close()
    assert sorted(tmp_path.rglob("*")) == before
    # The run that takes over clears away what the killed one left.
    save(tmp_path, {6: None}, CheckpointConfig())
    assert saved_steps(tmp_path) == [3, 6]


# Damage


def halve(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("item", ["params", "training", "ema"])
def test_a_truncated_array_file_is_named(tmp_path: pathlib.Path, item: str) -> None:
    save(tmp_path, {3: None}, CheckpointConfig())
    files: list[Any] = [file for file in (tmp_path / "3" / item).rglob("d/*") if file.is_file()]
    assert files
    for file in files:
        halve(file)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(DamagedError, match="cannot be restored: ") as raised:
        checkpoints.restore(3, abstract((1, 1, 1)))
    checkpoints.close()
    assert str(tmp_path / "3") in str(raised.value)
    assert "\n" not in str(raised.value)
