"""The collectives of a compiled program: what each moves, between which devices, how often, and in whose shadow.

`payload_bytes` is, per device and occurrence, without a layout's padding:

    all-gather                     the gathered array (the operand times the devices of a group)
    reduce-scatter                 the array before it is scattered
    all-reduce, all-to-all,
    permute, broadcast             the array

`wire_bytes` is what a device sends when n devices make a ring: payload (n - 1) / n for a gather, scatter, all-to-all;
twice that for an all-reduce; the payload for a permute or broadcast; for a collective that XLA split into permutes,
what these send. Arrays of a collective of several operands are added up.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable

import numpy as np
from jax.sharding import Mesh

from gpt2_jax.planning.device_groups import Groups, permute_groups, replica_groups
from gpt2_jax.planning.hlo_text import HloModule, Instruction, array_bytes
from gpt2_jax.planning.permute_chains import PermuteChain, find_chains

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COMPUTE = ("dot", "convolution", "fusion", "custom-call", "while", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program; sizes are per device and occurrence (see the top of this file).

    Attributes:
      kind: one of `KINDS`.
      name: of the HLO instruction, or of the first permute of a chain.
      dtype: of its arrays; several are joined by commas.
      payload_bytes: what is gathered, scattered, reduced or sent.
      wire_bytes: what a device sends.
      group_size: devices in a group.
      groups: a partition of the device numbers (places in the mesh's order).
      executions: occurrences in one run of the program, loops counted.
      asynchronous: whether other instructions may run meanwhile.
      overlapped: whether computation is scheduled meanwhile.
      op_name: where in the source program it comes from, as far as XLA says.
      note: what is uncertain or unusual about it.
    """

    kind: str
    name: str
    dtype: str
    payload_bytes: int
    wire_bytes: float
    group_size: int
    groups: Groups
    executions: int
    asynchronous: bool
    overlapped: bool
    op_name: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Total:
    """Sums over collectives, executions counted: of all bytes on the wire, `overlapped` is the share beside compute."""

    count: int = 0
    payload_bytes: int = 0
    wire_bytes: float = 0.0
    overlapped: float = 0.0


def read_collectives(hlo_text: str) -> list[Collective]:
    """The collectives of an optimised, scheduled module as `compiled.as_text()` prints it.

    Groups of one device are left out: they move nothing. An all-reduce of which a fusion keeps only a part is a
    reduce-scatter, which is how TPU programs hold one; permutes that stand for a gather or scatter are counted as that.

    Raises:
      ValueError: the text is not such a module.
    """
    module = HloModule(hlo_text)
    executions = module.executions()
    chains = find_chains(module, executions)
    chained = {id(permute) for chain in chains for permute in chain.permutes}
    found = [_from_chain(module, chain, executions) for chain in chains]
    for instruction in module.all_instructions():
        kind = _kind(instruction)
        if kind and instruction.computation in executions and id(instruction) not in chained:
            outer = _outer(module, instruction)
            if not _repeats_start(instruction, outer):
                found.append(_read(module, kind, instruction, outer, executions[instruction.computation]))
    return [collective for collective in found if collective.group_size > 1]


def axes_of(collective: Collective, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which devices of a group differ, in the mesh's order."""
    shape = mesh.devices.shape
    spanned: set[int] = set()
    for group in collective.groups:
        places = np.stack(np.unravel_index(np.array(group), shape))
        spanned |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(mesh.axis_names[axis] for axis in sorted(spanned))


def totals(
    collectives: Iterable[Collective], by: Callable[[Collective], Hashable] = lambda collective: collective.kind
) -> dict[Hashable, Total]:
    """Sums per kind, or per whatever `by` gives, such as `lambda c: (c.kind, axes_of(c, mesh))`."""
    grouped: dict[Hashable, list[Collective]] = collections.defaultdict(list)
    for collective in collectives:
        grouped[by(collective)].append(collective)
    return {key: _total(members) for key, members in grouped.items()}


def _total(collectives: list[Collective]) -> Total:
    wire = sum(one.wire_bytes * one.executions for one in collectives)
    hidden = sum(one.wire_bytes * one.executions for one in collectives if one.overlapped)
    return Total(
        count=sum(one.executions for one in collectives),
        payload_bytes=sum(one.payload_bytes * one.executions for one in collectives),
        wire_bytes=wire,
        overlapped=hidden / wire if wire else 0.0,
    )


def _kind(instruction: Instruction) -> str:
    """The kind of collective that an instruction is or starts; empty for another instruction."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def _outer(module: HloModule, instruction: Instruction) -> Instruction:
    """The fusion or async-start that holds a collective, or else the collective."""
    callers = module.callers[instruction.computation]
    wraps = callers and callers[0].opcode in ("fusion", "async-start")
    return callers[0] if wraps else instruction


def _repeats_start(instruction: Instruction, outer: Instruction) -> bool:
    """Whether a fusion only carries on a collective that another started.

    A TPU program repeats the instruction in each fusion that computes while the collective is under way, and in the
    one that waits for it; the flags of these are numbers from 0.
    """
    flags = "async_collective_fusion_config" in instruction.attributes
    return outer is not instruction and flags and '"flag_start":"-1"' not in instruction.attributes


def _read(
    module: HloModule, kind: str, instruction: Instruction, outer: Instruction, executed: tuple[int, str]
) -> Collective:
    done = _done(module, instruction, outer)
    # Results, not operands: a TPU program also converts within the collective.
    result = done.shape if done and instruction.opcode.endswith("-start") else instruction.shape
    sizes = array_bytes(result)
    payload = sum(sizes.values())
    if kind == "collective-permute":
        groups = permute_groups(instruction.attributes)
    else:
        groups = replica_groups(instruction.attributes, module.num_devices)
    if kind == "reduce-scatter":
        payload *= len(groups[0])
    if kind == "all-reduce" and outer.opcode == "fusion" and _keeps_part(module, instruction):
        kind = "reduce-scatter"
    times, note = executed
    size = max(map(len, groups))
    return Collective(
        kind=kind,
        name=outer.name,
        dtype=",".join(sorted(sizes)),
        payload_bytes=payload,
        wire_bytes=_wire_bytes(kind, payload, size),
        group_size=size,
        groups=groups,
        executions=times,
        asynchronous=done is not None,
        overlapped=done is not None and _computes_between(module, outer, done),
        op_name=instruction.op_name or outer.op_name,
        note=note,
    )


def _wire_bytes(kind: str, payload: int, size: int) -> float:
    if kind in ("collective-permute", "collective-broadcast"):
        return float(payload)
    return payload * (size - 1) / size * (2 if kind == "all-reduce" else 1)


def _from_chain(module: HloModule, chain: PermuteChain, executions: dict[str, tuple[int, str]]) -> Collective:
    """A collective of permutes, from those read one by one."""
    runs, note = executions[chain.computation]
    permutes = [
        _read(module, "collective-permute", permute, permute, executions[permute.computation])
        for permute in chain.permutes
    ]
    first, total = permutes[0], _total(permutes)
    occurrences = runs * chain.count
    sends = total.count // max(occurrences, 1)
    return dataclasses.replace(
        first,
        kind=chain.kind,
        payload_bytes=first.payload_bytes * first.group_size,
        wire_bytes=total.wire_bytes / max(occurrences, 1),
        executions=occurrences,
        overlapped=total.overlapped > 0.5,
        note="; ".join(filter(None, (f"split into {sends} permutes", note))),
    )


def _keeps_part(module: HloModule, all_reduce: Instruction) -> bool:
    """Whether only slices of an all-reduce leave its fusion."""
    for instruction in module.computations[all_reduce.computation].instructions.values():
        if instruction.opcode in ("dynamic-slice", "slice"):
            source = module.source(instruction)
            if source.opcode == "get-tuple-element":
                source = module.source(source)
            if source is all_reduce:
                return True
    return False


def _done(module: HloModule, instruction: Instruction, outer: Instruction) -> Instruction | None:
    """The instruction that waits for an asynchronous collective; None for a synchronous one."""
    following = module.computations[outer.computation].instructions
    if outer.name.startswith("async-collective-start"):
        return _fused_done(module, instruction, outer)
    if not outer.opcode.endswith("-start"):
        return None
    names = {outer.name}
    for other in following.values():
        if other.opcode.endswith(("-update", "-done")) and names & set(other.operands):
            if other.opcode.endswith("-done"):
                return other
            names.add(other.name)
    return None


def _fused_done(module: HloModule, instruction: Instruction, outer: Instruction) -> Instruction | None:
    channel = instruction.attribute("channel_id")
    for other in module.computations[outer.computation].instructions.values():
        if other.name.startswith("async-collective-done") and other.opcode == "fusion":
            inner = module.computations[other.attribute("calls")].instructions.values()
            if any(one.attribute("channel_id") == channel for one in inner):
                return other
    return None


def _computes_between(module: HloModule, start: Instruction, done: Instruction) -> bool:
    between = list(module.computations[start.computation].instructions.values())[start.position + 1 : done.position]
    return any(_computes(module, instruction) for instruction in between)


def _computes(module: HloModule, instruction: Instruction) -> bool:
    if instruction.opcode not in _COMPUTE or "AllocateBuffer" in instruction.attributes:
        return False
    if instruction.opcode == "fusion" and "kind=kCustom" in instruction.attributes:
        return not any(_kind(one) for one in module.computations[instruction.attribute("calls")].instructions.values())
    return True
