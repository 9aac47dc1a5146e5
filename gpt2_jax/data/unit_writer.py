"""Turns one unit of documents into its shards. This is what the workers of `prepare` run."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from gpt2_jax.data.document_formats import DocumentFormat
from gpt2_jax.data.documents import WorkUnit, read_unit
from gpt2_jax.data.held_out import HeldOutSplit
from gpt2_jax.data.token_store import SPLITS, Shard, file_sha256, write_json
from gpt2_jax.errors import DataError
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class UnitTask:
    """A unit to tokenize into `folder`, where the tokenizer lies; `progress_folder` notes what is done."""

    folder: pathlib.Path
    tokenizer_fingerprint: str
    progress_folder: pathlib.Path
    format: DocumentFormat
    unit: WorkUnit
    split: HeldOutSplit
    dtype: str


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What came of a unit: a shard per split that got any tokens."""

    empty_documents: int
    shards: dict[str, Shard]


def write_unit(task: UnitTask) -> UnitResult:
    """Tokenize a unit, unless it was done before and is undamaged. Raises DataError for bad documents."""
    note = task.progress_folder / f"unit_{task.unit.index:05d}.json"
    done = _finished(task.folder, note)
    if done is not None:
        return done
    writers = {split: _ShardWriter(task.folder, split, task.unit.index, task.dtype) for split in SPLITS}
    try:
        empty = _write_documents(task, _tokenizer(task.folder, task.tokenizer_fingerprint), writers)
        shards = {split: shard for split, writer in writers.items() if (shard := writer.finish()) is not None}
    finally:
        for writer in writers.values():
            writer.discard()
    result = UnitResult(empty, shards)
    write_json(note, dataclasses.asdict(result))  # last: it says that the shards are whole
    return result


def _write_documents(task: UnitTask, tokenizer: Tokenizer, writers: dict[str, "_ShardWriter"]) -> int:
    """Returns how many documents were empty."""
    train, held_out = (writers[split] for split in SPLITS)
    ending = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.uint32)
    empty = 0
    for number, text in enumerate(read_unit(task.format, task.unit), start=task.unit.first_document):
        if not text:
            empty += 1
        elif task.split.num_documents == 1:
            cut = task.split.cut(len(text))
            for writer, part in ((train, text[:cut]), (held_out, text[cut:])):
                writer.add(_encode(tokenizer, part, number))
        else:
            writer = held_out if task.split.is_held_out(number) else train
            writer.add(np.concatenate([_encode(tokenizer, text, number), ending]))
    return empty


def _encode(tokenizer: Tokenizer, text: str, number: int) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except DataError as error:
        raise DataError(f"document {number} (counted from 0): {error}") from None


class _ShardWriter:
    """Writes the ids of one split of one unit under a temporary name."""

    def __init__(self, folder: pathlib.Path, split: str, index: int, dtype: str) -> None:
        self._path = folder / f"{split}_{index:05d}.bin"
        self._temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by finish or discard)
        self._hash = hashlib.sha256()
        self._lengths: list[int] = []
        self._max_id = 0

    def add(self, tokens: np.ndarray) -> None:
        if len(tokens) == 0:
            return
        data = tokens.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths.append(len(tokens))
        self._max_id = max(self._max_id, int(tokens.max()))

    def finish(self) -> Shard | None:
        """Give the file its name; no file is left if it would be empty."""
        self._file.close()
        if not self._lengths:
            return None
        lengths_path = self._path.with_suffix(".lengths.npy")
        lengths_temporary = lengths_path.with_name(f"{lengths_path.name}.{os.getpid()}.tmp")
        with open(lengths_temporary, "wb") as file:
            np.save(file, np.array(self._lengths, np.int64), allow_pickle=False)
        os.replace(lengths_temporary, lengths_path)
        os.replace(self._temporary, self._path)
        return Shard(
            file=self._path.name,
            tokens=sum(self._lengths),
            max_id=self._max_id,
            sha256=self._hash.hexdigest(),
            documents=len(self._lengths),
            lengths_file=lengths_path.name,
            lengths_sha256=file_sha256(lengths_path),
        )

    def discard(self) -> None:
        """Remove what has not been finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _finished(folder: pathlib.Path, note: pathlib.Path) -> UnitResult | None:
    """The result in a note of an earlier run, if its shards are still what it says."""
    try:
        content: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        shards = {split: Shard(**entry) for split, entry in content["shards"].items()}
        for shard in shards.values():
            if file_sha256(folder / shard.file) != shard.sha256:
                return None
            if file_sha256(folder / str(shard.lengths_file)) != shard.lengths_sha256:
                return None
        return UnitResult(content["empty_documents"], shards)
    except (OSError, ValueError, KeyError, TypeError):  # not there or damaged: the unit is done anew
        return None


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: pathlib.Path, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{folder}: the tokenizer was changed while the corpus was being prepared; start again")
    return tokenizer
