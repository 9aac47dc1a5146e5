"""The device mesh, and one table from logical axes to its axes.

The model names the logical axes of its arrays; only this file knows devices. Numbers do not depend on the mesh.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_jax.config import MeshConfig, ModelConfig, RunConfig
from gpt2_jax.errors import UsageError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes that split it. A parameter's "embed" axis is split over fsdp; activations leave their
# width whole (None), because their batch is split over fsdp already.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "embed": ("fsdp",),
    "qkv": (),
    "heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "positions": (),
    "layers": (),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all). Raises UsageError when their number does not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % given or (-1 not in sizes.values() and given != len(devices)):
        wanted = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise UsageError(
            f"{wanted} make {given} devices of {len(devices)}: their product must be {len(devices)}, or divide it "
            "with one axis -1"
        )
    shape = [len(devices) // given if size == -1 else size for size in sizes.values()]
    # Auto: XLA propagates the shardings. (make_mesh's default, Explicit, does not work with Linen.)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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
    """The same for the model alone."""
    for what, size, axis in (
        ("model.n_embd", model.n_embd, "fsdp"),
        ("model.n_head", model.n_head, "tensor"),
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


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree whose parameters carry logical names (Flax boxes); other leaves are replicated."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, partition_spec(names)),
        nn.get_partition_spec(boxed),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this host's rows of a batch on its devices, as part of the global batch; leading axis: batch."""
    sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
