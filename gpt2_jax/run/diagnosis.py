"""What is known of a step whose loss or gradient was not finite."""

import jax
from jax.sharding import Mesh

from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.sharding import place_batch
from gpt2_jax.training.steps import StepSettings, nonfinite_shares
from gpt2_jax.training.train_state import TrainState


class Diagnosis:
    """Computes a step again from the state that it began with, and looks where it is not finite."""

    def __init__(self, settings: StepSettings, mesh: Mesh, batches: TrainBatches) -> None:
        self._settings, self._mesh, self._batches = settings, mesh, batches

    def __call__(self, step: int, state: TrainState) -> str:
        """A clause for the error, with the windows of the batch and the worst gradient; see `loop.train`."""
        windows = ", ".join(str(index) for index in self._batches.all_window_indices(step - 1))
        batch = place_batch(self._batches.batch(step - 1), self._mesh)
        shares, _ = jax.device_get(nonfinite_shares(state, batch, settings=self._settings))
        by_name = {
            f"{_name(path)}[layer {layer}]" if leaf.ndim else _name(path): float(share)
            for path, leaf in jax.tree_util.tree_leaves_with_path(shares)
            for layer, share in enumerate(leaf.reshape(-1))
        }
        worst = max(by_name, key=lambda name: by_name[name])
        if by_name[worst]:
            found = f"worst of the gradients {worst}, {by_name[worst]:.0%} of it not finite"
        else:
            found = "computed once more all gradients were finite: a chance, or a fault of the hardware"
        return f"{found}; windows {windows}; "


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
