"""Going back to a saved step and on from there without the batches that came next: what a loss spike may call for.

The run's list of skipped batches, in `run.json`, is the record: a command that is repeated, by a cluster that starts a
job again for one, finds its rewind there and goes on from the newest step.
"""

import dataclasses
import pathlib

from etils import epath

from gpt2_jax.data.skipped import Skip
from gpt2_jax.errors import UsageError
from gpt2_jax.run.events import Events
from gpt2_jax.run.run_folder import read_skipped, saved_steps, set_aside

REWOUND = "rewound"


@dataclasses.dataclass(frozen=True)
class Rewind:
    """Back to the state after `step` (0: the beginning), then on with the batch after the next `batches`."""

    step: int
    batches: int


def skips_of_run(folder: pathlib.Path, rewind: Rewind | None) -> tuple[tuple[Skip, ...], bool]:
    """The batches that the run in `folder` leaves out from now on, and whether it has to be rewound for that.

    Raises:
      UsageError: the step to go back to is not saved.
      DataError: the record is damaged.
    """
    recorded = read_skipped(folder) if (folder / "run.json").exists() else ()
    if rewind is None:
        return recorded, False
    wanted = Skip(rewind.step, rewind.batches)
    if recorded and recorded[-1] == wanted:  # what was skipped after it was part of what it went back from
        return recorded, False
    saved = saved_steps(folder)
    if rewind.step and rewind.step not in saved:
        raise UsageError(
            f"--rewind_to={rewind.step}: that step is not saved; allowed: 0 for the beginning"
            + "".join(f", {step}" for step in saved)
        )
    return (*(skip for skip in recorded if skip.at < rewind.step), wanted), True


def move_later_saves(folder: pathlib.Path, checkpoints: epath.Path, rewind: Rewind) -> None:
    """Moves the saves that come after the step to the folder `rewound` beside them, and notes it in `events.jsonl`."""
    later = [step for step in saved_steps(folder) if step > rewind.step]
    for step in reversed(later):  # the newest first: whenever this is interrupted, what is left has no gap
        set_aside(checkpoints, step, REWOUND)
    Events(folder / "events.jsonl").write(
        "rewind", max(later, default=rewind.step), to=rewind.step, skip_batches=rewind.batches, moved=later
    )
