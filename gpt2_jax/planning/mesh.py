"""A mesh without devices: enough for shapes, shardings and arithmetic."""

import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh, AxisType

from gpt2_jax.config import MeshConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.sharding import MESH_AXES


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis, -1 filled in and the slices counted into `data`.

    Raises:
      UsageError: the product of the axes does not fit the number of devices.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    given = config.dcn_data * math.prod(size for size in sizes.values() if size != -1)
    if devices % given or (-1 not in sizes.values() and given != devices):
        axes = {**sizes, "dcn_data": config.dcn_data} if config.dcn_data > 1 else sizes
        wanted = ", ".join(f"mesh.{axis}={size}" for axis, size in axes.items())
        raise UsageError(
            f"{wanted} make {given} devices of {devices}: their product must be {devices}, or divide it with one "
            "axis -1"
        )
    filled = {axis: devices // given if size == -1 else size for axis, size in sizes.items()}
    return {**filled, "data": filled["data"] * config.dcn_data}


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """The mesh of these sizes."""
    return AbstractMesh(
        tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )
