"""The device mesh, and one table from logical axes to its axes.

The model names the logical axes of its arrays; only this file knows devices. Numbers do not depend on the mesh.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_jax.config import MeshConfig, ModelConfig, RunConfig
from gpt2_jax.errors import UsageError

MESH_AXES = ("data", "fsdp", "tensor")
_AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)

# Logical axis -> mesh axes that split it. A parameter's "embed" axis is split over fsdp; activations leave their
# width whole (None), because their batch is split over fsdp already. Between the blocks activations are split along
# "sequence"; where attention and MLP split heads and "mlp", they have the whole "length".
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replicas": ("data",),
    "length": (),
    "sequence": ("tensor",),
    "embed": ("fsdp",),
    "qkv": (),
    "heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "positions": (),
    "layers": (),
}

Names = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all).

    With `dcn_data` slices, the outer part of `data` crosses from slice to slice and all else stays within one.

    Raises:
      UsageError: the product of the axes does not fit the number of devices or slices, or the devices' wiring cannot
        be cut into this shape.
    """
    devices = jax.devices() if devices is None else devices
    shape = [*mesh_sizes(config, len(devices)).values()]
    # Auto: XLA propagates the shardings. (The default, Explicit, does not work with Linen.)
    return Mesh(_arranged(devices, shape, config.dcn_data), MESH_AXES, axis_types=_AXIS_TYPES)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of these sizes without devices: enough for shapes, shardings and arithmetic."""
    return AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, axis_types=_AXIS_TYPES)


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


def _arranged(devices: Sequence[jax.Device], shape: list[int], slices: int) -> np.ndarray:
    found = {getattr(device, "slice_index", 0) for device in devices}
    try:
        if len(found) > 1:
            if len(found) != slices:
                raise UsageError(
                    f"mesh.dcn_data={slices}, but the devices are in {len(found)} slices; give that number"
                )
            return mesh_utils.create_hybrid_device_mesh(
                [shape[0] // slices, *shape[1:]], (slices, 1, 1), devices, allow_split_physical_axes=True
            )
        # Devices that know no slices (CPU, GPU): each consecutive part stands for one.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except NotImplementedError:
        size = "x".join(map(str, shape))
        raise UsageError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {size} cannot be laid over the wiring of these devices; make each "
            "axis a product of the topology's dimensions"
        ) from None


def check_divisible(config: RunConfig, mesh: Mesh, vocab_rows: int = 0) -> None:
    """Raises UsageError, with the numbers, when the mesh cannot split the configured batch or model evenly.

    `vocab_rows` is the number of rows of the token table, padding included, once it is known.
    """
    size, parts = config.train.batch_size // config.train.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if size % parts:
        below, above = size // parts * parts, -(-size // parts) * parts
        nearest = f"{below} or {above}" if below else str(above)
        raise UsageError(
            f"train.batch_size / train.microbatches = {size} cannot be split over mesh.data x mesh.fsdp = {parts}; "
            f"the nearest that can: {nearest}"
        )
    check_model_divisible(config.model, mesh, vocab_rows)


def check_model_divisible(model: ModelConfig, mesh: Mesh, vocab_rows: int = 0) -> None:
    """The same for the model alone. Heads need not divide: see `model/heads.py`."""
    for what, size, axis in (
        ("model.n_embd", model.n_embd, "fsdp"),
        ("model.n_embd", model.n_embd, "tensor"),
        ("the padded vocabulary", vocab_rows, "tensor"),
    ):
        parts = mesh.shape[axis]
        if size % parts:
            possible = [n for n in range(1, mesh.size + 1) if size % n == 0 and mesh.size % n == 0]
            nearest = min(possible, key=lambda n: abs(n - parts))
            raise UsageError(
                f"{what} = {size} cannot be split over mesh.{axis} = {parts}; of {mesh.size} devices, the nearest that "
                f"can: {nearest}"
            )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes `constrain` act within the block. (`with mesh:` would silently not.)"""
    with jax.set_mesh(mesh):
        yield


def axis_size(name: str) -> int:
    """Among how many devices of the mesh in use a logical axis is split; 1 outside `use_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in LOGICAL_AXES[name])


def sequence_axis(length: int) -> str:
    """The logical axis along which activations of this length lie between blocks: "sequence" where it can be split."""
    return "length" if length % axis_size("sequence") else "sequence"


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes; None stands for an axis that is not split.

    Raises:
      ValueError: an unknown logical axis, or two axes of the array on one mesh axis.
    """
    spec: list[tuple[str, ...] | None] = []
    taken: set[str] = set()
    for name in names:
        if name is None:
            spec.append(None)
            continue
        if name not in LOGICAL_AXES:
            raise ValueError(f"unknown logical axis {name!r} in {tuple(names)}; known: {', '.join(LOGICAL_AXES)}")
        axes = LOGICAL_AXES[name]
        if taken & set(axes):
            raise ValueError(f"logical axes {tuple(names)} put two dimensions on mesh axis {taken & set(axes)}")
        taken |= set(axes)
        spec.append(axes or None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks for `x` to be laid out as its logical axes say; does nothing outside `use_mesh`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def relayout(x: jax.Array, names: Names, gradient_names: Names | None) -> jax.Array:
    """`constrain(x, *names)`, while the gradient is laid out by `gradient_names`, as `x` came; None: as it comes.

    `constrain` asks the same layout of the gradient, so that what is gathered forwards would be summed on every device
    backwards, where each needs only its part of the sum.
    """
    return constrain(x, *names)


def _relayout_forward(x: jax.Array, names: Names, gradient_names: Names | None) -> tuple[jax.Array, None]:
    return constrain(x, *names), None


def _relayout_backward(names: Names, gradient_names: Names | None, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient if gradient_names is None else constrain(gradient, *gradient_names),)


relayout.defvjp(_relayout_forward, _relayout_backward)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree whose parameters carry logical names (Flax boxes); other leaves are replicated."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, partition_spec(names)),
        nn.get_partition_spec(boxed),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How an array `[B, T]` of a batch lies on the devices."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this host's devices work on, in order; a row may belong to several hosts."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size, 1)).values()
    return sorted({row for part in parts if part is not None for row in range(batch_size)[part[0]]})


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this host's rows (`own_rows`) of a batch on its devices, as part of the global batch `[B, T]`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
