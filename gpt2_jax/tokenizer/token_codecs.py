"""The three ways from text to ids: byte-pair merges, single bytes, single characters."""

import functools
import re
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import tiktoken

from gpt2_jax.errors import DataError
from gpt2_jax.tokenizer.byte_pair_encoding import END_OF_TEXT, GPT2_PATTERN, merge_ranks

# A run of whitespace this long makes the look-ahead of GPT-2's pattern exhaust the regex engine's stack. The
# class is Unicode's White_Space, which Python's \s is not quite.
_LONG_WHITESPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")


class Codec(Protocol):
    """One vocabulary: ids from 0 to `vocab_size` - 1; `encode` never makes `end_of_text`, if there is one."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None: ...

    @property
    def content(self) -> dict[str, Any]:
        """What decides the ids, as JSON values."""
        ...

    def encode(self, text: str) -> np.ndarray: ...

    def decode_bytes(self, ids: np.ndarray) -> bytes: ...


class BytePairCodec:
    """GPT-2's cutting of text, then the given merges; end-of-text is the last id."""

    def __init__(self, name: str, merges: tuple[str, ...]) -> None:
        self.merges = merges
        self._ranks = merge_ranks(merges, name)
        self.vocab_size = len(self._ranks) + 1
        self.end_of_text = len(self._ranks)
        self.content = {"pattern": GPT2_PATTERN, "merges": list(merges)}
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> np.ndarray:
        try:
            return _encode_ordinary(self._encoding, text)
        except ValueError:  # the regex engine's stack was too small for a long run of whitespace
            parts = list(self._parts(text))
        try:
            return np.concatenate([_encode_ordinary(encoding, part) for encoding, part in parts])
        except ValueError as error:
            raise DataError(f"a text of {len(text)} characters cannot be encoded: {error}") from None

    def _parts(self, text: str) -> Iterator[tuple[tiktoken.Encoding, str]]:
        """Parts that have the same ids as the whole text; each long run of whitespace is one of them."""
        start = 0
        for run in _LONG_WHITESPACE.finditer(text):
            # The pattern leaves the last blank before a word to the word.
            end = run.end() - (run.end() < len(text))
            yield self._encoding, text[start : run.start()]
            yield self._whitespace_encoding, text[run.start() : end]
            start = end
        yield self._encoding, text[start:]

    @functools.cached_property
    def _whitespace_encoding(self) -> tiktoken.Encoding:
        """The same merges, applied to the whole text as one piece."""
        return tiktoken.Encoding("whitespace", pat_str=r"\s+", mergeable_ranks=self._ranks, special_tokens={})

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        return self._encoding.decode_bytes(ids.tolist())


def _encode_ordinary(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    return encoding.encode_to_numpy(text, disallowed_special=())


class ByteCodec:
    """Each byte of the UTF-8 text is an id; 256 is end-of-text."""

    vocab_size = 257
    end_of_text = 256

    def __init__(self) -> None:
        self.content: dict[str, Any] = {}

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        end = END_OF_TEXT.encode()
        return end.join(part.astype(np.uint8).tobytes() for part in _split_at(ids, self.end_of_text))


class CharacterCodec:
    """The sorted characters of a corpus are the ids; there is no end-of-text."""

    end_of_text = None

    def __init__(self, characters: str) -> None:
        self._code_points = np.frombuffer(characters.encode("utf-32-le"), "<u4").astype(np.uint32)
        self.vocab_size = len(characters)
        self.content = {"characters": characters}

    def encode(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint32)
        ids = np.searchsorted(self._code_points, code_points)
        known = self._code_points[np.minimum(ids, self.vocab_size - 1)] == code_points
        if not known.all():
            position = int(np.argmin(known))
            raise DataError(
                f"character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} "
                f"is not among the {self.vocab_size} characters of the tokenizer; "
                "leave it out, or use the tokenizer bytes or bpe:N"
            )
        return ids.astype(np.uint32)

    def decode_bytes(self, ids: np.ndarray) -> bytes:
        return self._code_points[ids].astype("<u4").tobytes().decode("utf-32-le").encode("utf-8")


def _split_at(ids: np.ndarray, separator: int) -> list[np.ndarray]:
    ends = np.flatnonzero(ids == separator)
    return [ids[start:end] for start, end in zip([0, *(ends + 1)], [*ends, len(ids)], strict=True)]
