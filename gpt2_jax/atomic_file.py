"""Files that are old or new, never half."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A stream to a file in the same folder that is renamed to `path` when the block ends, and removed if it raises."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: pathlib.Path, text: str) -> None:
    """Writes the whole text, as UTF-8, under a temporary name in the same folder, then renames it to `path`."""
    with whole_file(path) as stream:
        stream.write(text.encode("utf-8"))
