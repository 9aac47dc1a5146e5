"""Saving and restoring a run's state with Orbax. No other file calls Orbax.

A step's folder holds separate items: `params` and (if kept) `ema`, plain nested dicts; `training`, what only training
needs; `meta`, JSON with the fingerprints of data and tokenizer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from gpt2_jax.config import CheckpointConfig
from gpt2_jax.errors import DataError, Gpt2JaxError, UsageError
from gpt2_jax.remote_folder import is_remote, storage_path
from gpt2_jax.training.train_state import TrainState

_METRIC = "held_out_loss"


class _Manager(ocp.CheckpointManager):
    """Orbax's, which leaves preemption to the loop."""

    def reached_preemption(self, step: int) -> bool:
        """Always False. Orbax would ask JAX from the thread that ends a save, for a step that is long past; that sets
        JAX's count back, and the processes would agree to leave after a step that never comes.
        """
        return False


class Checkpoints:
    """The saved steps of a run: the newest `keep_last`, and the `keep_best` of lowest held-out loss."""

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig | None = None) -> None:
        """Opens `folder`, which may be at gs://; without a config only to read, so that no run is disturbed.

        Raises UsageError when one at gs:// cannot be opened.
        """
        read_only = config is None
        config = config or CheckpointConfig()
        policies = [checkpoint_managers.LatestN(config.keep_last)]
        if config.keep_best:
            best = checkpoint_managers.BestN(
                get_metric_fn=_held_out_loss, reverse=True, n=config.keep_best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_held_out_loss,  # without it Orbax forgets the metrics when the process ends
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._folder = storage_path(folder)
        try:
            self._manager = _Manager(self._folder, options=options)
        except Exception as error:  # of the storage's libraries, which have many
            if not is_remote(self._folder):
                raise
            raise UsageError(f"{self._folder} cannot be opened: {_one_line(error)}; check the credentials") from error

    def save(self, state: TrainState, meta: dict[str, Any], held_out_loss: float | None) -> None:
        """Starts saving the state under its step; returns when the arrays are copied, and writes in the background.

        Raises:
          Gpt2JaxError: this save failed, or an earlier one in the background.
          DataError: a step as new is there already.
        """
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "training": ocp.args.StandardSave(_training_item(state)),
            "meta": ocp.args.JsonSave(meta),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        metrics = None if held_out_loss is None else {_METRIC: held_out_loss}
        step = int(state.step)
        with self._failure_told():
            self._manager.check_for_errors()
            saved = self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        if not saved:
            raise DataError(f"{self._folder}: step {step} was not saved: a step as new exists already")

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of lowest held-out loss; the newest if none was measured; None without any step."""
        best = self._manager.best_step() if self.steps() else None
        return self._manager.latest_step() if best is None else best

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and meta of a step, laid out as `abstract` says (see `abstract_state`)."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(abstract.params),
            "training": ocp.args.StandardRestore(_training_item(abstract)),
            "meta": ocp.args.JsonRestore(),
        }
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        restored = self._restore(step, items)
        training = restored["training"]
        state = TrainState(
            step=training["step"],
            params=restored["params"],
            opt_state=training["opt_state"],
            ema=restored["ema"] if abstract.ema is not None else None,
            loss_scale=training.get("loss_scale"),
        )
        return state, restored["meta"]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """What evaluation uses of a step (the average if one was kept), laid out as `abstract_params` says."""
        item = "ema" if (self._folder / str(step) / "ema").is_dir() else "params"
        return self._restore(step, {item: ocp.args.StandardRestore(abstract_params)})[item]

    def close(self) -> None:
        """Waits for the last save. Raises Gpt2JaxError when it failed."""
        with self._failure_told():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._manager.close()

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise bare ValueError for a full disk
            raise Gpt2JaxError(
                f"{self._folder}: a save failed: {_one_line(error)}; the saved steps before it are intact, and "
                "the same command goes on from there"
            ) from error

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise bare Exception for damaged files
            raise DataError(
                f"{self._folder / str(step)} cannot be restored: {_one_line(error)}; if its files are damaged, move "
                "that folder away to continue from the step before it"
            ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".partition(" [tensorstore_spec=")[0].split())
    # TensorStore names the file first and the cause last, with much in between.
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _training_item(state: TrainState) -> dict[str, Any]:
    item = {"step": state.step, "opt_state": state.opt_state}
    if state.loss_scale is not None:
        item["loss_scale"] = state.loss_scale
    return item


def _held_out_loss(metrics: dict[str, float]) -> float:
    return metrics[_METRIC]


def abstract_on_one_device(tree: Any) -> Any:
    """Shapes and types of `tree` with every leaf on this process's first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
