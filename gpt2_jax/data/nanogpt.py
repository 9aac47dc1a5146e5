"""The token files of nanoGPT (train.bin, val.bin: uint16 ids of GPT-2), used where they lie."""

import hashlib
import json
import pathlib

import numpy as np

from gpt2_jax.data.token_store import Shard
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.user_paths import expand_user

DTYPE = "uint16"
_FILES = {"train": "train.bin", "held_out": "val.bin"}
_CHUNK_BYTES = 64 * 2**20


def nanogpt_files(folder: str) -> dict[str, pathlib.Path]:
    """The file of each split; UsageError if they are not there or hold the ids of characters."""
    root = expand_user(folder).absolute()
    if (root / "meta.pkl").exists():
        raise UsageError(
            f"nanogpt:{folder}: meta.pkl says that these are ids of characters; prepare the text itself with "
            "source text:FILE and the tokenizer chars"
        )
    files = {split: root / name for split, name in _FILES.items()}
    for file in files.values():
        if not file.is_file():
            raise UsageError(f"nanogpt:{folder}: no file {file}; name the folder with train.bin and val.bin")
    return files


def nanogpt_signature(folder: str) -> str:
    """sha256, in hexadecimal, over the files' places, sizes and times."""
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in nanogpt_files(folder).values()]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def nanogpt_shard(file: pathlib.Path, vocab_size: int) -> Shard:
    """Read a file once: its count, hash and largest id. DataError for one that cannot be GPT-2's ids."""
    size = file.stat().st_size
    if size == 0 or size % 2:
        raise DataError(f"{file}: {size} bytes; uint16 ids take an even number, and at least two")
    digest = hashlib.sha256()
    max_id = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
            max_id = max(max_id, int(np.frombuffer(chunk, "<u2").max()))
    if max_id >= vocab_size:
        raise DataError(f"{file}: its largest id {max_id} is outside GPT-2's vocabulary, 0 to {vocab_size - 1}")
    return Shard(file=str(file), tokens=size // 2, max_id=max_id, sha256=digest.hexdigest())
