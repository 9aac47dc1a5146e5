"""What happened in a run besides numbers: `events.jsonl`, one JSON object per line, in the order in which it happened.

    {"event": "loss_spike", "step": 57, "loss": 5.1, ...}

The file is a log: it is only ever added to, and steps that are made again after a resumption leave what they left
before. It is made with the first event.
"""

import json
import os
import pathlib
from typing import Any

from gpt2_jax.errors import DataError


class Events:
    """Adds to the file; one process at a time, the one that holds the run folder."""

    def __init__(self, file: pathlib.Path) -> None:
        self._file = file

    def write(self, event: str, step: int, **values: Any) -> None:
        """Appends a line, at once visible to readers of the file; what a killed process left of one goes first.

        Numbers must be finite. Raises OSError, of a full disk for one.
        """
        line = json.dumps({"event": event, "step": step, **values}, allow_nan=False) + "\n"
        with self._file.open("ab+") as stream:
            self._repair(stream.fileno())
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def _repair(self, descriptor: int) -> None:
        content = self._file.read_bytes()
        whole = content.rfind(b"\n") + 1
        tail = content[whole:]
        if not tail:
            return
        if _event(tail) is None:
            os.truncate(descriptor, whole)
        else:  # killed before the line break
            os.write(descriptor, b"\n")


def read_events(file: pathlib.Path) -> list[dict[str, Any]]:
    """The events in a file, none if it is not there; a last line cut short by a killed process is left out.

    Raises DataError for a line that is damaged otherwise.
    """
    if not file.exists():
        return []
    events = []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        event = _event(line)
        if event is not None:
            events.append(event)
        elif number < len(lines):
            raise DataError(f"{file}: line {number} is damaged: not a JSON object; remove that line")
    return events


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
