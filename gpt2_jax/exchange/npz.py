"""One NumPy archive with Hugging Face's flat names, and the shape and tokenizer beside it.

model.npz     float32 or float16, by `np.load` without pickle     config.json     as in a Hugging Face folder
tokenizer.json and the files beside it                            README.md       the model card

An archive is a zip with a file `NAME.npy` per array. It is read here by hand, since `np.load` takes the memory that a
file says it needs; nothing in it is unpickled or unpacked to disk.
"""

import json
import math
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any, Literal

import numpy as np

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.huggingface_config import config_fields, read_config
from gpt2_jax.exchange.huggingface_tokenizer import read_tokenizer
from gpt2_jax.exchange.huggingface_write import as_stored
from gpt2_jax.exchange.json_object import brief, shown
from gpt2_jax.exchange.names import finite, params_from_tensors, tensors, tensors_from_params
from gpt2_jax.exchange.tokenizer_json import write_tokenizer

DTYPES = ("float32", "float16")  # NumPy has no bfloat16
_FILE = "model.npz"

# How an array of floats starts in version 1.0, which NumPy writes: this, two bytes that count the header's, the header.
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': ?'(?P<type>[<>]f[248])', ?'fortran_order': ?(?P<fortran>True|False), ?"
    rb"'shape': ?\((?P<shape>[0-9, ]{0,99})\),? ?\} *\n?"
)


def write_npz(folder: pathlib.Path, bundle: Bundle, dtype: str = "float32") -> None:
    """Writes the archive and what belongs to it into `folder`, which exists.

    Raises UsageError for a type that cannot hold a weight.
    """
    config = bundle.config
    arrays: dict[str, Any] = {
        tensor.name: as_stored(tensor.name, value, dtype)
        for tensor, value in tensors_from_params(config, bundle.params)
    }
    np.savez(folder / _FILE, **arrays)
    fields = config_fields(config, bundle.tokenizer.end_of_text, dtype)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, bundle.tokenizer, config.n_positions)


def read_npz(folder: pathlib.Path) -> Bundle:
    """The model that `write_npz` wrote into `folder`, which may also be named by the archive in it.

    Raises DataError, naming file and field, for anything else.
    """
    folder = folder.parent if folder.is_file() else folder
    config = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder, config.vocab_size)
    file = folder / _FILE
    if not file.is_file():
        raise DataError(f"{file}: missing")
    try:
        with zipfile.ZipFile(file) as archive:
            params = params_from_tensors(config, _checked_reader(archive, file, config))
    except (OSError, ValueError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: not a whole NumPy archive ({brief(error)}); fetch it again") from None
    return Bundle(config, params, tokenizer)


def _checked_reader(archive: zipfile.ZipFile, file: pathlib.Path, config: ModelConfig) -> Callable[[str], np.ndarray]:
    """Reads arrays by name, once all have been found with the shapes that they should have."""
    members = archive.infolist()
    if config.n_layer > len(members):  # before as many names are made
        raise DataError(f"{file}: {len(members)} arrays, too few for n_layer={config.n_layer}")
    wanted = {tensor.name: tensor.shape for tensor in tensors(config)}
    found: set[str] = set()
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name in found or name not in wanted or name == member.filename:
            raise DataError(f"{file}: {shown(member.filename)} is there twice, or not an array of this GPT-2")
        # Others could unpack to more than is asked for; NumPy writes these.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
            raise DataError(f"{file}: {name} is compressed in another way than deflate, or encrypted")
        found.add(name)
    for name, shape in wanted.items():
        if name not in found:
            raise DataError(f"{file}: {name} is missing")
        with archive.open(f"{name}.npy") as stream:
            stored, _, _ = _read_header(stream, f"{file}: {name}")
        if stored != shape:
            raise DataError(f"{file}: {name} has shape {stored}, by config.json it should be {shape}")

    def read(name: str) -> np.ndarray:
        with archive.open(f"{name}.npy") as stream:
            shape, dtype, order = _read_header(stream, f"{file}: {name}")
            size = math.prod(shape) * dtype.itemsize
            content = stream.read(size + 1)  # one more, so that zipfile comes to the end and compares its checksum
        if len(content) != size:
            raise DataError(f"{file}: {name} has more or fewer than the {size:,} bytes of its shape; fetch it again")
        return finite(np.frombuffer(content, dtype).reshape(shape, order=order), f"{file}: {name}")

    return read


def _read_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype, Literal["C", "F"]]:
    """Shape, type and order of an array of floats; `stream` is then at its values."""
    start = stream.read(len(_MAGIC) + 2)
    header = stream.read(int.from_bytes(start[-2:], "little"))
    match = _HEADER.fullmatch(header)
    if not start.startswith(_MAGIC) or not match:
        raise DataError(
            f"{where} is not an array of float64, float32 or float16; it starts {brief(repr(start + header[:60]))}"
        )
    shape = tuple(int(size) for size in match["shape"].decode().split(",") if size.strip())
    return shape, np.dtype(match["type"].decode()), "F" if match["fortran"] == b"True" else "C"
