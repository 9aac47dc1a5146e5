"""Where a training batch comes from: its windows, and the documents that these touch.

T: context length.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.token_store import TokenStream
from gpt2_jax.data.windows import Windows


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of one document: its number in the split, the tokens before the stretch, and those in it."""

    document: int
    offset: int
    tokens: int


class Documents:
    """The documents of a stream by the places of their tokens. Raises DataError if the store does not know them."""

    def __init__(self, stream: TokenStream) -> None:
        self._lengths = stream.document_lengths
        self._ends = np.cumsum(self._lengths)

    def pieces(self, positions: np.ndarray) -> list[Piece]:
        """The documents at rising `positions` in the stream, as `Windows.positions` gives them; -1 is in none."""
        inside = positions[positions >= 0]
        numbers, first, counts = np.unique(
            np.searchsorted(self._ends, inside, side="right"), return_index=True, return_counts=True
        )
        begins = self._ends[numbers] - self._lengths[numbers]
        offsets = inside[first] - begins
        return [Piece(*map(int, piece)) for piece in zip(numbers, offsets, counts, strict=True)]

    def touched(self, windows: Windows, numbers: Iterable[int]) -> list[int]:
        """The numbers of all documents that the windows of these numbers read, in rising order."""
        return sorted({piece.document for number in numbers for piece in self.pieces(windows.positions(number))})


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
      window: the number of the window that it is, or is cut from.
      ids: its inputs and, last, the final target, without padding; empty where it is padding alone.
      pieces: the documents that these are of, in order; None: unknown.
    """

    window: int
    ids: np.ndarray
    pieces: tuple[Piece, ...] | None


def rows_of_batch(batches: TrainBatches, step: int, documents: Documents | None) -> list[Row]:
    """The rows that `batches.batch(step)` has, in order; `documents` None: of a store that does not know them."""
    batch, numbers = batches.batch(step), batches.window_indices(step)
    windows = batches.windows
    count, length = batch["tokens"].shape
    parts = windows.context_length // length
    rows = []
    for row in range(count):
        number, part = numbers[row // parts], row % parts
        targets = int(np.count_nonzero(batch["weights"][row]))
        taken = targets + 1 if targets else 0
        ids = np.concatenate([batch["tokens"][row, :targets], batch["targets"][row, max(targets - 1, 0) : targets]])
        pieces = None
        if documents is not None:
            start = part * length
            pieces = tuple(documents.pieces(windows.positions(number)[start : start + taken]))
        rows.append(Row(number, ids, pieces))
    return rows
