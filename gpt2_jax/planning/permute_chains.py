"""Chains of permutes into which XLA splits an all-gather or a reduce-scatter around a matrix product.

XLA calls this a windowed einsum: a device multiplies by one shard while the next is on its way around a ring. The
permutes stand in a loop whose body is named `windowed_dot_general_body_ag` or `_rs`, with one more before or after it,
or one after another where the loop was unrolled; often half of them go round the other way.
"""

import collections
import dataclasses

from gpt2_jax.planning.device_groups import permute_groups
from gpt2_jax.planning.hlo_text import HloModule, Instruction, array_bytes

PERMUTES = ("collective-permute", "collective-permute-start")
_WINDOWED = "windowed_dot_general_body"


@dataclasses.dataclass(frozen=True)
class PermuteChain:
    """One collective made of permutes.

    Attributes:
      kind: `all-gather` or `reduce-scatter`.
      permutes: the instructions; those in a loop run once per trip of it.
      computation: the one that runs once per collective.
      count: how many such collectives the permutes make (of chains that could not be told apart, else 1).
    """

    kind: str
    permutes: tuple[Instruction, ...]
    computation: str
    count: int = 1


def find_chains(module: HloModule, executions: dict[str, tuple[int, str]]) -> list[PermuteChain]:
    """The permutes that make whole collectives: at least n - 1 sends, with n devices in the ring."""
    links = _Links(module)
    by_key: dict[tuple, list[list[Instruction]]] = collections.defaultdict(list)
    for members, kind in links.components():
        first = members[0]
        key = (links.home(first), first.op_name, kind, permute_groups(first.attributes), _bytes(module, first))
        by_key[key].append(members)
    chains = []
    for (home, _, kind, groups, _), parts in by_key.items():
        per_home = max(executions[home][0], 1)
        needed = len(groups[0]) - 1
        sends = [sum(executions[permute.computation][0] for permute in part) / per_home for part in parts]
        whole = [part for part, sent in zip(parts, sends, strict=True) if sent >= needed]
        if whole or sum(sends) >= needed:
            permutes = tuple(permute for part in whole or parts for permute in part)
            chains.append(PermuteChain(kind, permutes, home, max(len(whole), 1)))
    return chains


class _Links:
    """Which permutes belong together: one sends what another received, or both send the same array."""

    def __init__(self, module: HloModule) -> None:
        self.module = module
        self.permutes: dict[str, list[Instruction]] = collections.defaultdict(list)  # by node
        self.loops: dict[str, Instruction] = {}
        self.parent: dict[str, str] = {}
        self.passing: set[str] = set()  # nodes whose shard is sent on as it is
        self.adding: set[str] = set()  # nodes that send on what they received plus something
        for instruction in module.all_instructions():
            if instruction.opcode in PERMUTES and self._in_product(instruction):
                self.permutes[self._node(instruction)].append(instruction)
        self.parent = {node: node for node in self.permutes}
        senders: dict[tuple, str] = {}
        for node, permutes in self.permutes.items():
            if node in self.loops:
                self._link_loop(node)
            else:
                self._link_gather(node, permutes[0], senders)
        for node, permutes in self.permutes.items():
            if node not in self.loops and node not in self.passing:
                self._link_scatter(node, permutes[0])

    def components(self) -> list[tuple[list[Instruction], str]]:
        """Permutes that belong together, and the kind of collective that they make."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        for node in self.permutes:
            found[self._find(node)].append(node)
        return [
            ([permute for node in nodes for permute in self.permutes[node]], self._kind(nodes))
            for nodes in found.values()
        ]

    def home(self, permute: Instruction) -> str:
        """The computation that the collective belongs to: that of the loop, for a permute in a loop."""
        loop = self.loops.get(self._node(permute))
        return loop.computation if loop else permute.computation

    def _in_product(self, permute: Instruction) -> bool:
        return permute.op_name.endswith("dot_general") or _WINDOWED in permute.computation

    def _node(self, permute: Instruction) -> str:
        if _WINDOWED in permute.computation:
            loop = self.module.callers[permute.computation][0]
            self.loops[f"{loop.computation}/{loop.name}"] = loop
            return f"{loop.computation}/{loop.name}"
        return f"{permute.computation}/{permute.name}"

    def _kind(self, nodes: list[str]) -> str:
        bodies = [self.loops[node].attribute("body") for node in nodes if node in self.loops]
        if bodies:
            return "reduce-scatter" if f"{_WINDOWED}_rs" in bodies[0] else "all-gather"
        single = len(nodes) == 1 and self._multiplies(self._sent(self.permutes[nodes[0]][0])[0])
        return "reduce-scatter" if single or self.adding & set(nodes) else "all-gather"

    def _link_gather(self, node: str, permute: Instruction, senders: dict[tuple, str]) -> None:
        """A gather's permute sends on what another received, or what another sends the other way round."""
        received = self._received(self.module.source(permute))
        if received and self._join(node, received):
            self.passing |= {node, received}
        source, index = self._sent(permute)
        if source.opcode not in ("broadcast", "constant"):
            key = (permute.computation, source.name, index, permute.op_name)
            other = senders.setdefault(key, node)
            if other != node and self._join(node, other):
                self.passing |= {node, other}

    def _link_scatter(self, node: str, permute: Instruction) -> None:
        """A scatter's permute sends the sum of what others received and of a product."""
        source, _ = self._sent(permute)
        if source.opcode not in ("fusion", "add"):
            return
        for operand in range(len(source.operands)):
            received = self._received(self.module.source(source, operand))
            if received and received not in self.passing and self._join(node, received):
                self.adding.add(node)

    def _link_loop(self, node: str) -> None:
        start = self.module.source(self.loops[node])
        for operand in range(len(start.operands)):
            received = self._received(self.module.source(start, operand))
            if received:
                self._join(node, received)

    def _sent(self, permute: Instruction) -> tuple[Instruction, int]:
        """What makes the array that is sent, and which of its results it is."""
        source = self.module.source(permute)
        if source.opcode != "get-tuple-element":
            return source, 0
        return self.module.source(source), int(source.attribute("index"))

    def _received(self, source: Instruction) -> str:
        """The node whose permute or loop gives this shard; empty for anything else."""
        size = sum(array_bytes(source.shape).values())
        if source.opcode == "get-tuple-element":
            source = self.module.source(source)
        if source.opcode == "collective-permute-done":
            source = self.module.source(source)
        node = f"{source.computation}/{source.name}"
        # A loop also hands on what it multiplies by, which is of another size.
        return node if node in self.parent and size == _bytes(self.module, self.permutes[node][0]) else ""

    def _multiplies(self, source: Instruction) -> bool:
        inner = [source]
        if source.opcode == "fusion":
            inner = list(self.module.computations[source.attribute("calls")].instructions.values())
        return any(instruction.opcode in ("dot", "convolution") for instruction in inner)

    def _join(self, left: str, right: str) -> bool:
        """Joins two nodes of one product whose permutes send equally large arrays."""
        first, second = self.permutes[left][0], self.permutes[right][0]
        if first.op_name != second.op_name or _bytes(self.module, first) != _bytes(self.module, second):
            return False
        self.parent[self._find(left)] = self._find(right)
        return True

    def _find(self, node: str) -> str:
        while self.parent[node] != node:
            node = self.parent[node]
        return node


def _bytes(module: HloModule, permute: Instruction) -> int:
    instructions = module.computations[permute.computation].instructions
    return sum(sum(array_bytes(instructions[name].shape).values()) for name in permute.operands)
