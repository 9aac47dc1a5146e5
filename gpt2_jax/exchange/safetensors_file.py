"""The tensors of a safetensors file, each read from where it lies.

The safetensors library checks the file: that it is whole, and that the tensors fill it without gaps, each as large as
its shape and type say. It is not asked for the values, since it copies them: a file of weights would go through twice
the memory that it needs.
"""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_jax.errors import DataError
from gpt2_jax.exchange.json_object import INDEX_BYTES, brief, parse_json, shown

_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SIZE_BYTES = 8  # the length of the header, before it


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
      file: the file.
      name: its name there.
      type: its type, as safetensors names it.
      shape: its shape.
      start: byte of the file at which its values begin.
    """

    file: pathlib.Path
    name: str
    type: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """The values, in memory that is the file's. Raises DataError for types that are no floats."""
        if self.type not in _TYPES:
            raise DataError(f"{self.file}: {shown(self.name)} has type {self.type}; allowed: {', '.join(_TYPES)}")
        try:
            return np.memmap(self.file, _TYPES[self.type], "r", self.start, self.shape)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.file}: {self.name} cannot be read ({brief(error)}); fetch it again") from None


def stored_tensors(file: pathlib.Path) -> list[StoredTensor]:
    """All tensors of a file. Raises DataError for one that is missing, damaged, or has a name twice."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(_SIZE_BYTES), "little")
            # The library takes gigabytes of memory for headers that are as long as it allows.
            header = stream.read(size) if size <= INDEX_BYTES else b""
        if not header or len(header) < size:
            raise DataError(f"{file}: not a whole safetensors file (a header of {size:,} bytes); fetch it again")
        entries = parse_json(header, f"{file}: header")
        with safe_open(file, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: not a whole safetensors file ({brief(error)}); fetch it again") from None
    return [
        StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), _SIZE_BYTES + size + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    ]
