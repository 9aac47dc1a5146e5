"""Pickles of plain values, read without running anything, and written.

A pickle is a program for a small stack machine, and Python's machine imports and calls whatever the program names. The
one here knows only the instructions that build numbers, text, tuples, lists and dicts. Names, calls and persistent ids
become inert descriptions (`Global`, `Call`, `Persistent`) for the caller to judge; nothing is imported or called. That
takes no more lines than restricting `pickle.Unpickler`, and leaves out what cannot be restricted there: attributes that
are set by BUILD, memory taken by the index of a memo, keys of nested tuples whose hash takes forever.

Each instruction makes at most one small object, so the size of a pickle bounds the memory that it takes.
"""

import dataclasses
import struct
from collections.abc import Callable, Collection
from typing import Any

from gpt2_jax.errors import DataError

MAX_BYTES = 4 * 2**20  # about 25,000 tensors; 124M parameters with AdamW's state are 450


@dataclasses.dataclass(frozen=True)
class Global:
    """The name of something in a module."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Call:
    """What a pickle wants made by a call."""

    function: Global
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Persistent:
    """What a pickle says is kept elsewhere, by its id there."""

    identity: Any


ORDERED_DICT = Global("collections", "OrderedDict")


def read_pickle(data: bytes, where: str, allowed: Collection[Global] = ()) -> Any:
    """The value that a pickle describes.

    Args:
      data: a pickle of protocol 2 to 5.
      where: its name in errors.
      allowed: names that may appear in it. An ordered dict becomes a dict; calls of the others become `Call`.

    Raises:
      DataError: another name, an instruction that plain values do not need, a key that is there twice or is neither
        text nor integer, more than MAX_BYTES, or damage.
    """
    if len(data) > MAX_BYTES:
        raise DataError(f"{where}: {len(data)} bytes, and a pickle of plain values may have {MAX_BYTES}")
    try:
        return _Machine(data, frozenset(allowed)).run()
    except _Refusal as refusal:
        raise DataError(f"{where}: {refusal}; nothing in it was run") from None


class _Refusal(Exception):
    """Why a pickle is not read."""


_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_TEXTS = {b"X": "<I", b"\x8c": "<B"}
_PUTS = {b"q": "<B", b"r": "<I"}
_GETS = {b"h": "<B", b"j": "<I"}
_SHORT_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_PROTOCOLS = range(2, 6)


class _Machine:
    def __init__(self, data: bytes, allowed: frozenset[Global]) -> None:
        self._data = data
        self._at = 0
        self._allowed = allowed
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}
        self._others: dict[bytes, Callable[[], None]] = {
            b"\x80": self._protocol,
            b"\x95": lambda: self._skip(8),  # the length of a frame
            b"(": lambda: self._marks.append(len(self._stack)),
            b"}": lambda: self._stack.append({}),
            b"]": lambda: self._stack.append([]),
            b"t": lambda: self._stack.append(tuple(self._pop_to_mark())),
            b"a": lambda: self._extend([self._pop()]),
            b"e": lambda: self._extend(self._pop_to_mark()),
            b"s": lambda: self._update([self._pop(), self._pop()][::-1]),
            b"u": lambda: self._update(self._pop_to_mark()),
            b"\x8a": self._long,
            b"\x94": lambda: self._put(len(self._memo)),
            b"c": self._global,
            b"R": self._call,
            b"b": self._build,
            b"Q": lambda: self._stack.append(Persistent(self._pop())),
        }

    def run(self) -> Any:
        while (code := self._take(1)) != b".":
            if code in _CONSTANTS:
                self._stack.append(_CONSTANTS[code])
            elif code in _NUMBERS:
                self._stack.append(self._number(_NUMBERS[code]))
            elif code in _TEXTS:
                self._stack.append(self._text(self._take(self._number(_TEXTS[code]))))
            elif code in _PUTS:
                self._put(self._number(_PUTS[code]))
            elif code in _GETS:
                self._get(self._number(_GETS[code]))
            elif code in _SHORT_TUPLES:
                items = [self._pop() for _ in range(_SHORT_TUPLES[code])]
                self._stack.append(tuple(reversed(items)))
            elif code in self._others:
                self._others[code]()
            else:
                raise _Refusal(f"instruction {code!r} at byte {self._at - 1}, which plain values do not need")
        value = self._pop()
        if self._stack or self._marks or self._at != len(self._data):
            raise _Refusal("more than one value in the pickle, which is damaged")
        return value

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise _Refusal("the pickle ends too early; copy the file again")
        self._at += count
        return taken

    def _skip(self, count: int) -> None:
        self._take(count)

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, encoded: bytes) -> str:
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError:
            raise _Refusal(f"text before byte {self._at} that is not UTF-8") from None

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise _Refusal("the pickle ends too early; copy the file again")
        return self._text(self._take(end + 1 - self._at)[:-1])

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise _Refusal(f"nothing on the stack at byte {self._at}; the pickle is damaged")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        value = self._pop()
        if type(value) is not kind:
            raise _Refusal(f"{type(value).__name__} where {kind.__name__} should be, at byte {self._at}")
        self._stack.append(value)
        return value

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise _Refusal(f"no mark on the stack at byte {self._at}; the pickle is damaged")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _protocol(self) -> None:
        protocol = self._number("<B")
        if protocol not in _PROTOCOLS:
            raise _Refusal(f"pickle protocol {protocol}; allowed: {_PROTOCOLS[0]} to {_PROTOCOLS[-1]}")

    def _put(self, place: int) -> None:
        value = self._pop()
        self._stack.append(value)
        self._memo[place] = value

    def _get(self, place: int) -> None:
        if place not in self._memo:
            raise _Refusal(f"nothing kept under {place} at byte {self._at}; the pickle is damaged")
        self._stack.append(self._memo[place])

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _update(self, keys_and_values: list[Any]) -> None:
        target = self._top(dict)
        if len(keys_and_values) % 2:
            raise _Refusal(f"a key without a value at byte {self._at}; the pickle is damaged")
        for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
            if type(key) is not str and type(key) is not int:
                raise _Refusal(f"a key of type {type(key).__name__}; allowed: str, int")
            if key in target:
                raise _Refusal(f"the key {str(key)[:80]!r} is there twice")
            target[key] = value

    def _global(self) -> None:
        found = Global(self._line(), self._line())
        if found not in self._allowed:
            raise _Refusal(f"it asks for {str(found)[:80]!r}, which plain values do not need")
        self._stack.append(found)

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise _Refusal(f"a call at byte {self._at} that is not of a name with a tuple")
        if function == ORDERED_DICT:
            if arguments:
                raise _Refusal("an ordered dict made of something else")
            self._stack.append({})
        else:
            self._stack.append(Call(function, arguments))

    def _build(self) -> None:
        """Attributes, which torch gives the dict of a module's tensors (versions of its parts): left out."""
        self._pop()
        self._top(dict)


def write_pickle(value: Any) -> bytes:
    """The pickle, protocol 2, of None, bools, numbers, text, tuples, dicts, `Global`, `Call` and `Persistent`."""
    return b"\x80\x02" + _written(value) + b"."


def _written(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            encoded = value.encode("utf-8")
            return b"X" + struct.pack("<I", len(encoded)) + encoded
        case tuple():
            return b"(" + b"".join(map(_written, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_written(key) + _written(item) for key, item in value.items()) + b"u"
        case Global():
            return f"c{value.module}\n{value.name}\n".encode("ascii")
        case Call():
            return _written(value.function) + _written(value.arguments) + b"R"
        case Persistent():
            return _written(value.identity) + b"Q"
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + struct.pack("<B", size) + value.to_bytes(size, "little", signed=True)
    raise TypeError(f"{type(value).__name__} is no plain value")
