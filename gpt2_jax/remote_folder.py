"""Folders at gs://, and local mirrors of them.

A mirror is a local folder with the small files of a remote one. Its file `.remote.json` has the remote address and what
each file was when both sides were last equal, so that only changed files travel. Saves (`checkpoints/`) are never
mirrored: Orbax writes and reads them where they are. A file gets its name, here or there, when it is whole.
"""

import base64
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from etils import epath

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.errors import Gpt2JaxError, UsageError
from gpt2_jax.user_paths import cache_folder

_MARKER = ".remote.json"
_NOT_MIRRORED = re.compile(
    r"checkpoints/.*|(.*/)?huggingface\.new/.*|.*\.(tmp|lock)|\.remote\.json|\.writable\..*|lease\.json"
)
_ADDRESS = re.compile(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^/#?*\[\]\s]+)+/?")
_AT_ONCE = 8  # copies
_REMEDY = "check the bucket's name and the credentials (gcloud auth application-default login)"

Check = Callable[[str, pathlib.Path, pathlib.Path], None]
_Known = dict[str, list[Any]]  # by file: its size, its time of change, the md5 that the remote side has


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an address gs://BUCKET/PATH. Raises UsageError for one that is not well formed."""
    address = os.fspath(path)
    if not address.startswith("gs://"):
        return False
    if not _ADDRESS.fullmatch(address) or {".", ".."} & set(address.split("/")):
        raise UsageError(f"{address}: not an address; write gs://BUCKET/PATH, without spaces and #?*[]")
    return True


def address_of(folder: pathlib.Path) -> str:
    """How the user knows `folder`: by the gs:// address that it mirrors, else by its own path."""
    marker = _read_marker(folder)
    return str(folder) if marker is None else marker[0]


def storage_path(path: str | os.PathLike[str]) -> epath.Path:
    """A folder on this machine or at gs://, as Orbax takes it."""
    # What other processes write must be seen, and gs:// be read by the same library whatever else is installed. Both
    # are decided at the first use.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    os.environ.setdefault("EPATH_USE_TF", "false")
    return epath.Path(path if is_remote(path) else pathlib.Path(path).absolute())


def make_mirror(address: str, kind: str) -> pathlib.Path:
    """The mirror of `address` in the cache folder `kind`, as it is: empty before the first `pull`."""
    address = address.rstrip("/")
    folder = cache_folder(kind) / hashlib.sha256(address.encode()).hexdigest()[:16] / address.rpartition("/")[2]
    if address_of(folder) != address:
        folder.mkdir(parents=True, exist_ok=True)
        _write_marker(folder, address, {})
    return folder


def check_writable(address: str) -> None:
    """Writes a file there and removes it. Raises UsageError where that is not allowed."""
    probe = f"{address.rstrip('/')}/.writable.{os.getpid()}"
    with _told(address):
        _filesystem().pipe_file(probe, b"")
        _filesystem().rm_file(probe)


def pull(folder: pathlib.Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Makes a mirror equal to the remote files whose names are `wanted`; does nothing in a folder that is no mirror.

    Raises UsageError or Gpt2JaxError, with the address, where that cannot be reached.
    """
    marker = _read_marker(folder)
    if marker is None:
        return
    address, known = marker
    there = {name: md5 for name, md5 in list_files(address).items() if wanted(name)}
    changed = [name for name, md5 in there.items() if known.get(name) != [*_state(folder / name), md5] or not md5]
    fetch([(f"{address}/{name}", folder / name) for name in changed])
    _remove_others(folder, set(there))
    _write_marker(folder, address, {name: [*_state(folder / name), md5] for name, md5 in there.items()})


def push(folder: pathlib.Path) -> None:
    """Sends what has changed in a mirror, and removes there what was removed here; see `pull`."""
    marker = _read_marker(folder)
    if marker is None:
        return
    address, known = marker
    here = sorted(_names(folder), key=lambda name: (name == "config.json", name))  # where that is, a run is
    for name in here:
        state = _state(folder / name)  # before it is read: what changes meanwhile is sent again
        if known.get(name, [])[:2] != state:
            with _told(address), (folder / name).open("rb") as stream:
                md5 = base64.b64encode(hashlib.file_digest(stream, "md5").digest()).decode()
                _filesystem().put_file(str(folder / name), f"{address}/{name}", consistency="md5")
            known[name] = [*state, md5]
    for name in set(known) - set(here):
        with _told(address):
            _filesystem().rm_file(f"{address}/{name}")
        del known[name]
    _write_marker(folder, address, known)


def list_files(address: str) -> dict[str, str]:
    """Names of the files below `address` but for saves, with the md5 of each ("" where the server knows none)."""
    with _told(address):
        found = _filesystem().find(address, detail=True)
    root = address.removeprefix("gs://") + "/"
    files = {path.removeprefix(root): info.get("md5Hash", "") for path, info in found.items() if path.startswith(root)}
    return {name: md5 for name, md5 in files.items() if _is_mirrored(name)}


def read_bytes(address: str) -> bytes:
    """What a small remote file holds."""
    with _told(address):
        return bytes(_filesystem().cat_file(address))


def read_object(address: str) -> bytes | None:
    """What a small remote file holds; None where there is none."""
    with _told(address):
        try:
            return bytes(_filesystem().cat_file(address))
        except FileNotFoundError:
            return None


def create_object(address: str, data: bytes) -> bool:
    """Writes a small remote file; False where there is one already, which the storage itself decides."""
    with _told(address):
        try:
            _filesystem().pipe_file(address, data, mode="create")
        except FileExistsError:
            return False
        return True


def write_object(address: str, data: bytes) -> None:
    """Writes a small remote file, whether or not there is one."""
    with _told(address):
        _filesystem().pipe_file(address, data)


def remove_object(address: str) -> bool:
    """Removes a remote file; False where there is none."""
    with _told(address):
        try:
            _filesystem().rm_file(address)
        except FileNotFoundError:
            return False
        return True


def move_folder(source: str, target: str, first: str) -> None:
    """Copies all below `source` to `target`, then removes it from `source`, the file `first` before all others.

    Raises UsageError.
    """
    with _told(source):
        root = source.removeprefix("gs://") + "/"
        names = [path.removeprefix(root) for path in _filesystem().find(source)]
        for name in names:
            _filesystem().cp_file(f"{source}/{name}", f"{target}/{name}")
        for name in sorted(names, key=lambda name: name != first):
            _filesystem().rm_file(f"{source}/{name}")


def fetch(files: list[tuple[str, pathlib.Path]], check: Check | None = None) -> None:
    """Copies remote files, some at a time, each to its place in one move.

    Args:
      files: addresses and where their copies go.
      check: called before each move with address, copy and place; what it raises leaves the place as it was.
    """
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = [pool.submit(_fetch_one, address, file, check) for address, file in files]
        try:
            for done in waiting:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _fetch_one(address: str, file: pathlib.Path, check: Check | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with _told(address):
            _filesystem().get_file(address, str(temporary))
        if check is not None:
            check(address, temporary, file)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _is_mirrored(name: str) -> bool:
    # Any name can be in a bucket: those with empty parts are marks of folders, those with dots would lead elsewhere.
    return not _NOT_MIRRORED.fullmatch(name) and not {"", ".", ".."} & set(name.split("/"))


def _names(folder: pathlib.Path) -> list[str]:
    files = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return [name for name in (file.relative_to(folder).as_posix() for file in files) if _is_mirrored(name)]


def _state(file: pathlib.Path) -> list[int]:
    try:
        stat = file.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _remove_others(folder: pathlib.Path, names: set[str]) -> None:
    for name in set(_names(folder)) - names:
        (folder / name).unlink()
    for below in sorted(folder.rglob("*"), reverse=True):
        if below.is_dir() and not below.is_symlink() and not any(below.iterdir()):
            below.rmdir()


def _read_marker(folder: pathlib.Path) -> tuple[str, _Known] | None:
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return marker["address"], marker["files"]


def _write_marker(folder: pathlib.Path, address: str, known: _Known) -> None:
    write_text_atomically(folder / _MARKER, json.dumps({"address": address, "files": known}))


def _filesystem() -> Any:
    if importlib.util.find_spec("gcsfs") is None:
        raise UsageError("gs:// needs gcsfs, which is not installed: pip install 'gpt2-jax[gcs]'")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it writes tracebacks of what is told in one line
    return fsspec.filesystem("gcs", use_listings_cache=False)  # the same object at each call


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """Turns what the storage raises into one line: UsageError where asking again would not help."""
    _filesystem()  # which says what is not installed
    import aiohttp
    import gcsfs.retry
    import google.auth.exceptions

    try:
        yield
    except (aiohttp.ClientError, gcsfs.retry.HttpError, google.auth.exceptions.GoogleAuthError) as error:
        refused = getattr(error, "code", None) in (400, 401, 403) and isinstance(error, gcsfs.retry.HttpError)
        raise _error(address, error, UsageError if refused else Gpt2JaxError) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine: a full disk, say
            raise
        raise _error(address, error, UsageError) from error


def _error(address: str, error: Exception, kind: type[Gpt2JaxError]) -> Gpt2JaxError:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return kind(f"{address}: cannot be read or written ({text[:300]}); {_REMEDY}")
