"""Notes loss spikes, and steps that were left out, with the windows and documents that they read."""

import pathlib
import shlex
from typing import Any

from gpt2_jax.config import TrainConfig
from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.origins import Documents
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.errors import DataError
from gpt2_jax.remote_folder import address_of
from gpt2_jax.run.events import Events
from gpt2_jax.run.progress import Progress
from gpt2_jax.run.spikes import Spike, Spikes


class StepWatch:
    """See `loop.train`: its `observe`, in the one process that writes the run folder."""

    def __init__(
        self,
        config: TrainConfig,
        nonfinite_steps: int,
        batches: TrainBatches,
        store: TokenStore,
        folder: pathlib.Path,
        progress: Progress,
    ) -> None:
        """`nonfinite_steps` are those of the run up to now."""
        self._spikes = Spikes(config.spike_sigmas)
        self._nonfinite_steps, self._most = nonfinite_steps, config.max_skipped_steps
        self._batches, self._store = batches, store
        self._documents: Documents | None = None  # read at the first spike: there may be millions
        self._folder, self._progress = folder, progress
        self._events = Events(folder / "events.jsonl")

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of a step; one that changed nothing is no spike."""
        if values["nonfinite_steps"] > self._nonfinite_steps:
            self._nonfinite_steps = int(values["nonfinite_steps"])
            self._note_left_out(step, values)
        if values["skipped"] or not values["weight_sum"]:
            return
        spike = self._spikes.observe(step, values["loss_sum"] / values["weight_sum"])
        if spike is not None:
            self._note(spike)

    def _note_left_out(self, step: int, values: dict[str, float]) -> None:
        batch, lacking = self._batch(step)
        numbers = {name: str(values[name]) for name in ("loss_sum", "grad_norm")}  # no numbers of JSON's
        self._events.write("not_finite", step, **numbers, nonfinite_steps=self._nonfinite_steps, **batch)
        self._progress.say(
            f"step {step}: loss or gradient not finite, left out ({self._nonfinite_steps} so far, "
            f"{self._most} allowed), noted in events.jsonl{lacking}"
        )

    def _note(self, spike: Spike) -> None:
        batch, lacking = self._batch(spike.step)
        numbers = {"loss": spike.loss, "mean": spike.mean, "deviation": spike.deviation}
        self._events.write("loss_spike", spike.step, **numbers, **batch)
        self._progress.say(
            f"step {spike.step}: loss spike {spike.loss:.4f}, usual {spike.mean:.4f} (deviation "
            f"{spike.deviation:.4f}), noted in events.jsonl{lacking}; its texts: gpt2-jax data blame "
            f"--workdir={shlex.quote(address_of(self._folder))} --step={spike.step}"
        )

    def _batch(self, step: int) -> tuple[dict[str, Any], str]:
        """What a step read, for an event; and what is lacking there, for the screen."""
        index = step - 1  # steps count from 1 here, from 0 in the order of the batches
        windows = self._batches.all_window_indices(index)
        documents, lacking = self._touched(windows)
        batch = {"batch": self._batches.batch_number(index), "windows": windows, "documents": documents}
        return batch, lacking

    def _touched(self, windows: list[int]) -> tuple[list[int] | None, str]:
        """The documents; where they cannot be told, None, and why: no reason to stop a run."""
        try:
            if self._documents is None:
                self._documents = Documents(self._store.split("train"))
            return self._documents.touched(self._batches.windows, windows), ""
        except DataError as error:
            return None, f" without its documents ({error})"
