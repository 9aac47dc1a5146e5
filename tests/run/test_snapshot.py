"""Copies of states that are being saved: whole, apart from their originals, and left alone until the save is done."""

import pathlib
import threading

import jax
import numpy as np
import pytest

from gpt2_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.run import seal
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.snapshot import Snapshots
from gpt2_jax.sharding import make_mesh
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import init_state


@pytest.mark.parametrize("spec", [jax.P("fsdp", "tensor"), jax.P(("data", "tensor")), jax.P()])
def test_a_copy_is_whole_and_apart(spec: jax.P) -> None:
    sharding = jax.NamedSharding(make_mesh(MeshConfig(2, 2, 2), jax.devices()), spec)
    whole = jax.NamedSharding(sharding.mesh, jax.P())
    snapshots, places = Snapshots(), []
    for start in (0, 1000):
        numbers = np.arange(start, start + 64, dtype=np.float32).reshape(8, 8)
        tree = {
            "a": jax.device_put(numbers, sharding),
            "b": [jax.device_put(jax.numpy.arange(5, dtype=jax.numpy.bfloat16), whole)],
            "step": jax.device_put(np.int32(start), whole),
        }
        taken = snapshots.take(tree)
        assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), taken) == jax.tree.map(
            lambda leaf: (leaf.dtype, leaf.sharding), tree
        )
        jax.jit(lambda a: a * 0, donate_argnums=0)(tree["a"]).block_until_ready()
        assert tree["a"].is_deleted()
        np.testing.assert_array_equal(taken["a"], numbers)
        np.testing.assert_array_equal(np.asarray(taken["b"][0], np.float32), np.arange(5))
        assert int(taken["step"]) == start
        places.append([shard.data.unsafe_buffer_pointer() for shard in taken["a"].addressable_shards])
    assert places[0] == places[1]


def test_the_copies_of_a_save_that_is_under_way_are_left_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    monkeypatch.setattr(seal, "reach", lambda point: held.wait(60) if point == "save.seal" else None)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    under_way, take = [], Snapshots.take

    def noted(snapshots: Snapshots, tree: object) -> object:
        under_way.append(not checkpoints.is_saved())
        return take(snapshots, tree)

    monkeypatch.setattr(Snapshots, "take", noted)
    model = GPT2(ModelConfig(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=40))
    state = jax.jit(lambda: init_state(model, make_optimizer(OptimizerConfig(), 10), 0))()
    checkpoints.save(state.replace(step=jax.numpy.int32(1)), {}, None)
    assert not checkpoints.is_saved()
    threading.Timer(0.5, held.set).start()
    checkpoints.save(state.replace(step=jax.numpy.int32(2)), {}, None)
    checkpoints.close()
    assert under_way == [False, False]
