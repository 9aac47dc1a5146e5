"""Windows: the inputs, targets and weights of one row of a batch, by number.

T: context length.
"""

from typing import Protocol

import numpy as np

from gpt2_jax.data.token_store import TokenStream
from gpt2_jax.errors import DataError, UsageError

Window = tuple[np.ndarray, np.ndarray, np.ndarray]


class Windows(Protocol):
    """Random access to windows of `context_length` targets each."""

    @property
    def context_length(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Window:
        """(tokens_T, targets_T, weights_T), int32, int32 and float32; a target of weight 0 is padding."""
        ...

    def positions(self, index: int) -> np.ndarray:
        """Where in the stream the T inputs and the last target are, [T + 1] int64; -1 for what is put in besides."""
        ...


class PackedWindows:
    """The stream cut into windows of T targets, one after another, whatever documents they cross.

    Window i has the tokens i*T to i*T + T, of which the first T are inputs and the last T targets. With
    `include_tail` the rest of the stream is a last window, padded at weight 0, so that every token but the
    first is a target exactly once. Raises DataError for a stream that has no window.
    """

    def __init__(self, stream: TokenStream, context_length: int, *, include_tail: bool = False) -> None:
        _check_context_length(context_length)
        targets = len(stream) - 1
        self.context_length = context_length
        self._stream = stream
        self._length = -(-targets // context_length) if include_tail else targets // context_length
        if self._length < 1:
            needed = 2 if include_tail else context_length + 1
            raise DataError(
                f"the {stream.name} split of {len(stream)} tokens has no window: one of context length "
                f"{context_length} takes {needed} tokens; make train.context_length smaller, or give it more text"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Window:
        _check_index(index, self._length)
        start = index * self.context_length
        tokens = self._stream.read(start, min(start + self.context_length + 1, len(self._stream)))
        return _padded(tokens[:-1], tokens[1:], self.context_length, padding=0)

    def positions(self, index: int) -> np.ndarray:
        """See `Windows.positions`."""
        _check_index(index, self._length)
        start = index * self.context_length
        places = np.arange(start, start + self.context_length + 1)
        places[places >= len(self._stream)] = -1
        return places


class PaddedWindows:
    """Each document by itself: end-of-text, then the document as it is stored, cut into windows of T targets.

    A stored document ends with end-of-text, unless it is one that was cut in two by the held-out split. The
    last window of a document is padded with end-of-text at weight 0; what is padding is told by position, so
    the end-of-text that ends the document has weight 1. Raises UsageError without an end-of-text id,
    DataError for a split without documents.
    """

    def __init__(self, stream: TokenStream, context_length: int, end_of_text: int | None) -> None:
        _check_context_length(context_length)
        if end_of_text is None:
            raise UsageError(
                "data.windows=padded pads with end-of-text, which the tokenizer of this data has not; "
                "use data.windows=packed, or the tokenizer bytes, bpe:N or gpt2"
            )
        self.context_length = context_length
        self._stream = stream
        self._end_of_text = end_of_text
        lengths = stream.document_lengths
        self._document_ends = np.cumsum(lengths)
        self._window_ends = np.cumsum(-(-lengths // context_length))
        if len(lengths) == 0:
            raise DataError(f"the {stream.name} split has no documents, so no windows; give it more text")

    def __len__(self) -> int:
        return int(self._window_ends[-1])

    def __getitem__(self, index: int) -> Window:
        start, stop, is_first = self._targets(index)
        targets = self._stream.read(start, stop)
        before = np.array([self._end_of_text], np.int32) if is_first else self._stream.read(start - 1, start)
        tokens = np.concatenate([before, targets[:-1]])
        return _padded(tokens, targets, self.context_length, padding=self._end_of_text)

    def positions(self, index: int) -> np.ndarray:
        """See `Windows.positions`."""
        start, stop, is_first = self._targets(index)
        places = np.arange(start - 1, start + self.context_length)
        places[places >= stop] = -1
        if is_first:
            places[0] = -1
        return places

    def _targets(self, index: int) -> tuple[int, int, bool]:
        """Where the window's targets begin and end in the stream, and whether it is its document's first."""
        _check_index(index, len(self))
        document = int(np.searchsorted(self._window_ends, index, side="right"))
        begin = int(self._document_ends[document - 1]) if document else 0
        end = int(self._document_ends[document])
        number = index - (int(self._window_ends[document - 1]) if document else 0)
        start = begin + number * self.context_length
        return start, min(start + self.context_length, end), number == 0


def _padded(tokens: np.ndarray, targets: np.ndarray, context_length: int, padding: int) -> Window:
    weights_T = np.ones(context_length, np.float32)
    missing = context_length - len(targets)
    if missing:
        weights_T[len(targets) :] = 0
        fill = np.full(missing, padding, np.int32)
        return np.concatenate([tokens, fill]), np.concatenate([targets, fill]), weights_T
    return tokens, targets, weights_T


def _check_context_length(context_length: int) -> None:
    if context_length < 1:
        raise UsageError(f"train.context_length={context_length}: a window has 1 token or more")


def _check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"window {index} of {length}")
