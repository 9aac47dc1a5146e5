"""Where a lease lies: a file in a folder, or an object in a bucket.

All that changes one changes it only if it is still what it was taken for, as far as its place allows. In a folder a new
lease is made only where there is none, an old one is moved away before it is judged, and a renewal is written into the
file that was read: a file that another put there meanwhile is not touched. A bucket makes a new one only where there is
none; between reading and the rest there is a moment, which is why who takes a lease over waits and reads it again.
"""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator
from typing import Protocol

from gpt2_jax.remote_folder import create_object, read_object, remove_object, write_object
from gpt2_jax.run.lease_holder import MAX_BYTES

NAME = "lease.json"
Judge = Callable[[bytes], bool]


class LeaseFile(Protocol):
    """A lease's place. All methods raise OSError or Gpt2JaxError where it cannot be reached."""

    def read(self) -> bytes | None:
        """What is there, cut where it is too long for a lease; None where there is nothing."""

    def create(self, data: bytes) -> bool:
        """Puts it there; False where there is something already."""

    def renew(self, ours: Judge, data: bytes) -> bool:
        """Writes it over what is `ours`, and is not longer; False where there is something else, or nothing."""

    def remove(self, wanted: Judge) -> bool:
        """Takes away what is `wanted`; False where there is something else, or nothing."""


class LocalLeaseFile:
    """In a folder on this machine, or on one that the network brings here."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._path = folder / NAME

    def read(self) -> bytes | None:
        """See `LeaseFile`."""
        try:
            with self._path.open("rb") as stream:
                return stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None

    def create(self, data: bytes) -> bool:
        """See `LeaseFile`."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with _closing(descriptor):
            try:
                _write(descriptor, data)
            except OSError:
                self._path.unlink()
                raise
        return True

    def renew(self, ours: Judge, data: bytes) -> bool:
        """See `LeaseFile`."""
        # Not by a new file that is renamed to this name: it would replace whatever has this name by then, and need room
        # on a disk that may be full.
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return False
        with _closing(descriptor):
            if not ours(os.read(descriptor, MAX_BYTES + 1)):
                return False
            os.lseek(descriptor, 0, os.SEEK_SET)
            _write(descriptor, data)
        return True

    def remove(self, wanted: Judge) -> bool:
        """See `LeaseFile`."""
        found = self.read()
        if found is None or not wanted(found):
            return False
        aside = self._path.with_name(f"{NAME}.{secrets.token_hex(8)}.tmp")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return False
        with aside.open("rb") as stream:
            found = stream.read(MAX_BYTES + 1)
        if not wanted(found):
            # Another's, that came meanwhile: back with it. If that one has given way since, it lapses.
            self.create(found)
        aside.unlink()
        return wanted(found)


class BucketLeaseFile:
    """In a folder at gs://."""

    def __init__(self, address: str) -> None:
        self._address = f"{address.rstrip('/')}/{NAME}"

    def read(self) -> bytes | None:
        """See `LeaseFile`."""
        return read_object(self._address)

    def create(self, data: bytes) -> bool:
        """See `LeaseFile`."""
        return create_object(self._address, data)

    def renew(self, ours: Judge, data: bytes) -> bool:
        """See `LeaseFile`."""
        if not self._is(ours):
            return False
        write_object(self._address, data)
        return True

    def remove(self, wanted: Judge) -> bool:
        """See `LeaseFile`."""
        return self._is(wanted) and remove_object(self._address)

    def _is(self, wanted: Judge) -> bool:
        found = self.read()
        return found is not None and wanted(found)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    if written != len(data):  # by a full disk, which the rest would tell
        os.write(descriptor, data[written:])
    os.fsync(descriptor)
