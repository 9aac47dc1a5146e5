"""Files of `torch.save`, without torch: a zip archive with the record `data.pkl` and one record per tensor storage.

The pickle is read by `plain_pickle`, so nothing in a file is run, and tensors are read one at a time, only those that
are asked for. Records that are compressed, or together larger than the file, are refused, so that a small file never
takes much memory.
"""

import contextlib
import dataclasses
import math
import pathlib
import struct
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_jax.atomic_file import whole_file
from gpt2_jax.errors import DataError
from gpt2_jax.exchange.plain_pickle import (
    MAX_BYTES,
    ORDERED_DICT,
    Call,
    Global,
    Persistent,
    read_pickle,
    write_pickle,
)

_STORAGES = {
    Global("torch", "DoubleStorage"): np.dtype(np.float64),
    Global("torch", "FloatStorage"): np.dtype(np.float32),
    Global("torch", "HalfStorage"): np.dtype(np.float16),
    Global("torch", "BFloat16Storage"): np.dtype(ml_dtypes.bfloat16),
    Global("torch", "LongStorage"): np.dtype(np.int64),
    Global("torch", "IntStorage"): np.dtype(np.int32),
    Global("torch", "ShortStorage"): np.dtype(np.int16),
    Global("torch", "CharStorage"): np.dtype(np.int8),
    Global("torch", "ByteStorage"): np.dtype(np.uint8),
    Global("torch", "BoolStorage"): np.dtype(np.bool_),
}
_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ALLOWED = {ORDERED_DICT, _TENSOR, _PARAMETER, *_STORAGES}

_ROOT = "archive"
_ZIP, _PICKLE = b"PK", b"\x80"
_MAX_AXES = 8
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # of the times that a zip archive can have


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: a view, within bounds, of the storage `key`.

    Attributes:
      key: name of the storage's record.
      dtype: type of its values.
      count: how many values the storage has.
      offset: its value that comes first in the tensor.
      shape: of the tensor.
      stride: steps in the storage, in values, along each axis; 0 along axes of size 1.
    """

    key: str
    dtype: np.dtype
    count: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TorchFile:
    """A file of `torch.save` that is open for reading.

    Attributes:
      path: the file.
      contents: what was saved: numbers, text, tuples, lists and dicts; where tensors were, what `tensor` takes.
    """

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self._size = path.stat().st_size
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise DataError(f"{path}: not one record data.pkl, or a record twice; it is no file of torch.save")
        self._root = pickles[0].removesuffix("/data.pkl")
        order = f"{self._root}/byteorder"
        if order in names and self._record(order, limit=16) != b"little":
            raise DataError(f"{path}: byteorder is not little; save it again on a little-endian machine")
        data = self._record(pickles[0], limit=MAX_BYTES)
        self.contents: Any = read_pickle(data, f"{path}: data.pkl", _ALLOWED)

    def tensor(self, value: Any, name: str) -> StoredTensor:
        """The tensor that stands in the contents as `value`. Raises DataError, naming `name`, if it is none."""
        if isinstance(value, Call) and value.function == _PARAMETER and value.arguments:
            value = value.arguments[0]
        match value:
            case Call(
                arguments=(
                    Persistent(("storage", Global() as kind, str(key), _, int(count))),
                    int(offset),
                    tuple(shape),
                    tuple(stride),
                    *_,
                )
            ) if value.function == _TENSOR and kind in _STORAGES:
                numbers = (count, offset, *shape, *stride)
                if (
                    len(shape) == len(stride) <= _MAX_AXES
                    and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
                    and 1 <= math.prod(shape) <= count
                ):
                    steps = tuple(step if size > 1 else 0 for size, step in zip(shape, stride, strict=True))
                    last = offset + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
                    if last < count:
                        return StoredTensor(key, _STORAGES[kind], count, offset, shape, steps)
                raise DataError(f"{self.path}: {name} is not a view within its storage; the file is damaged")
        raise DataError(f"{self.path}: {name} is no tensor that can be read")

    def check(self, tensors: Iterable[StoredTensor]) -> None:
        """Raises DataError unless the storages of all are there, with the right sizes, and together fit in the file."""
        total = 0
        for tensor in tensors:
            self._storage(tensor)
            total += tensor.count * tensor.dtype.itemsize
        if total > self._size:
            raise DataError(
                f"{self.path}: tensors of {total} bytes, in a file of {self._size}; they share storages: save a clone "
                "of each"
            )

    def read(self, tensor: StoredTensor) -> np.ndarray:
        """The values of a tensor."""
        info = self._storage(tensor)
        with _damage_named(self.path):
            values = np.frombuffer(self._archive.read(info), tensor.dtype)
        steps = [step * tensor.dtype.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, steps, writeable=False)

    def _storage(self, tensor: StoredTensor) -> zipfile.ZipInfo:
        info = self._info(f"{self._root}/data/{tensor.key}")
        if info.file_size != tensor.count * tensor.dtype.itemsize:
            raise DataError(
                f"{self.path}: record data/{tensor.key[:80]!r} has {info.file_size} bytes, by data.pkl it should be "
                f"{tensor.count} values of {tensor.dtype}"
            )
        return info

    def _record(self, name: str, limit: int) -> bytes:
        info = self._info(name)
        if info.file_size > limit:
            raise DataError(f"{self.path}: record {name[:80]!r} has {info.file_size} bytes; allowed: {limit}")
        with _damage_named(self.path):
            return self._archive.read(info)

    def _info(self, name: str) -> zipfile.ZipInfo:
        try:
            info = self._archive.getinfo(name)
        except KeyError:
            raise DataError(f"{self.path}: no record {name[:80]!r}; the file is damaged") from None
        # What torch never does, and what could make much of a small file.
        if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size <= self._size:
            raise DataError(f"{self.path}: record {name[:80]!r} is compressed, which torch's are not")
        return info


@contextlib.contextmanager
def open_torch_file(path: pathlib.Path) -> Iterator[TorchFile]:
    """Opens a file of `torch.save`. Raises DataError for another file, or one whose pickle is not of plain values."""
    with _damage_named(path):
        with path.open("rb") as stream:
            head = stream.read(len(_ZIP))
        if head.startswith(_PICKLE):
            raise DataError(
                f"{path}: a bare pickle, as torch wrote before version 1.6, which is not read; load it in a newer "
                "torch and save it again"
            )
        if head != _ZIP:
            raise DataError(f"{path}: not a file of torch.save, which is a zip archive")
        archive = zipfile.ZipFile(path)
    with archive:
        yield TorchFile(path, archive)


@contextlib.contextmanager
def _damage_named(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, RuntimeError, OverflowError, struct.error, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a whole file of torch.save ({reason}); copy it again") from None


def tensor_in_pickle(key: int, dtype: np.dtype, shape: tuple[int, ...]) -> Call:
    """What stands in the contents for a C-contiguous tensor that is the whole of storage `key`."""
    kind = next(kind for kind, of_kind in _STORAGES.items() if of_kind == dtype)
    count = math.prod(shape)
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = Persistent(("storage", kind, str(key), "cpu", count))
    return Call(_TENSOR, (storage, 0, shape, stride, False, Call(ORDERED_DICT, ())))


def write_torch_file(path: pathlib.Path, contents: Any, storages: Iterable[np.ndarray]) -> None:
    """Writes what `torch.load(path, weights_only=True)` reads; whole, or not at all.

    Args:
      path: the file, in a folder that exists.
      contents: plain values, and for tensors `tensor_in_pickle`.
      storages: the values of storage 0, 1, ..., taken one at a time.
    """
    with whole_file(path) as stream, zipfile.ZipFile(stream, "w") as archive:

        def write(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}", _EARLIEST), data)

        write("data.pkl", write_pickle(contents))
        write("byteorder", b"little")
        for key, values in enumerate(storages):
            write(f"data/{key}", values.tobytes())
        write("version", b"3\n")
