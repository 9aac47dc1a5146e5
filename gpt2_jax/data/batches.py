"""Batches for training and for evaluation, each a pure function of its number.

B: rows of a batch, T: context length.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from gpt2_jax.data.skipped import Skip, batch_number
from gpt2_jax.data.windows import Windows
from gpt2_jax.errors import UsageError

# tokens [B, T] int32, targets [B, T] int32, weights [B, T] float32
Batch = dict[str, np.ndarray]


class TrainBatches:
    """Batch `step` for any step, from windows, seed and step alone: to resume is to ask for a later step.

    Row r of step s is element s * batch_size + r of an endless sequence, in which each epoch is a new
    permutation of all windows. `rows` are the rows of the global batch that this process feeds; None: all of
    them. With `context_lengths`, divisors of T, a length L is drawn for each step and its
    windows are cut into T/L rows each: [B * T/L, L], as many tokens as ever. `skips` are batches left out: a step
    after one reads what a later step would have read, its length included. Raises UsageError for arguments that do not
    fit.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        batch_size: int,
        seed: int,
        context_lengths: tuple[int, ...] = (),
        rows: Sequence[int] | None = None,
        skips: Sequence[Skip] = (),
    ) -> None:
        import grain  # here, because it imports JAX

        if seed < 0:
            raise UsageError(f"seed={seed}: a seed is 0 or more")
        for length in context_lengths:
            if length < 1 or windows.context_length % length:
                raise UsageError(
                    f"train.context_lengths={context_lengths}: {length} does not divide the context length "
                    f"{windows.context_length}"
                )
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._context_lengths = context_lengths
        self._rows = _local_rows(batch_size, rows)
        self._skips = tuple(skips)
        self._order = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()

    @property
    def num_windows(self) -> int:
        """Windows in an epoch."""
        return len(self._windows)

    @property
    def windows(self) -> Windows:
        """What the batches are made of."""
        return self._windows

    def batch_number(self, step: int) -> int:
        """Which batch of the order without skips `step` reads."""
        return batch_number(step, self._skips)

    def window_indices(self, step: int) -> list[int]:
        """The numbers of the windows in this process's rows of batch `step`."""
        return self._window_indices(step, self._rows)

    def all_window_indices(self, step: int) -> list[int]:
        """The numbers of the windows in all rows of batch `step`, whichever process feeds them."""
        return self._window_indices(step, range(self._batch_size))

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`, counted from 0."""
        length = self._context_length(self.batch_number(step))
        batch = _stack([self._windows[index] for index in self.window_indices(step)])
        return {name: array.reshape(-1, length) for name, array in batch.items()}

    def iterate(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for the steps `start` to `stop` - 1, made ahead of time in threads."""
        import grain

        if start >= stop:
            return
        steps = grain.MapDataset.range(start, stop).map(lambda step: (int(step), self.batch(int(step))))
        ahead = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
        try:
            yield from ahead
        finally:
            ahead.close()  # ends the threads

    def _window_indices(self, step: int, rows: Sequence[int]) -> list[int]:
        first = self.batch_number(step) * self._batch_size
        return [int(self._order[first + row]) for row in rows]

    def _context_length(self, number: int) -> int:
        if not self._context_lengths:
            return self._windows.context_length
        digest = hashlib.blake2b(f"{self._seed}/{number}".encode(), digest_size=8).digest()
        return self._context_lengths[int.from_bytes(digest, "little") % len(self._context_lengths)]


class EvaluationBatches:
    """All windows in their order, once each; rows that fill the last batch up have weight 0.

    `max_windows` limits them to the first so many; 0: all. `rows` is as in `TrainBatches`; every process has
    the same number of batches.
    """

    def __init__(
        self, windows: Windows, batch_size: int, max_windows: int = 0, rows: Sequence[int] | None = None
    ) -> None:
        self._windows = windows
        self._batch_size = batch_size
        self._rows = _local_rows(batch_size, rows)
        self._count = min(len(windows), max_windows) if max_windows else len(windows)

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def batch(self, number: int) -> Batch:
        """This process's rows of batch `number`; IndexError if there is none."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        indices = [number * self._batch_size + row for row in self._rows]
        empty_T = np.zeros(self._windows.context_length, np.int32)
        fill = (empty_T, empty_T, empty_T.astype(np.float32))
        return _stack([self._windows[index] if index < self._count else fill for index in indices])

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(len(self)))


def _local_rows(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    if batch_size < 1:
        raise UsageError(f"train.batch_size={batch_size}: a batch has 1 row or more")
    local = range(batch_size) if rows is None else rows
    if len(local) == 0 or not all(0 <= row < batch_size for row in local):
        raise UsageError(f"rows {[*local]} of a batch of {batch_size}: allowed are some of 0 to {batch_size - 1}")
    return local


def _stack(windows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    tokens, targets, weights = zip(*windows, strict=True)
    return {"tokens": np.stack(tokens), "targets": np.stack(targets), "weights": np.stack(weights)}
