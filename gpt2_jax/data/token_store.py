"""Token shards on disk: a folder with raw little-endian ids, document lengths and a manifest that says all.

The manifest is written last; a folder without one is no token store.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import weakref
from typing import Any

import numpy as np

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.errors import DataError
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer
from gpt2_jax.user_paths import expand_user

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")
_OPEN_SHARDS = 512  # each holds a file descriptor


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of ids. `file` and `lengths_file` are relative to the store's folder, or absolute."""

    file: str
    tokens: int
    max_id: int
    sha256: str
    documents: int | None = None
    lengths_file: str | None = None
    lengths_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a token store holds. `key` names the inputs that it was made from, `fingerprint` its content."""

    key: str
    source: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    empty_documents: int
    splits: dict[str, tuple[Shard, ...]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, over the ids, their order and the tokenizer; no paths and no dates."""
        shards = {
            split: [(shard.tokens, shard.sha256, shard.lengths_sha256) for shard in self.splits[split]]
            for split in SPLITS
        }
        content = [FORMAT_VERSION, self.dtype, self.tokenizer_fingerprint, shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, folder: pathlib.Path) -> None:
        """Write the manifest into `folder`, whole or not at all."""
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "splits": {split: [dataclasses.asdict(shard) for shard in self.splits[split]] for split in SPLITS},
        }
        write_json(folder / MANIFEST, content)


class _ShardFile:
    """An open shard, which may be removed meanwhile; closed when it is no longer used."""

    def __init__(self, path: pathlib.Path, max_id: int, dtype: np.dtype) -> None:
        self._path, self._max_id, self._dtype = path, max_id, dtype
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise self._changed(f"cannot be opened ({error.strerror})") from None
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from number `start` on. Raises DataError where they are not there, or not ids of the shard."""
        size, at = count * self._dtype.itemsize, start * self._dtype.itemsize
        try:
            data = os.pread(self._descriptor, size, at)
            while 0 < len(data) < size and (more := os.pread(self._descriptor, size - len(data), at + len(data))):
                data += more  # a read may end early
        except OSError as error:
            raise self._changed(f"cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise self._changed(f"is cut off after {os.fstat(self._descriptor).st_size} bytes")
        ids = np.frombuffer(data, self._dtype)
        if count and (largest := np.maximum.reduce(ids)) > self._max_id:  # half the time of ids.max()
            raise self._changed(f"has an id {largest}, more than its largest, {self._max_id}")
        return ids

    def _changed(self, how: str) -> DataError:
        return DataError(
            f"{self._path}: {how}, but it was whole when it was checked; put the file back, or prepare the store "
            "again; a run goes on by the same command"
        )


class TokenStream:
    """The ids of one split as one long row, read from files that are opened on first use; picklable.

    Read, not mapped: where a mapped file is cut short, the process dies without a word.
    """

    def __init__(self, name: str, folder: pathlib.Path, shards: tuple[Shard, ...], dtype: np.dtype) -> None:
        self.name = name
        self._folder = folder
        self._shards = shards
        self._dtype = dtype
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))
        self._opened: dict[int, _ShardFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids `start` to `stop` - 1, int32.

        Raises IndexError if they are not all in the stream, DataError if a file is no longer as the manifest says.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        tokens = np.empty(stop - start, np.int32)
        shard = bisect.bisect_right(self._ends, start)
        filled = 0
        while filled < len(tokens):
            end = self._ends[shard]
            offset = start + filled - (end - self._shards[shard].tokens)
            count = min(len(tokens) - filled, self._shards[shard].tokens - offset)
            part = self._file(shard).read(offset, count)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return tokens

    @functools.cached_property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document in order, its end-of-text included, int64.

        Raises DataError for a store that does not know its documents (made from nanoGPT's files).
        """
        lengths = [np.zeros(0, np.int64)]
        for shard in self._shards:
            if shard.lengths_file is None:
                raise DataError(
                    f"{shard.file}: where its documents end is not recorded; use data.windows=packed, "
                    "or prepare the text itself"
                )
            path = self._folder / shard.lengths_file
            try:
                part = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path}: not the document lengths of a token store ({error})") from None
            if part.sum() != shard.tokens or len(part) != shard.documents:
                raise DataError(
                    f"{path}: {len(part)} documents of {part.sum()} tokens; the manifest says "
                    f"{shard.documents} of {shard.tokens}; prepare the store again"
                )
            lengths.append(part)
        return np.concatenate(lengths)

    def _file(self, shard: int) -> _ShardFile:
        opened = self._opened.get(shard)
        if opened is None:
            if len(self._opened) >= _OPEN_SHARDS:
                self._opened.clear()
            opened = _ShardFile(self._folder / self._shards[shard].file, self._shards[shard].max_id, self._dtype)
            self._opened[shard] = opened
        return opened


class TokenStore:
    """An opened folder of token shards. Open one with `open_token_store`."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, of the content: equal for equal ids in equal order."""
        return self.manifest.fingerprint

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; DataError if the one in the folder is another."""
        tokenizer = load_tokenizer(self.folder)
        _check_fingerprint(self.folder, self.manifest, tokenizer.fingerprint)
        return tokenizer

    def split(self, name: str) -> TokenStream:
        """The stream of "train" or "held_out"."""
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        return TokenStream(name, self.folder, self.manifest.splits[name], dtype)

    def num_documents(self, name: str) -> int | None:
        """Documents of a split, or None if the store does not know them."""
        counts = [shard.documents for shard in self.manifest.splits[name]]
        return None if None in counts else sum(count or 0 for count in counts)

    def verify(self) -> None:
        """Read every shard and compare its hash with the manifest; DataError for the first that differs."""
        for shard in itertools.chain.from_iterable(self.manifest.splits.values()):
            hashes = {shard.file: shard.sha256}
            if shard.lengths_file is not None and shard.lengths_sha256 is not None:
                hashes[shard.lengths_file] = shard.lengths_sha256
            for file, expected in hashes.items():
                found = file_sha256(self.folder / file)
                if found != expected:
                    raise DataError(
                        f"{self.folder / file}: sha256 is {found}, the manifest says {expected}; "
                        "prepare the store again"
                    )


def open_token_store(folder: str | os.PathLike[str], tokenizer: Tokenizer | str | None = None) -> TokenStore:
    """Open the token store in `folder`, checking all but the shards' hashes (`TokenStore.verify` does those).

    With `tokenizer`, or its fingerprint, the store must have been made by that one. Raises DataError.
    """
    root = expand_user(folder).absolute()
    manifest = _read_manifest(root)
    if tokenizer is not None:
        fingerprint = tokenizer if isinstance(tokenizer, str) else tokenizer.fingerprint
        _check_fingerprint(root, manifest, fingerprint)
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in itertools.chain.from_iterable(manifest.splits.values()):
        path = root / shard.file
        if not path.is_file():
            raise DataError(f"{path}: missing, but the manifest lists it; prepare the store again")
        size = path.stat().st_size
        if size != shard.tokens * itemsize:
            raise DataError(
                f"{path}: {size} bytes, but its {shard.tokens} tokens take {shard.tokens * itemsize}; "
                "prepare the store again"
            )
        if not 0 <= shard.max_id < manifest.vocab_size:
            raise DataError(
                f"{path}: its largest id {shard.max_id} is outside the vocabulary, 0 to {manifest.vocab_size - 1}"
            )
    return TokenStore(root, manifest)


def _read_manifest(folder: pathlib.Path) -> Manifest:
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: missing; make a token store with gpt2-jax prepare") from None


def parse_manifest(data: bytes, path: str) -> Manifest:
    """The manifest in a file's bytes; `path` is for errors. Raises DataError where it contradicts itself."""
    try:
        content = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); prepare the store again") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version") if isinstance(content, dict) else None
        raise DataError(
            f"{path}: format version {version!r}, but this program reads {FORMAT_VERSION}; prepare the store again"
        )
    try:
        splits = {split: tuple(Shard(**entry) for entry in content["splits"][split]) for split in SPLITS}
        names = {field.name for field in dataclasses.fields(Manifest)} - {"splits"}
        manifest = Manifest(**{name: content[name] for name in names}, splits=splits)
        same = manifest.fingerprint == content["fingerprint"] and np.dtype(manifest.dtype).kind == "u"
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); prepare the store again") from None
    if not same:
        raise DataError(f"{path}: its fingerprint does not fit its content; prepare the store again")
    return manifest


def _check_fingerprint(folder: pathlib.Path, manifest: Manifest, fingerprint: str) -> None:
    if manifest.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"{folder}: made by the tokenizer {manifest.tokenizer} with fingerprint "
            f"{manifest.tokenizer_fingerprint}, but the one in use has {fingerprint}; use that tokenizer, "
            "or prepare the text again"
        )


def file_sha256(path: pathlib.Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write `content` to `path`, whole or not at all."""
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")
