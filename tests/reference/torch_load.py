"""`torch.load` for CPU tensors as they are saved, with Python's own pickle and NumPy. For files that a test wrote."""

import pathlib
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import ml_dtypes
import numpy as np


def load(file: pathlib.Path) -> Any:
    """What the file holds; tensors as arrays, those of one storage in the same memory."""
    with zipfile.ZipFile(file) as archive:
        return _Reader(archive).load()


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile) -> None:
        super().__init__(archive.open("archive/data.pkl"))
        self._archive = archive
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        return {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "FloatStorage"): np.float32,
            ("torch", "BFloat16Storage"): ml_dtypes.bfloat16,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
        }[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        word, dtype, key, location, count = pid
        assert (word, location) == ("storage", "cpu")
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._archive.read(f"archive/data/{key}"), dtype)
        assert self._storages[key].size == count
        return self._storages[key]


def _rebuilt(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], grad: bool, hooks: Any
) -> np.ndarray:
    assert (offset, grad, hooks) == (0, False, OrderedDict())
    assert tuple(step * storage.itemsize for step in stride) == np.empty(shape, storage.dtype).strides
    return storage.reshape(shape)
