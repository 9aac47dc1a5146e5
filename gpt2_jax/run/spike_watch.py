"""Notes loss spikes while a run trains, with the windows and documents that the step read."""

import math
import pathlib
import shlex

from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.origins import Documents
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.errors import DataError
from gpt2_jax.remote_folder import address_of
from gpt2_jax.run.events import Events
from gpt2_jax.run.progress import Progress
from gpt2_jax.run.spikes import Spike, Spikes


class SpikeWatch:
    """See `loop.train`: its `observe`, in the one process that writes the run folder."""

    def __init__(
        self, sigmas: float, batches: TrainBatches, store: TokenStore, folder: pathlib.Path, progress: Progress
    ) -> None:
        self._spikes = Spikes(sigmas)
        self._batches, self._store = batches, store
        self._documents: Documents | None = None  # read at the first spike: there may be millions
        self._folder, self._progress = folder, progress
        self._events = Events(folder / "events.jsonl")

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of a step; one that changed nothing (float16's overflow) is no spike."""
        if values.get("skipped") or not values["weight_sum"]:
            return
        loss = values["loss_sum"] / values["weight_sum"]
        spike = self._spikes.observe(step, loss) if math.isfinite(loss) else None
        if spike is not None:
            self._note(spike)

    def _note(self, spike: Spike) -> None:
        index = spike.step - 1  # steps count from 1 here, from 0 in the order of the batches
        windows = self._batches.all_window_indices(index)
        documents, lacking = self._touched(windows)
        self._events.write(
            "loss_spike",
            spike.step,
            loss=spike.loss,
            mean=spike.mean,
            deviation=spike.deviation,
            batch=self._batches.batch_number(index),
            windows=windows,
            documents=documents,
        )
        self._progress.say(
            f"step {spike.step}: loss spike {spike.loss:.4f}, usual {spike.mean:.4f} (deviation "
            f"{spike.deviation:.4f}), noted in events.jsonl{lacking}; its texts: gpt2-jax data blame "
            f"--workdir={shlex.quote(address_of(self._folder))} --step={spike.step}"
        )

    def _touched(self, windows: list[int]) -> tuple[list[int] | None, str]:
        """The documents; where they cannot be told, None, and why: no reason to stop a run."""
        try:
            if self._documents is None:
                self._documents = Documents(self._store.split("train"))
            return self._documents.touched(self._batches.windows, windows), ""
        except DataError as error:
            return None, f" without its documents ({error})"
