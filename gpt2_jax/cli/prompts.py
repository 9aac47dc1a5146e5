"""Prompts as they are typed: on the command line, in a file, on standard input."""

import dataclasses
import os
import sys

from gpt2_jax.errors import UsageError
from gpt2_jax.user_paths import expand_user


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt: text, or, where `text` is None, token ids."""

    text: str | None
    ids: tuple[int, ...] = ()


def read_prompts(name: str) -> list[Prompt]:
    """A prompt per line of a file, or of standard input for "-".

    Raises UsageError for what cannot be read or is not UTF-8.
    """
    if name == "-":
        where, data = "standard input", sys.stdin.buffer.read()
    else:
        where = f"--prompts={name}"
        try:
            data = expand_user(name).read_bytes()
        except OSError as error:
            raise UsageError(f"{where}: {error.strerror}; name a file with a prompt per line, or -") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    if not lines:
        raise UsageError(f"{where}: no prompts there; give one per line")
    return [Prompt(line) for line in lines]


def parse_ids(text: str) -> tuple[int, ...]:
    """The ids in "1,2,3". Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise UsageError(f"--prompt_ids={text}; allowed: token ids with commas between, such as 464,6193") from None


def utf8(flag: str, text: str) -> str:
    """The text of a flag from its bytes, whatever the locale. Raises UsageError when they are not UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise UsageError(f"{flag}: not UTF-8 ({error}); convert the text to UTF-8") from None
