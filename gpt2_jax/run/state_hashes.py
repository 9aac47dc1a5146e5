"""What a run has saved, as hashes, to compare two runs."""

import contextlib
import hashlib
import pathlib

import jax
import numpy as np

from gpt2_jax.config import MeshConfig
from gpt2_jax.errors import DataError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.run_folder import checkpoints_folder, read_config
from gpt2_jax.sharding import make_mesh
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import abstract_state


def state_hashes(folder: pathlib.Path, step: int | None = None) -> dict[str, str]:
    """sha256 of each array of the state that the run in `folder` saved at `step`, by default the last one.

    Raises DataError where there is none, or it is damaged.
    """
    config = read_config(folder)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    like = abstract_state(GPT2(config.model), optimizer, mesh, ema=config.optimizer.ema_decay > 0)
    with contextlib.closing(Checkpoints(checkpoints_folder(folder))) as checkpoints:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            raise DataError(f"{folder}: step {step or 'of any number'} is not saved; there are {steps}")
        state, _ = checkpoints.restore(steps[-1] if step is None else step, like)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree.leaves_with_path(state)
    }
