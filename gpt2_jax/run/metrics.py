"""Where numbers go: `metrics.jsonl` is the source, TensorBoard and Weights & Biases are optional mirrors."""

import json
import math
import pathlib
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import tqdm

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import values_by_key


class MetricWriter(Protocol):
    """Takes named numbers of a step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records the values."""

    def close(self) -> None:
        """Hands on what is buffered."""


class JsonLines:
    """One JSON object per report: `{"step": 10, "loss": 3.2, ...}`."""

    def __init__(self, file: pathlib.Path, resume_step: int) -> None:
        """Opens `file` for appending; reports of steps after `resume_step`, which will be made again, are dropped."""
        if file.exists():
            kept = [json.dumps(report) + "\n" for report in read_reports(file) if report["step"] <= resume_step]
            write_text_atomically(file, "".join(kept))
        self._stream = file.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line, at once visible to readers of the file; null is a number that is not finite."""
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._stream.write(json.dumps({"step": step, **numbers}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class Mirror:
    """A writer that training does without: what it raises is told once, and nothing more is written to it."""

    def __init__(self, name: str, make: Callable[[], MetricWriter]) -> None:
        """Makes the writer; `name` is for the warning."""
        self._name = name
        self._writer: MetricWriter | None = None
        self._try(lambda: setattr(self, "_writer", make()))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Hands the values on while the writer works."""
        writer = self._writer
        if writer is not None:
            self._try(lambda: writer.write(step, values))

    def close(self) -> None:
        """Closes the writer if it still works."""
        if self._writer is not None:
            self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever the libraries and services behind it may raise
            self._writer = None
            told = " ".join(f"{type(error).__name__}: {error}".split())
            tqdm.tqdm.write(
                f"train.py: warning: {self._name} is given up: {told[:300]}; training goes on, all numbers are in "
                "metrics.jsonl",
                file=sys.stderr,
            )


class TensorBoard:
    """Scalars for TensorBoard, as tensorboardX's records.

    Not through its `SummaryWriter`, which writes in a thread: when that fails, as on a full disk, its queue fills and
    the next write waits forever.
    """

    def __init__(self, folder: pathlib.Path, resume_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._events = EventsWriter(str(folder / "events"))
        # TensorBoard shows nothing of what was written before for this step or later ones.
        purge = Event(wall_time=time.time(), step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._events.write_event(purge)
        self._events.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds each value as a scalar, at once visible to readers of the file."""
        for name, value in values.items():
            self._events.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


class WeightsAndBiases:
    """Scalars for Weights & Biases; WANDB_MODE=offline keeps them on this machine."""

    def __init__(self, folder: pathlib.Path, project: str, config: RunConfig) -> None:
        import wandb

        id_file = folder / "wandb_id.txt"  # a resumed run goes on in the same run there
        if not id_file.exists():
            write_text_atomically(id_file, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            name=folder.resolve().name,
            dir=str(folder),
            config=values_by_key(config),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values under their step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


def read_reports(file: pathlib.Path) -> list[dict[str, Any]]:
    """The reports in a `metrics.jsonl`; a last line cut short by a killed process is left out."""
    reports = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            reports.append(json.loads(line))
        except ValueError:
            break  # only the line in writing when the process died can be damaged
    return reports
