"""Files with one JSON object, written by who knows whom: what of them is read, and how it is shown in a message."""

import json
import math
import pathlib
import reprlib
from collections.abc import Iterable
from typing import Any

from gpt2_jax.errors import DataError

# Sizes far above those of real files, so that a file of gigabytes is refused before it is read.
CONFIG_BYTES = 4 * 2**20
INDEX_BYTES = 16 * 2**20  # a name per tensor; 10,000 layers have 12 MB of them
TOKENIZER_BYTES = 32 * 2**20

_MOST_DIGITS = 100  # transformers writes 10**30 where it means "no limit"
_MOST_CHARACTERS = 160

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4


def read_json(file: pathlib.Path, most_bytes: int = CONFIG_BYTES) -> dict[str, Any]:
    """The object. Raises DataError when the file is missing, too large, damaged or something else."""
    return parse_json(read_file(file, most_bytes), str(file))


def read_file(file: pathlib.Path, most_bytes: int) -> bytes:
    """The content. Raises DataError when the file is missing, not a file (a pipe, say) or larger than `most_bytes`."""
    try:
        if file.exists() and not file.is_file():
            raise DataError(f"{file}: not a file")
        with file.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    if len(content) > most_bytes:
        raise DataError(f"{file}: larger than {most_bytes:,} bytes, the most that is read of it; not such a file")
    return content


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The object, as strict JSON: each key once, numbers finite. Raises DataError, naming `where`, for all else."""
    try:
        found = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_each_key_once,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except RecursionError:
        raise DataError(f"{where}: JSON that is nested too deeply; fetch it again") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({brief(error)}); fetch it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: not a JSON object; fetch it again")
    return found


def shown(value: Any) -> str:
    """A value for a message, as Python writes it: cut short where it is long, control characters escaped."""
    return _cut(_SHORT.repr(value))


def brief(text: object) -> str:
    """A text that may quote a file, for a message: on one line, cut short, control characters escaped."""
    characters = str(text)[: _MOST_CHARACTERS + 1]
    return _cut("".join(one if one.isprintable() else repr(one)[1:-1] for one in characters))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


def _each_key_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _parse_int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value
