"""A token store at gs:// on this machine's disk: shards by the hash of what they hold, so that none is copied twice.

CACHE/shards/SHA256    the bytes of a shard, or of its document lengths: for all stores and processes
CACHE/copies/ADDRESS/  of a store, the tokenizer and a manifest that names the files above
"""

import concurrent.futures
import dataclasses
import hashlib
import pathlib
import re
import sys
from collections.abc import Iterable

from gpt2_jax.data.token_store import MANIFEST, Manifest, Shard, file_sha256, parse_manifest
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.folder_lock import folder_lock
from gpt2_jax.remote_folder import fetch, list_files, read_bytes


def copy_token_store(address: str, cache: pathlib.Path) -> pathlib.Path:
    """A folder with the token store at `address`, whose files are in `cache`; only those not there yet are copied.

    Each file is there when it is whole and has its hash, so a copy that was interrupted goes on where it was, one that
    is damaged is made anew, and processes that ask at once copy once.

    Raises:
      UsageError: the address cannot be read, or the cache folder not be written.
      DataError: what lies there is no token store, or not what its manifest says.
    """
    address = address.rstrip("/")
    names = list_files(address)
    if MANIFEST not in names:
        raise UsageError(f"source 'tokens:{address}': no {MANIFEST} there; copy a folder of gpt2-jax prepare to it")
    where = f"{address}/{MANIFEST}"
    manifest = parse_manifest(read_bytes(where), where)
    files = _files(manifest, where)
    shards = cache / "shards"
    folder = cache / "copies" / hashlib.sha256(address.encode()).hexdigest()[:16]
    try:
        shards.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"data.cache_dir={cache}: cannot be made ({error.strerror}); name another folder") from None
    _copy({sha256: f"{address}/{file}" for sha256, file in files.items()}, shards)
    others = [name for name in names if "/" not in name and name != MANIFEST and name not in files.values()]
    with folder_lock(folder):
        fetch([(f"{address}/{name}", folder / name) for name in others])  # the tokenizer
        _named_by_hash(manifest, shards).write(folder)
    return folder


def _files(manifest: Manifest, where: str) -> dict[str, str]:
    """Hash to name, of every file that the manifest lists. What it says becomes paths, so it is checked."""
    files = {}
    for shard in (shard for split in manifest.splits.values() for shard in split):
        for sha256, file in ((shard.sha256, shard.file), (shard.lengths_sha256, shard.lengths_file)):
            if file is None and sha256 is None:
                continue
            if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
                raise DataError(f"{where}: damaged: {sha256!r} is no sha256 of {file}; prepare the store again")
            if not isinstance(file, str) or not file or file.startswith("/") or ".." in file.split("/"):
                raise DataError(
                    f"{where}: {file!r} is not in the store's own folder (as after data.source=nanogpt:); "
                    "only a store that holds its shards can be used from gs://"
                )
            files[sha256] = file
    return files


def _copy(addresses: dict[str, str], shards: pathlib.Path) -> None:
    if not _bad(addresses, shards):
        return
    with folder_lock(shards):
        for leftover in shards.glob("*.tmp"):  # of a killed process: whoever copies has the lock
            leftover.unlink()
        missing = _bad(addresses, shards)  # another process may have copied them meanwhile
        if missing:
            print(f"copying {len(missing)} of {len(addresses)} files of the token store to {shards}", file=sys.stderr)
        fetch([(addresses[sha256], shards / sha256) for sha256 in missing], _check)


def _bad(hashes: Iterable[str], shards: pathlib.Path) -> list[str]:
    """Those whose files are missing or damaged."""
    listed = list(hashes)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        good = pool.map(lambda sha256: _has(shards / sha256, sha256), listed)
        return [sha256 for sha256, is_good in zip(listed, good, strict=True) if not is_good]


def _has(file: pathlib.Path, sha256: str) -> bool:
    return file.is_file() and file_sha256(file) == sha256


def _check(address: str, copy: pathlib.Path, file: pathlib.Path) -> None:
    found = file_sha256(copy)
    if found != file.name:
        raise DataError(f"{address}: sha256 is {found}, the manifest says {file.name}; copy the store there again")


def _named_by_hash(manifest: Manifest, shards: pathlib.Path) -> Manifest:
    def named(shard: Shard) -> Shard:
        lengths = None if shard.lengths_sha256 is None else str(shards / shard.lengths_sha256)
        return dataclasses.replace(shard, file=str(shards / shard.sha256), lengths_file=lengths)

    splits = {name: tuple(map(named, split)) for name, split in manifest.splits.items()}
    return dataclasses.replace(manifest, splits=splits)
