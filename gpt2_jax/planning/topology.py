"""TPU slices that are not here, as devices to compile for."""

import dataclasses
import difflib
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from gpt2_jax.errors import UsageError

# What libtpu reads when it is loaded: ask no metadata server, name some machine, and let several processes load it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class _Pod:
    """The largest slice of a TPU, in chips along each dimension, and the JAX devices (cores) of a chip."""

    largest: tuple[int, ...]
    devices_per_chip: int = 1


# From docs.cloud.google.com/tpu/docs. Beyond 16 along a dimension the compiler for v5e ends the process.
_PODS = {
    "v4": _Pod((16, 16, 16)),  # its two cores make one device ("megacore"), as on the real chip
    "v5e": _Pod((16, 16)),
    "v5p": _Pod((16, 20, 28)),
    "v6e": _Pod((16, 16)),
    "tpu7x": _Pod((16, 24, 24), devices_per_chip=2),
}
_MAX_SLICES = 1024


@dataclasses.dataclass(frozen=True)
class Topology:
    """One TPU slice, or several that a data centre network joins.

    Attributes:
      name: as it was typed, such as `v5e:4x4` or `v5e:4x4*2`.
      platform: always `tpu`.
      chip: `v5e` and so on.
      dims: chips of a slice along each dimension of its torus.
      slices: how many there are.
      devices_per_chip: JAX devices (cores) of a chip.
    """

    name: str
    platform: str
    chip: str
    dims: tuple[int, ...]
    slices: int
    devices_per_chip: int

    @property
    def chips(self) -> int:
        """Of all slices together."""
        return math.prod(self.dims) * self.slices

    @property
    def num_devices(self) -> int:
        """Of all slices together, as JAX counts them."""
        return self.chips * self.devices_per_chip


def parse_topologies(names: str) -> list[Topology]:
    """Topologies from their names, joined by commas.

    A name is a chip and the chips along each dimension, `v5e:4x4` or `v5p:8x8x8`; `*2` after it makes two such slices.
    A host holds 2x2 chips, so the first two dimensions are even; a single chip, `v5e:1x1`, is possible too.

    Raises:
      UsageError: an unknown chip, or a shape that there is not; with the nearest that there is.
    """
    return [_parse(name.strip()) for name in names.split(",")]


def require_libtpu() -> None:
    """Raises UsageError where the compiler for TPUs is not installed."""
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UsageError(
            "compiling for a TPU needs libtpu (Linux, x86-64), which is not installed: pip install 'gpt2-jax[tpu]'"
        )


def devices(topology: Topology) -> list[jax.Device]:
    """Devices that programs can be compiled for, but not run on.

    Sets the environment variables that libtpu reads when it is first loaded, as far as they are not set.

    Raises:
      UsageError: libtpu is missing or does not know the topology.
    """
    require_libtpu()
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    shape = "x".join(map(str, topology.dims))
    # A host's chips along three dimensions; by default 2x2x1, which does not divide a single chip.
    host = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(topology.dims) == 1 else {}
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    cores = {"chip_config_name": "megacore"} if topology.chip == "v4" else {}
    try:
        found = topologies.get_topology_desc(
            platform=topology.platform, topology_name=f"{topology.chip}:{shape}", **host, **slices, **cores
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"topology {topology.name!r}: libtpu does not take it: {reason}") from error
    return list(found.devices)


def _parse(name: str) -> Topology:
    chip, _, rest = name.partition(":")
    if chip not in _PODS:
        near = difflib.get_close_matches(chip.lower(), _PODS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"topology {name!r}: unknown TPU {chip!r}; known: {', '.join(_PODS)}{hint}")
    pod = _PODS[chip]
    found = re.fullmatch(r"(\d{1,4}(?:x\d{1,4})*)(?:\*(\d{1,4}))?", rest)
    if not found:
        example = f"{chip}:{'x'.join(['4'] * len(pod.largest))}"
        raise UsageError(f"topology {name!r}: {rest!r} is no shape; write {example}, or {example}*2 for two slices")
    dims, slices = tuple(map(int, found[1].split("x"))), int(found[2] or 1)
    nearest = _nearest(dims, pod.largest)
    if dims != nearest:
        largest = "x".join(map(str, pod.largest))
        raise UsageError(
            f"topology {name!r}: there is no such {chip}; {len(pod.largest)} dimensions, of which the first two are "
            f"even, up to {largest}, or a single chip; the nearest: {chip}:{'x'.join(map(str, nearest))}"
        )
    if not 1 <= slices <= _MAX_SLICES:
        raise UsageError(f"topology {name!r}: {slices} slices; allowed: 1 to {_MAX_SLICES}")
    return Topology(name, "tpu", chip, dims, slices, pod.devices_per_chip)


def _nearest(dims: tuple[int, ...], largest: tuple[int, ...]) -> tuple[int, ...]:
    """The slice that is most like `dims`: itself if there is one."""
    if set(dims) == {1}:
        return (1,) * len(largest)
    sizes = [*dims, 1, 1][: len(largest)]
    even = [max(2, -(-size // 2) * 2) if axis < 2 else max(1, size) for axis, size in enumerate(sizes)]
    # The longest dimension is held to the longest of the pod, and so on.
    for axis, most in zip(sorted(range(len(even)), key=lambda axis: even[axis]), sorted(largest), strict=True):
        even[axis] = min(even[axis], most)
    return tuple(even)
