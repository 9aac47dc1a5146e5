"""What does safe saving cost?

    python -m benchmarks.checkpoint

Two questions, each answered in one process by turns:

quickstart   Steps of configs/quickstart.py with its saves: ours (a step that leaves out what is not finite, saves with
             checksums and a seal) against the same without (a bare step, Orbax alone). A turn ends when its save has.
124m         A save of the 124M state in the background, beside real steps, against one that is waited for. Blocked is
             the time of the call; writable the time until the loop may write into the state again, shown by a program
             that changes a word of each array in place. `until_done` is by how much the steps beside take longer until
             the save is done: on a CPU the same cores write and hash.

The first save of each kind is left out. Prints a table and a JSON line, medians and ranges.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from benchmarks.report import print_json, spread
from gpt2_jax.config import CheckpointConfig, ModelConfig, RunConfig, TrainConfig
from gpt2_jax.config_file import load_config
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.step_settings import make_settings
from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
from gpt2_jax.training.steps import StepSettings, step_gradients, train_step
from gpt2_jax.training.train_state import TrainState, sharded_init

QUICKSTART = str(pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py")
Step = Callable[[TrainState, Any], tuple[TrainState, Any]]


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def bare_step(state: TrainState, batch: Any, *, settings: StepSettings) -> tuple[TrainState, Any]:
    """A step that applies whatever comes."""
    grads, metrics = step_gradients(state, batch, settings)
    updates, opt_state = settings.optimizer.update(grads, state.opt_state, state.params)
    return state.replace(
        step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
    ), metrics


@functools.partial(jax.jit, donate_argnums=0)
def overwritten(state: TrainState) -> TrainState:
    """The state with a word of each array halved, in the same memory, which must be free to be written."""
    return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].multiply(0.5) if leaf.ndim else leaf, state)


class OrbaxAlone:
    """Saves with Orbax and nothing else."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, state: TrainState) -> None:
        """Starts to save."""
        items = {"params": state.params, "training": {"step": state.step, "opt_state": state.opt_state}}
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self.manager.save(int(state.step), args=ocp.args.Composite(**saves))

    def wait(self) -> None:
        """Until it is saved."""
        self.manager.wait_until_finished()


class Ours:
    """Saves as a run does."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.checkpoints = Checkpoints(folder, CheckpointConfig())

    def save(self, state: TrainState) -> None:
        """Starts to save."""
        self.checkpoints.save(state, {"data_fingerprint": "0" * 64}, None)

    def wait(self) -> None:
        """Until it is saved."""
        self.checkpoints.wait()


def measure_quickstart(folder: pathlib.Path, rounds: int) -> dict[str, object]:
    """Milliseconds per step of both, and their ratio turn by turn."""
    config = load_config(QUICKSTART, {})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=2048))
    with prepared(config) as (settings, batch, first):
        kinds: dict[str, list[Any]] = {
            "plain": [functools.partial(bare_step, settings=settings), OrbaxAlone(folder / "plain"), first()],
            "ours": [functools.partial(train_step, settings=settings), Ours(folder / "ours"), first()],
        }
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        steps = config.checkpoint.every
        for turn in range(rounds + 1):
            for name in sorted(kinds, reverse=bool(turn % 2)):
                step, saver, state = kinds[name]
                jax.block_until_ready(state)
                began = time.perf_counter()
                for _ in range(steps):
                    state, metrics = step(state, batch)
                saver.save(state)
                kinds[name][2] = state
                jax.block_until_ready((state, metrics))
                saver.wait()
                seconds[name].append((time.perf_counter() - began) / steps)
    ratios = [ours / plain for ours, plain in zip(seconds["ours"][1:], seconds["plain"][1:], strict=True)]
    return {
        **{f"{name}_step_ms": spread([1000 * each for each in times[1:]], 3) for name, times in seconds.items()},
        "ours_over_plain": spread(ratios, 4),
    }


def measure_124m(folder: pathlib.Path, rounds: int) -> dict[str, object]:
    """Seconds of a save that is waited for, those for which one in the background blocks, and their ratio."""
    config = RunConfig(
        model=ModelConfig(vocab_size=50257, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0),
        train=TrainConfig(batch_size=2, context_length=128),
    )
    waited, blocked, writable, until_done, steps = [], [], [], [], []
    with prepared(config) as (settings, batch, first):
        state, saver = first(), Ours(folder / "124m")

        def overwrite() -> float:
            nonlocal state
            began = time.perf_counter()
            state = overwritten(state)
            jax.block_until_ready(state)
            return time.perf_counter() - began

        def step() -> float:
            nonlocal state
            began = time.perf_counter()
            state, metrics = train_step(state, batch, settings=settings)
            jax.block_until_ready((state, metrics))
            return time.perf_counter() - began

        for turn in range(rounds + 1):
            usual = statistics.median([step() for _ in range(5)])
            began = time.perf_counter()
            saver.save(state)
            saver.wait()
            of_waited = time.perf_counter() - began
            usual = statistics.median([usual, *(step() for _ in range(4))])
            began = time.perf_counter()
            saver.save(state)
            call = time.perf_counter() - began
            held = call + overwrite()
            beside = [step()]
            while not saver.checkpoints.is_saved():
                beside.append(step())
            if turn:
                waited.append(of_waited)
                blocked.append(call)
                writable.append(held)
                until_done.append(held + sum(beside) - usual * len(beside))
                steps.append(usual)
    return {
        "step_seconds": spread(steps, 3),
        "waited_seconds": spread(waited, 3),
        "blocked_seconds": spread(blocked, 3),
        "blocked_over_waited": spread([b / w for b, w in zip(blocked, waited, strict=True)], 3),
        "writable_seconds": spread(writable, 3),
        "until_done_seconds": spread(until_done, 3),
    }


@contextlib.contextmanager
def prepared(config: RunConfig) -> Iterator[tuple[StepSettings, Any, Callable[[], TrainState]]]:
    """Settings, a batch on the device, and what makes a first state."""
    mesh = make_mesh(config.mesh)
    settings = make_settings(config, mesh)
    shape = (config.train.batch_size, config.context_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    weights = np.ones((shape[0], shape[1] - 1), np.float32)
    with use_mesh(mesh):
        batch = place_batch({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}, mesh)
        yield settings, batch, lambda: sharded_init(settings.model, settings.optimizer, 0, mesh)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("quickstart", "124m"), help="one of the two")
    flags = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as base:
        for name, measure in (("quickstart", measure_quickstart), ("124m", measure_124m)):
            if flags.only in (None, name):
                results[name] = measure(pathlib.Path(base), flags.rounds)
                for key, value in results[name].items():
                    print(
                        f"{name:<12} {key:<22} {value['median']:,} ({value['min']:,} to {value['max']:,})", flush=True
                    )
    print_json("checkpoint", **results)


if __name__ == "__main__":
    main()
