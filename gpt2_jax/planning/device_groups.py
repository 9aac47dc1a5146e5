"""The notations in which HLO says which devices take part in a collective together."""

import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_LIST = re.compile(r"\breplica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"\breplica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


def replica_groups(attributes: str, num_devices: int) -> Groups:
    """Device numbers by group, from the attributes of an instruction.

    The three notations are lists `{{0,1},{2,3}}`, `[groups,size]<=[dims]T(permutation)`, which is a counting up to the
    product of the dims, reshaped, transposed and reshaped again, and `mesh['x'=2,'y'=4] {'y'}`, groups along axes (or
    parts of them) of a mesh. No groups mean one of all devices.

    Raises:
      ValueError: another notation.
    """
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    if found := _IOTA.search(attributes):
        return _tuples(_iota(found[3]).reshape(int(found[1]), int(found[2])))
    if found := _LIST.search(attributes):
        rows = re.findall(r"\{([\d,]+)\}", found[1])
        return tuple(tuple(map(int, row.split(","))) for row in rows) or (tuple(range(num_devices)),)
    if "replica_groups=" in attributes:
        raise ValueError(
            f"unknown notation of groups in HLO: {attributes[attributes.index('replica_groups=') :][:100]}"
        )
    return (tuple(range(num_devices)),)


def permute_groups(attributes: str) -> Groups:
    """Devices that a permute's pairs connect, by group."""
    found = _PAIRS.search(attributes)
    if not found:
        raise ValueError(f"a permute without pairs in HLO: {attributes[:100]}")
    group_of: dict[int, set[int]] = {}
    for left, right in re.findall(r"\{(\d+),(\d+)\}", found[1]):
        merged = group_of.get(int(left), {int(left)}) | group_of.get(int(right), {int(right)})
        group_of |= dict.fromkeys(merged, merged)
    return tuple(sorted({tuple(sorted(group)) for group in group_of.values()}))


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers 0 to 7 as 4 x 2, transposed."""
    dims, *permutation = re.findall(r"[\d,]+", text)
    shape = [int(dim) for dim in dims.split(",")]
    numbers = np.arange(np.prod(shape)).reshape(shape)
    return numbers.transpose([int(axis) for axis in permutation[0].split(",")]) if permutation else numbers


def _mesh_groups(axes: str, device_ids: str | None, grouped: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    total = int(np.prod(list(sizes.values())))
    if not device_ids:
        ids = np.arange(total)
    else:
        ids = _iota(device_ids) if device_ids.startswith("[") else np.array(device_ids.split(","), int)
    found = _AXIS.findall(grouped)
    wanted = {name: (int(before or 1), int(part or sizes[name])) for name, before, part in found}
    if len(wanted) < len(found):
        raise ValueError(f"groups over two parts of one mesh axis in HLO: {grouped}")
    # Each axis as three, of which the middle one is grouped: 'y':(2)4 is the 4 within 2 outer ones.
    dims: list[int] = []
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        dims += [before, part, size // before // part]
    chosen = [3 * number + 1 for number, name in enumerate(sizes) if name in wanted]
    size = int(np.prod([dims[axis] for axis in chosen]))
    return _tuples(np.moveaxis(ids.reshape(dims), chosen, range(-len(chosen), 0)).reshape(-1, size))


def _tuples(ids: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in ids.tolist())
