"""Files that are old or new, never half."""

import os
import pathlib


def write_text_atomically(path: pathlib.Path, text: str) -> None:
    """Writes the whole text under a temporary name in the same folder, then renames it to `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
