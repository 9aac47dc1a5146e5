"""A compiled program as XLA prints it (`compiled.as_text()`): its computations, and how often each of them runs."""

import collections
import dataclasses
import operator
import re
from collections.abc import Callable, Iterator

# A loop is followed this far where its trip count is not printed.
MAX_TRIPS = 1_000_000

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+)(\d*)[a-z0-9]*\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
# Instructions that hand on their operand's numbers.
TRANSPARENT = ("copy", "bitcast", "reshape", "transpose", "convert")

_Element = Callable[[int], int | None]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: as printed, a tuple's in parentheses.
      opcode: such as `all-gather-start`.
      argument: what stands in the parentheses after the opcode.
      attributes: the rest of the line.
      computation: the name of the computation it stands in.
      position: its number there; the order is the schedule.
    """

    name: str
    shape: str
    opcode: str
    argument: str
    attributes: str
    computation: str
    position: int

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.argument)

    @property
    def op_name(self) -> str:
        """Where in the source program it comes from; empty when XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, key: str) -> str:
        """A value of one word, such as the name of a called computation; empty when it is not there."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    def called(self) -> list[str]:
        """Computations whose instructions run when this one does (not the scalar function of a reduction)."""
        if self.opcode == "conditional":
            several = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
            if several:
                return _NAME.findall(several[1])
            return [self.attribute("true_computation"), self.attribute("false_computation")]
        if self.opcode == "while":
            return [self.attribute("body"), self.attribute("condition")]
        name = self.attribute("to_apply" if self.opcode == "call" else "calls")
        return [name] if name else []


class Computation:
    """Instructions by name, in the order of the schedule."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.instructions: dict[str, Instruction] = {}
        self.root: Instruction | None = None


class HloModule:
    """Computations by name. Raises ValueError for a text without an entry computation."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations[header[2]] = Computation(header[2])
                self.entry = header[2] if header[1] else self.entry
            elif current is not None and (start := _INSTRUCTION.match(line)):
                _add(current, line[start.end() :], start[2], is_root=bool(start[1]))
        if not self.entry:
            raise ValueError("the text is no HLO module: it has no ENTRY computation")
        found = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
        self.num_partitions = int(found[1]) if found else 1
        found = re.search(r"\breplica_count=(\d+)", text.partition("\n")[0])
        self.num_devices = self.num_partitions * (int(found[1]) if found else 1)
        self.callers: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in self.all_instructions():
            for name in instruction.called():
                self.callers[name].append(instruction)

    def all_instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.instructions.values()

    def source(self, instruction: Instruction, operand: int = 0) -> Instruction:
        """The instruction that makes an operand, seen through copies and changes of shape or type."""
        instructions = self.computations[instruction.computation].instructions
        found = instructions[instruction.operands[operand]]
        while found.opcode in TRANSPARENT:
            found = instructions[found.operands[0]]
        return found

    def executions(self) -> dict[str, tuple[int, str]]:
        """How often each computation runs when the program runs once, and a note where that is not certain."""
        counts: dict[str, int] = collections.Counter()
        notes: dict[str, str] = {}

        def visit(name: str, times: int, note: str) -> None:
            counts[name] += times
            notes[name] = notes.get(name) or note
            for instruction in self.computations[name].instructions.values():
                for called in instruction.called():
                    if instruction.opcode == "while":
                        trips = trip_count(self, instruction)
                        unknown = note or ("" if trips is not None else "trip count unknown, counted as 1")
                        visit(called, times * (1 if trips is None else trips), unknown)
                    else:
                        branch = "one branch of a conditional" if instruction.opcode == "conditional" else ""
                        visit(called, times, note or branch)

        visit(self.entry, 1, "")
        return {name: (times, notes[name]) for name, times in counts.items()}


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:100]}")


def _add(computation: Computation, text: str, name: str, *, is_root: bool) -> None:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    instruction = Instruction(
        name,
        text[:end],
        text[end:opening].strip(),
        text[opening + 1 : closing],
        text[closing + 1 :],
        computation.name,
        len(computation.instructions),
    )
    computation.instructions[name] = instruction
    if is_root:
        computation.root = instruction


def array_bytes(shape: str) -> dict[str, int]:
    """Bytes by type of all arrays in a printed shape, without a layout's padding."""
    sizes: dict[str, int] = collections.Counter()
    for found in _ARRAY.finditer(shape):
        letters, bits, dims = found.groups()
        if letters in ("token", "opaque"):
            continue
        count = 1
        for dim in filter(None, dims.replace("<=", "").split(",")):
            count *= int(dim)
        sizes[found[0].partition("[")[0]] += -(-count * int(bits or 8) // 8)
    return dict(sizes)


def trip_count(module: HloModule, loop: Instruction) -> int | None:
    """How often a `while` runs its body: as printed, else by running its counter; None where neither is possible."""
    printed = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if printed:
        return int(printed[1])
    condition = module.computations[loop.attribute("condition")]
    body = module.computations[loop.attribute("body")]
    start = module.source(loop)
    if start.opcode != "tuple" or condition.root is None or body.root is None or body.root.opcode != "tuple":
        return None
    before = module.computations[loop.computation]
    following = body.root.operands
    state: dict[int, int | None] = {}

    def current(index: int) -> int | None:
        if index not in state:  # only in the first round: later ones look at the same elements
            state[index] = _value(module, before, start.operands[index], lambda _: None)
        return state[index]

    for trips in range(MAX_TRIPS):
        goes_on = _value(module, condition, condition.root.name, current)
        if goes_on is None:
            return None
        if not goes_on:
            return trips
        after: dict[int, int | None] = {}
        while missing := set(state) - set(after):
            after |= {index: _value(module, body, following[index], current) for index in missing}
        state.update(after)
    return None


def _value(module: HloModule, computation: Computation, name: str, element: _Element) -> int | None:
    """An integer scalar; `element` gives the parameters (of a loop: the elements of its one parameter)."""
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands

    def operand(index: int) -> int | None:
        return _value(module, computation, operands[index], element)

    if opcode == "constant":
        text = {"true": "1", "false": "0"}.get(instruction.argument, instruction.argument)
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if opcode == "parameter":
        return element(int(instruction.argument))
    if opcode in TRANSPARENT:
        return operand(0)
    if opcode == "get-tuple-element":
        source, index = computation.instructions[operands[0]], int(instruction.attribute("index"))
        if source.opcode == "parameter":
            return element(index)
        if source.opcode == "tuple":
            return _value(module, computation, source.operands[index], element)
        return _fused(module, computation, source, index, element) if source.opcode == "fusion" else None
    if opcode == "fusion":
        return _fused(module, computation, instruction, None, element)
    if opcode == "compare" or opcode in _BINARY:
        left, right = operand(0), operand(1)
        if left is None or right is None:
            return None
        if opcode == "compare":
            return int(_COMPARE[instruction.attribute("direction")](left, right))
        return _BINARY[opcode](left, right)
    return None


def _fused(
    module: HloModule, computation: Computation, fusion: Instruction, index: int | None, element: _Element
) -> int | None:
    inner = module.computations[fusion.attribute("calls")]
    if inner.root is None:
        return None
    name = inner.root.name
    if index is not None:
        if inner.root.opcode != "tuple":
            return None
        name = inner.root.operands[index]
    return _value(module, inner, name, lambda i: _value(module, computation, fusion.operands[i], element))
