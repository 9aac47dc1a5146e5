"""Where numbers go: `metrics.jsonl` is the source, TensorBoard and Weights & Biases are optional mirrors."""

import json
import math
import pathlib
import uuid
from typing import Any, Protocol

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


class TensorBoard:
    """Scalars for TensorBoard, through tensorboardX."""

    def __init__(self, folder: pathlib.Path, resume_step: int) -> None:
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds each value as a scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


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
