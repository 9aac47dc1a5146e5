"""Saving and restoring a run's state with Orbax. No other file but seal.py calls Orbax.

A step's folder holds separate items: `params` and (if kept) `ema`, plain nested dicts; `training`, what only training
needs; `seal`, JSON with the fingerprints of data and tokenizer, and the checksum of each array. A step is taken for
good only when all of it is what its seal says.
"""

import contextlib
import gc
import os
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint._src.futures import signaling_client  # it cannot be made to forget otherwise

from gpt2_jax.config import CheckpointConfig
from gpt2_jax.errors import DamagedError, DataError, Gpt2JaxError, UsageError
from gpt2_jax.fault_points import reach
from gpt2_jax.remote_folder import is_remote, storage_path
from gpt2_jax.run.checksums import checksums, named
from gpt2_jax.run.run_folder import set_aside
from gpt2_jax.run.saved_metrics import METRIC
from gpt2_jax.run.seal import SealHandler, SealSave, read_seal
from gpt2_jax.run.snapshot import Snapshots
from gpt2_jax.training.train_state import TrainState

# What every process is told by all: see `hosts.Hosts.gather`.
Gather = Callable[[str], list[str]]

DAMAGED = "damaged"
# Marks of failures that are the machine's, and say nothing about the files.
_PASSING = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")


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
        self._folder = storage_path(folder)
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=None if read_only else _held_out_loss,  # without it Orbax forgets the metrics when the process ends
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._needed = 0
        self._snapshots = Snapshots()
        self._manager = self._opened()

    def check_space(self, state: TrainState) -> None:
        """Warns, on stderr, where the disk has no room for a save beside those that are there."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if not is_remote(self._folder) and shutil.disk_usage(self._folder).free < needed:
            print(f"warning: {self._room(needed)}", file=sys.stderr)

    def save(self, state: TrainState, meta: dict[str, Any], held_out_loss: float | None) -> None:
        """Starts saving the state under its step; returns when the arrays are copied, and writes in the background.

        Raises:
          Gpt2JaxError: this save failed, or an earlier one in the background.
          DataError: a step as new is there already.
        """
        step = int(state.step)
        self.wait()  # as Orbax would, and the copies of the state before are in use until then
        arrays = self._snapshots.take(_arrays(state))
        self._needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        items: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in arrays.items()}
        items["seal"] = SealSave(meta, held_out_loss, checksums(arrays))
        metrics = None if held_out_loss is None else {METRIC: held_out_loss}
        with self._failure_told():
            reach("save.begin")
            saved = self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
            reach("save.copied")
        if not saved:
            raise DataError(f"{self._folder}: step {step} was not saved: a step as new exists already")

    def check(self) -> None:
        """Raises Gpt2JaxError when a save in the background has failed."""
        with self._failure_told():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when all is saved. Raises like `check`."""
        with self._failure_told():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def is_saved(self) -> bool:
        """Whether nothing is being saved in the background."""
        return not self._manager.is_saving_in_progress()

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of lowest held-out loss; the newest if none was measured; None without any step."""
        losses = {step: self._held_out_loss(step) for step in self.steps()}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=lambda step: (measured[step], -step)) if measured else max(losses, default=None)

    def restore_newest(self, abstract: TrainState, gather: Gather = lambda told: [told]) -> Any:
        """The state of the newest step that is whole, laid out as `abstract` says, and what its seal tells.

        Newer steps, which are damaged, are moved to the folder `damaged`, and one line on stderr says so. All processes
        of a run call this together.

        Raises:
          DataError: no step is whole; none is moved then. Or a step cannot be read for another reason.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                state, meta = self.restore(step, abstract, gather)
            except DamagedError as error:
                damaged.append((step, str(error)))
                continue
            if damaged:
                self._set_aside(damaged, f"going on from step {step}", gather)
            return state, meta
        told = "; ".join(text for _, text in damaged)
        raise DataError(
            f"{self._folder}: no saved step can be used: {told}; bring back a copy of that folder, or start anew in "
            "another --workdir"
        )

    def restore(
        self, step: int, abstract: TrainState, gather: Gather = lambda told: [told]
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and meta of a step, laid out as `abstract` says (see `abstract_state`).

        Raises:
          DamagedError: not all is as it was saved. Another DataError: it cannot be read for another reason.
        """
        items, meta = self._restore(step, _arrays(abstract), gather)
        training = items["training"]
        state = TrainState(
            step=training["step"],
            params=items["params"],
            opt_state=training["opt_state"],
            ema=items.get("ema"),
            loss_scale=training.get("loss_scale"),
            nonfinite_steps=training["nonfinite_steps"],
        )
        return state, meta

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """What evaluation uses of a step (the average if one was kept), laid out as `abstract_params` says. Raises like
        `restore`.
        """
        item = "ema" if (self._folder / str(step) / "ema").is_dir() else "params"
        return self._restore(step, {item: abstract_params})[0][item]

    def close(self) -> None:
        """Waits for the last save. Raises Gpt2JaxError when it failed."""
        self.wait()
        with self._failure_told():
            self._manager.close()

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise bare ValueError for a full disk
            raise Gpt2JaxError(
                f"{self._room(self._needed)}; a save failed: {_one_line(error)}; the saved steps before it are intact, "
                "and the same command goes on from there"
            ) from error

    def _room(self, needed: int) -> str:
        if is_remote(self._folder) or not needed:
            return str(self._folder)
        free = shutil.disk_usage(self._folder).free
        return f"{self._folder}: {free / 2**20:,.1f} MiB are free, a save takes up to {needed / 2**20:,.1f} MiB"

    def _restore(
        self, step: int, abstract: dict[str, Any], gather: Gather = lambda told: [told]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        folder, failure = self._folder / str(step), ""
        self.wait()
        try:
            _refuse_links(folder)
            seal, items = read_seal(folder / "seal"), _read_items(folder, abstract)
        except DamagedError as error:
            failure = str(error)
        failures = [told for told in gather(failure) if told]
        if failures:
            raise DamagedError(failures[0])
        found = named(checksums(items))
        differ = [name for name, checksum in found.items() if seal.checksums.get(name) != checksum]
        if differ:
            more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
            raise DamagedError(f"{folder}: {differ[0]}{more} not as saved: the checksum differs")
        return items, seal.meta

    def _held_out_loss(self, step: int) -> float | None:
        try:
            return read_seal(self._folder / str(step) / "seal").held_out_loss
        except DamagedError:  # which shows when the step is read
            return None

    def _set_aside(self, damaged: list[tuple[int, str]], then: str, gather: Gather) -> None:
        if jax.process_index() == 0:
            for step, reason in damaged:
                target = set_aside(self._folder, step, DAMAGED)
                print(f"warning: {reason}; moved to {target}; {then}", file=sys.stderr, flush=True)
        gather("")
        self._manager.reload()

    def _opened(self) -> _Manager:
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ("params", "training", "ema")}
        handlers["seal"] = SealHandler()
        try:
            return _Manager(self._folder, options=self._options, item_handlers=handlers)
        except Exception as error:  # of the storage's libraries, which have many
            if not is_remote(self._folder):
                raise
            raise UsageError(f"{self._folder} cannot be opened: {_one_line(error)}; check the credentials") from error


def forget_connection() -> None:
    """For a process that has left JAX's coordinator: Orbax would go on talking to it in a later run's saves."""
    signaling_client.get_signaling_client.cache_clear()


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".partition(" [tensorstore_spec=")[0].split())
    # TensorStore names the file first and the cause last, with much in between.
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _read_items(folder: epath.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Raises DamagedError for what cannot be read, another DataError where that is not the files' fault."""
    failure: DataError | None = None
    with _aftermath_hidden():
        try:
            # By the handler itself: the manager would wait for processes in which this fails.
            handler = ocp.StandardCheckpointHandler()
            return {
                name: handler.restore(folder / name, args=ocp.args.StandardRestore(item))
                for name, item in abstract.items()
            }
        except Exception as error:  # Orbax and TensorStore raise bare Exception for damaged files
            kind = DataError if _is_passing(error) else DamagedError
            failure = kind(f"{folder} cannot be restored: {_one_line(error)}")
        time.sleep(0.2)  # for the other reads, and then for what is left of them
        gc.collect()
    raise failure


@contextlib.contextmanager
def _aftermath_hidden() -> Iterator[None]:
    """Where one read fails, Orbax drops the others; what they have to say of that is many tracebacks."""
    report = sys.unraisablehook

    def filtered(lost: Any) -> None:
        if not isinstance(lost.object, types.CoroutineType) and "Event loop is closed" not in str(lost.exc_value):
            report(lost)

    sys.unraisablehook = filtered
    try:
        yield
    finally:
        sys.unraisablehook = report


def _refuse_links(folder: epath.Path) -> None:
    """What lies in a save is read from there and nowhere else, whoever made it."""
    if is_remote(folder):
        return
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(place, name)):
                raise DamagedError(f"{os.path.join(place, name)} is a link, and saves have none")


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, MemoryError | PermissionError | ConnectionError | TimeoutError):
        return True
    return any(mark in str(error) for mark in _PASSING)


def _arrays(state: TrainState) -> dict[str, Any]:
    """The items of a step's folder that hold arrays."""
    training = {"step": state.step, "opt_state": state.opt_state, "nonfinite_steps": state.nonfinite_steps}
    if state.loss_scale is not None:
        training["loss_scale"] = state.loss_scale
    items = {"params": state.params, "training": training}
    return items if state.ema is None else items | {"ema": state.ema}


def _held_out_loss(metrics: dict[str, float]) -> float:
    return metrics[METRIC]


def abstract_on_one_device(tree: Any) -> Any:
    """Shapes and types of `tree` with every leaf on this process's first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
