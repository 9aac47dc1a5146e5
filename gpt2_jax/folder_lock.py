"""One process at a time may work on a folder."""

import contextlib
import fcntl
import os
import pathlib
import sys
from collections.abc import Iterator

from gpt2_jax.errors import UsageError


class FolderInUseError(UsageError):
    """Another process has the lock."""


@contextlib.contextmanager
def folder_lock(folder: pathlib.Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file beside `folder`. A process that ends in any way lets go of it.

    Raises UsageError if the file cannot be made, FolderInUseError if another process has it and `wait` is False.
    """
    path = folder.with_name(f"{folder.name}.lock")
    descriptor = _acquire(path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: pathlib.Path, wait: bool) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"{path}: cannot be made ({error.strerror}); name another folder") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(descriptor)
                message = f"{path}: another process works there; wait for it, or name another folder"
                raise FolderInUseError(message) from None
            print(f"waiting for another process, which holds {path}", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The last holder removed the file before it let go: what we hold may no longer be the file of that name.
        try:
            current = os.stat(path)
        except FileNotFoundError:
            current = None
        if current is not None and os.path.samestat(current, os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)
