"""Pickles of plain values, beside Python's own pickle: the same values, and none of the power."""

import pathlib
import pickle
import time
from typing import Any

import numpy as np
import pytest

from gpt2_jax.errors import DataError
from gpt2_jax.exchange.plain_pickle import (
    MAX_BYTES,
    ORDERED_DICT,
    Call,
    Global,
    Persistent,
    read_pickle,
    write_pickle,
)

SHARED = ["of", "both"]
PLAIN = {
    "none": None,
    "bools": (True, False),
    "integers": [0, 1, 255, 256, 65_535, 65_536, -1, 2**31 - 1, -(2**31), 2**31, -(2**31) - 1, 2**70, -(2**70)],
    "floats": (0.0, -1.5, 1e300, float("inf")),
    "text": ["", "a", "\n", "é", "東京", "😀", "x" * 300],
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "shared": [SHARED, SHARED],
    "nested": {"a": {"b": {}}, 1: [[[]]]},
    "many": {number: str(number) for number in range(2500)},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_python_wrote(protocol: int) -> None:
    assert read_pickle(pickle.dumps(PLAIN, protocol), "file") == PLAIN


def test_python_reads_what_was_written() -> None:
    def as_tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_tuples(item) for key, item in value.items()}
        return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value

    plain = as_tuples(PLAIN)
    back = pickle.loads(write_pickle(plain))
    assert back == plain
    assert type(back["bools"][0]) is bool


def test_names_calls_and_ids_stay_descriptions() -> None:
    value = {"call": Call(Global("a", "b"), (Persistent(("storage", 1)), {"x": Global("c", "d")}))}
    allowed = [Global("a", "b"), Global("c", "d")]
    assert read_pickle(write_pickle(value), "file", allowed) == value
    ordered = write_pickle(Call(ORDERED_DICT, ()))
    assert read_pickle(ordered, "file", [ORDERED_DICT]) == {}


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def hostile(folder: pathlib.Path) -> dict[str, bytes]:
    """Pickles that make `folder` when Python's machine runs them, by each of its ways to call something."""
    path = text(str(folder))
    mapped = b"cos\nmkdir\n" + path + b"\x85\x86"
    listed = b"q\x00cbuiltins\nlist\nh\x00\x85R."
    return {
        "GLOBAL REDUCE": b"\x80\x02cos\nmkdir\n" + path + b"\x85R.",
        "GLOBAL REDUCE of protocol 0": b"cos\nmkdir\n(V" + str(folder).encode() + b"\ntR.",
        "STACK_GLOBAL REDUCE": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + path + b"\x85R.",
        "INST": b"\x80\x02(" + path + b"ios\nmkdir\n.",
        "OBJ": b"\x80\x02(cos\nmkdir\n" + path + b"o.",
        "NEWOBJ": b"\x80\x02cbuiltins\nmap\n" + mapped + b"\x81" + listed,
        "NEWOBJ_EX": b"\x80\x04cbuiltins\nmap\n" + mapped + b"}\x92" + listed,
        "eval": b"\x80\x02cbuiltins\neval\n" + text(f"__import__('os').mkdir({str(folder)!r})") + b"\x85R.",
        "within a dict": b"\x80\x02}" + text("a") + b"cos\nmkdir\n" + path + b"\x85Rs.",
    }


@pytest.mark.parametrize("way", hostile(pathlib.Path()))
def test_nothing_is_run(way: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "made"
    data = hostile(folder)[way]
    pickle.loads(data)
    assert folder.is_dir()  # it is what it says
    folder.rmdir()
    with pytest.raises(DataError, match="^file: .*nothing in it was run$") as error:
        read_pickle(data, "file", [ORDERED_DICT])
    assert "\n" not in str(error.value)
    assert not folder.exists()


def test_a_refused_name_is_told_in_one_line() -> None:
    with pytest.raises(DataError, match=r"asks for 'posix\.system'"):
        read_pickle(b"\x80\x02cposix\nsystem\n.", "file")
    with pytest.raises(DataError) as error:
        read_pickle(b"\x80\x02c\x1b[2J\rx\n" + b"y" * 5000 + b"\n.", "file")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends too early"),
        (b"\x80", "ends too early"),
        (b"\x80\x01N.", "protocol 1"),
        (b"\x80\x02N", "ends too early"),
        (b"\x80\x02.", "nothing on the stack"),
        (b"\x80\x02NN.", "more than one value"),
        (b"\x80\x02N.N", "more than one value"),
        (b"\x80\x02(N.", "more than one value"),
        (b"\x80\x02(a.", "nothing on the stack"),
        (b"\x80\x02t.", "no mark"),
        (b"\x80\x02h\x00.", "nothing kept under 0"),
        (b"\x80\x02X\xff\xff\xff\xffa.", "ends too early"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"\x80\x02}(Nu.", "a key without a value"),
        (b"\x80\x02}NNs.", "a key of type NoneType"),
        (b"\x80\x02}(K\x01NK\x01Nu.", "'1' is there twice"),
        (b"\x80\x02NNa.", "NoneType where list"),
        (b"\x80\x02]NNs.", "list where dict"),
        (b"\x80\x02NNR.", "a call"),
        (b"\x80\x02ccollections\nOrderedDict\nN\x85R.", "an ordered dict made of"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "Global where dict"),
        (b"\x80\x02c", "ends too early"),
        (b"\x80\x02I1\n.", "instruction b'I'"),
        (b"\x80\x02\x82\x01.", "instruction"),
    ],
)
def test_damage_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        read_pickle(data, "file", [ORDERED_DICT])
    assert "\n" not in str(error.value)


def test_no_damage_raises_anything_else() -> None:
    whole = pickle.dumps(PLAIN, 2)
    cuts = [*range(400), *range(400, len(whole), 97)]
    for cut in cuts:
        with pytest.raises(DataError):
            read_pickle(whole[:cut], "file")
    rng = np.random.default_rng(0)
    head = pickle.dumps({key: value for key, value in PLAIN.items() if key != "many"}, 4)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(head)
        for place in rng.integers(0, len(head), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        try:
            read_pickle(bytes(damaged), "file")
        except DataError:
            refused += 1
    assert refused > 500


def test_bombs_take_neither_time_nor_memory() -> None:
    begin = time.monotonic()
    # Tuples of two times the one before: the hash of the last would take 2^200 steps.
    doubling = b"\x80\x02)" + b"q\x00h\x00\x86" * 200
    assert type(read_pickle(doubling + b".", "file")) is tuple
    with pytest.raises(DataError, match="a key of type tuple"):
        read_pickle(b"\x80\x02}" + doubling[2:] + b"Ns.", "file")
    # A place that Python's machine makes a table for.
    assert read_pickle(b"\x80\x02Nr\xff\xff\xff\xff.", "file") is None
    deep = read_pickle(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", "file")
    assert len(deep) == 1
    del deep
    calls = b"\x80\x02" + b"ca\nb\n" * 100_000 + b")R" + b"\x85R" * 99_999 + b"."
    assert type(read_pickle(calls, "file", [Global("a", "b")])) is Call
    with pytest.raises(DataError, match=f"a pickle of plain values may have {MAX_BYTES}"):
        read_pickle(b"\x80\x02" + b"N" * MAX_BYTES, "file")
    assert time.monotonic() - begin < 10


def test_the_machine_imports_nothing() -> None:
    with pytest.raises(DataError):
        read_pickle(b"\x80\x02cthis_module_is_not_there\nx\n.", "file")
    there = Global("this_module_is_not_there", "x")
    assert read_pickle(b"\x80\x02cthis_module_is_not_there\nx\n.", "file", [there]) == there
