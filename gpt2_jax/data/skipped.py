"""Batches that a run leaves out, and so which batch a step reads."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpt2_jax.errors import DataError

_MOST = 2**40  # beyond any run; times a batch size it is still a number of 64 bits


@dataclasses.dataclass(frozen=True)
class Skip:
    """From step `at` on (counted from 0), `batches` batches are left out, besides what other skips leave out."""

    at: int
    batches: int


def batch_number(step: int, skips: Sequence[Skip]) -> int:
    """The number of the batch, in the order without skips, that `step` reads; both count from 0."""
    return step + sum(skip.batches for skip in skips if skip.at <= step)


def skips_to_json(skips: Sequence[Skip]) -> list[dict[str, int]]:
    """What `skips_from_json` reads."""
    return [dataclasses.asdict(skip) for skip in skips]


def skips_from_json(value: Any, where: str) -> tuple[Skip, ...]:
    """The skips in a parsed list of `{"at": 100, "batches": 20}`; `where` is for errors. Raises DataError."""
    if not isinstance(value, list):
        raise DataError(f"{where}: not a list; allowed: objects with at (0 or more) and batches (1 or more)")
    return tuple(_skip(entry, f"{where}[{number}]") for number, entry in enumerate(value))


def _skip(entry: Any, where: str) -> Skip:
    if isinstance(entry, dict) and entry.keys() == {"at", "batches"}:
        at, batches = entry["at"], entry["batches"]
        if type(at) is int and type(batches) is int and 0 <= at < _MOST and 1 <= batches < _MOST:
            return Skip(at, batches)
    raise DataError(f"{where}: not an object with the integers at (0 or more) and batches (1 or more) alone")
