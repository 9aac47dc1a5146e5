"""Copies of states that are being saved, where the next step would have to wait for the save otherwise.

The step writes into the buffers of the state that it is given. From a GPU or TPU Orbax copies the state before it
returns; on a CPU it reads the buffers themselves, in the background, and a step would wait until all is written.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_ALIGNMENT = 64  # of what XLA takes for a buffer of its own instead of copying once more


class Snapshots:
    """Copies into memory that is kept: a kernel may take twenty times as long to give new memory as the copy takes."""

    def __init__(self) -> None:
        self._memory: list[np.ndarray] = []

    def take(self, tree: Any) -> Any:
        """The same arrays on the same devices; those on a CPU copied over the copies before, which nobody may use."""
        leaves, structure = jax.tree.flatten(tree)
        shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
        if shards[0].device.platform != "cpu":
            return tree
        sources = [np.asarray(shard.data) for shard in shards]
        copies = self._room(sources)
        for copy, source in zip(copies, sources, strict=True):
            np.copyto(copy, source)
        placed = iter([jax.device_put(copy, shard.device) for copy, shard in zip(copies, shards, strict=True)])
        taken = [
            jax.make_array_from_single_device_arrays(
                leaf.shape, leaf.sharding, [next(placed) for _ in leaf.addressable_shards]
            )
            for leaf in leaves
        ]
        return jax.tree.unflatten(structure, taken)

    def _room(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        needed = [array.nbytes + _ALIGNMENT for array in arrays]
        if [memory.nbytes for memory in self._memory] != needed:
            self._memory = [np.empty(nbytes, np.uint8) for nbytes in needed]
        views = []
        for memory, array in zip(self._memory, arrays, strict=True):
            start = -memory.ctypes.data % _ALIGNMENT
            views.append(memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape))
        return views
