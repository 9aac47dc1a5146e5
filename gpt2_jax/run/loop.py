"""The training loop: draws batches, sends steps to the device, and reads their metrics one step late.

The order within a step is fixed: the batch is placed and the step sent; then the metrics of the step *before* are read,
while the device works on this one; then, where due, this step's metrics are read and the actions run in their order
(evaluate before save, so that a save knows its loss). Only then is the next batch drawn, or, where SIGTERM has asked
for room, the state saved and the loop left.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.errors import DivergedError, PreemptedError
from gpt2_jax.sharding import place_batch
from gpt2_jax.training.steps import Metrics, StepSettings, train_step
from gpt2_jax.training.train_state import TrainState

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Action:
    """Something to do every `every` steps (0: only at the end) and after the last one, with the state of that step."""

    every: int
    run: Callable[[int, TrainState], None]
    at_end: bool = True

    def due(self, step: int, last: int) -> bool:
        """Whether it is to be done after `step`."""
        return (step == last and self.at_end) or (self.every > 0 and step % self.every == 0)


@dataclasses.dataclass
class Interval:
    """Sums since the last report."""

    loss_sum: float = 0.0
    weight_sum: float = 0.0
    tokens: int = 0
    steps: int = 0
    skipped: float = 0.0
    seconds: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)


Report = Callable[[int, dict[str, float], Interval], None]
Advance = Callable[[int], None]
Preempted = Callable[[int], bool]
Observe = Callable[[int, dict[str, float]], None]


def train(
    state: TrainState,
    batches: Iterator[tuple[int, HostBatch]],
    *,
    settings: StepSettings,
    mesh: Mesh,
    last_step: int,
    log_every: int,
    report: Report,
    advance: Advance,
    actions: Sequence[Action],
    preempted: Preempted = lambda step: False,
    save: Callable[[int, TrainState], None] = lambda step, state: None,
    observe: Observe = lambda step, values: None,
) -> TrainState:
    """Trains from `state` to `last_step`. Call it within `use_mesh(mesh)`.

    Args:
      state: donated.
      batches: (step before the update, this host's rows), in order from the state's step on.
      settings: of the step.
      mesh: devices.
      last_step: updates in all.
      log_every: steps between calls of `report`.
      report: gets the step, its metrics as numbers, and the sums of the interval that ends with it.
      advance: told of each step that is done.
      actions: run in this order after each step at which they are due.
      preempted: asked after every step; where it says yes, in all processes alike, the loop is left.
      save: run before that, after the actions that are due; does nothing where the step is saved.
      observe: gets each step's metrics as numbers, once they are known to be finite.

    Raises:
      DivergedError: a loss or gradient is not finite.
      PreemptedError: the loop was left, with this step saved.
    """
    interval = Interval()
    waiting: tuple[int, Metrics, int] | None = None

    def read(step: int, metrics: Metrics, tokens: int) -> None:
        nonlocal interval
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _check_finite(step, values)
        observe(step, values)
        skipped = values.get("skipped", 0.0)
        if not skipped:
            interval.loss_sum += values["loss_sum"]
            interval.weight_sum += values["weight_sum"]
        interval.skipped += skipped
        interval.tokens += tokens
        interval.steps += 1
        advance(step)
        if step % log_every == 0 or step == last_step:
            interval.seconds = time.perf_counter() - interval.started
            report(step, values, interval)
            interval = Interval()

    for index, batch in batches:
        step = index + 1
        placed = place_batch(batch, mesh)
        tokens = placed["tokens"].size  # of the whole batch, whichever rows of it are this host's
        # A copy that is not asked for by name is an error here: it would make the device wait for the host.
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, placed, settings=settings)
            if waiting is not None:
                read(*waiting)
            waiting = (step, metrics, tokens)
        leave = preempted(step) and step < last_step
        due = [action for action in actions if action.due(step, last_step)]
        if due or leave:
            read(*waiting)
            waiting = None
            paused = time.perf_counter()
            for action in due:
                action.run(step, state)
            if leave:
                save(step, state)
                raise PreemptedError(f"SIGTERM asked for room: step {step} is saved; the same command goes on from it")
            interval.started += time.perf_counter() - paused
    if waiting is not None:
        read(*waiting)
    return state


def _check_finite(step: int, values: dict[str, float]) -> None:
    finite = math.isfinite(values["loss_sum"]) and math.isfinite(values["grad_norm"])
    # float16 skips an overflow and halves its scale; with nothing left to halve, it is no overflow of the scale.
    handled = values.get("skipped", 0.0) and values["loss_scale"] > 1
    if not finite and not handled:
        raise DivergedError(
            f"step {step}: loss {values['loss_sum'] / max(values['weight_sum'], 1e-8):.4g}, gradient norm "
            f"{values['grad_norm']:.4g}: not finite; the saved steps before it are intact; in another --workdir, lower "
            "optimizer.learning_rate or lengthen optimizer.warmup_steps"
        )
