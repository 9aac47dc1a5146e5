"""One process at a time may build a folder."""

import contextlib
import fcntl
import os
import pathlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def folder_lock(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock file beside `folder`, waiting for a process that has it.

    A process that ends in any way lets go of it.
    """
    path = folder.with_name(f"{folder.name}.lock")
    descriptor = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: pathlib.Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which holds {path}", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The last holder removed the file before it let go: what we hold may no longer be the file of that
        # name.
        try:
            current = os.stat(path)
        except FileNotFoundError:
            current = None
        if current is not None and os.path.samestat(current, os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)
