"""The ids of one text into characters, as they come."""

import codecs
from collections.abc import Sequence

from gpt2_jax.errors import UsageError
from gpt2_jax.tokenizer import Tokenizer


class TextStream:
    """Releases text as soon as it is certain: whole characters, and no beginning of a stop string.

    Attributes:
      text: what has been released.
      stopped_by: the stop string before which the text ended, or None.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        """Raises UsageError for a stop string that is empty."""
        if not all(stop_strings):
            raise UsageError("a stop string is empty; allowed: one character or more")
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._released: list[str] = []
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._released)

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is certain now, which may be empty.

        Raises ValueError once a stop string has ended the text.
        """
        if self.stopped_by is not None:
            raise ValueError(f"the text has ended before {self.stopped_by!r}")
        return self._add(self._bytes.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Releases what was held back, where the text ends for another reason than a stop string.

        After a stop string there is nothing to release.
        """
        if self.stopped_by is not None:
            return ""
        text = self._add(self._bytes.decode(b"", final=True))
        if self.stopped_by is None:
            text += self._release(len(self._held))
        return text

    def _add(self, text: str) -> str:
        self._held += text
        # The one that ends first, so that it does not matter which characters came with one token.
        ends = [
            (self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stop_strings if stop in self._held
        ]
        if ends:
            end, _, self.stopped_by = min(ends)
            released = self._release(end - len(self.stopped_by))
            self._held = ""
            return released
        return self._release(len(self._held) - self._possible_beginning())

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        if released:
            self._released.append(released)
        return released
