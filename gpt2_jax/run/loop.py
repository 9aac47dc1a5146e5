"""The training loop: draws batches, sends steps to the device, and reads their metrics one step late.

The order within a step is fixed: the batch is placed and the step sent; then the metrics of the step *before* are read,
while the device works on this one; then, where due, this step's metrics are read and the actions run in their order
(evaluate before save, so that a save knows its loss). Only then is the next batch drawn, or, where the run is asked to
leave, the state saved and the loop left.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.errors import DivergedError, PreemptedError
from gpt2_jax.fault_points import reach
from gpt2_jax.run.watchdog import LONG, Watchdog
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
Leave = Callable[[int], PreemptedError | None]
Explain = Callable[[int, TrainState], str]
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
    leave: Leave = lambda step: None,
    save: Callable[[int, TrainState], None] = lambda step, state: None,
    explain: Explain = lambda step, state: "",
    watchdog: Watchdog | None = None,
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
      leave: asked after every step; what it gives, in all processes alike, is raised once the step is saved.
      save: run before that, after the actions that are due; does nothing where the step is saved.
      explain: gets the step that was not finite and the state before it; what it says goes into the error.
      watchdog: told of each step.
      observe: gets each step's metrics as numbers.

    Raises:
      DivergedError: more losses or gradients were not finite than may be skipped; the state is that before them.
      PreemptedError: the loop was left, with this step saved.
    """
    watchdog = watchdog or Watchdog(0)
    watchdog.alive(LONG)  # the first step is compiled
    times = LONG  # until its metrics are here: other hosts may take longer to come to it
    reach("compile")
    interval = Interval()
    waiting: tuple[int, Metrics, int] | None = None

    def read(step: int, metrics: Metrics, tokens: int) -> None:
        nonlocal interval, times
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        times = 1
        observe(step, values)
        if values["nonfinite_steps"] > settings.max_skipped:
            with jax.transfer_guard("allow"):
                raise DivergedError(_not_finite(step, values, explain(step, state)))
        skipped = values["skipped"]
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
        reach("step")
        asked = leave(step) if step < last_step else None
        due = [action for action in actions if action.due(step, last_step)]
        if due or asked:
            read(*waiting)
            waiting = None
            paused = time.perf_counter()
            for action in due:
                watchdog.alive(LONG)
                action.run(step, state)
            if asked:
                watchdog.alive(LONG)
                save(step, state)
                raise asked
            interval.started += time.perf_counter() - paused
            times = LONG  # others may still be at it
        watchdog.alive(times)
    if waiting is not None:
        read(*waiting)
    return state


def _not_finite(step: int, values: dict[str, float], explanation: str) -> str:
    return (
        f"step {step}: loss {values['loss_sum'] / max(values['weight_sum'], 1e-8):.4g}, gradient norm "
        f"{values['grad_norm']:.4g}: not finite; {explanation}nothing of it was applied, and the saved steps before it "
        "are intact; leave the batch out with --rewind_to and --skip_batches, or, in another --workdir, lower "
        "optimizer.learning_rate or lengthen optimizer.warmup_steps"
    )
