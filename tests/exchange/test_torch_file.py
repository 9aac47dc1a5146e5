"""Files of torch.save: one that torch 2.13 wrote, ones that are damaged or hostile, and ours read with Python alone."""

import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference.torch_load import load

from gpt2_jax.errors import DataError
from gpt2_jax.exchange.plain_pickle import MAX_BYTES, Call, Global, Persistent, write_pickle
from gpt2_jax.exchange.torch_file import open_torch_file, tensor_in_pickle, write_torch_file

# data.pkl of torch.save({"model": Linear(2, 3).state_dict(), "best_val_loss": tensor(1.5), "iter_num": 5}), torch 2.13
TORCH_PICKLE = (
    b"\x80\x02}q\x00(X\x05\x00\x00\x00modelq\x01ccollections\nOrderedDict\nq\x02)Rq\x03(X\x06\x00\x00\x00weightq\x04c"
    b"torch._utils\n_rebuild_tensor_v2\nq\x05((X\x07\x00\x00\x00storageq\x06ctorch\nFloatStorage\nq\x07X\x01\x00\x00"
    b"\x000q\x08X\x03\x00\x00\x00cpuq\tK\x06tq\nQK\x00K\x03K\x02\x86q\x0bK\x02K\x01\x86q\x0c\x89h\x02)Rq\rtq\x0eRq"
    b"\x0fX\x04\x00\x00\x00biasq\x10h\x05((h\x06h\x07X\x01\x00\x00\x001q\x11h\tK\x03tq\x12QK\x00K\x03\x85q\x13K\x01"
    b"\x85q\x14\x89h\x02)Rq\x15tq\x16Rq\x17u}q\x18X\t\x00\x00\x00_metadataq\x19h\x02)Rq\x1aX\x00\x00\x00\x00q\x1b}q"
    b"\x1cX\x07\x00\x00\x00versionq\x1dK\x01sssbX\r\x00\x00\x00best_val_lossq\x1eh\x05((h\x06h\x07X\x01\x00\x00\x002q"
    b'\x1fh\tK\x01tq QK\x00))\x89h\x02)Rq!tq"Rq#X\x08\x00\x00\x00iter_numq$K\x05u.'
)
WEIGHT = np.arange(6, dtype=np.float32) / 8
BIAS = np.array([1, -2, 3], np.float32)
RECORDS = {
    "data.pkl": TORCH_PICKLE,
    ".format_version": b"1",
    "byteorder": b"little",
    "data/0": WEIGHT.tobytes(),
    "data/1": BIAS.tobytes(),
    "data/2": np.float32(1.5).tobytes(),
    "version": b"3\n",
}


def torch_file(folder: pathlib.Path, *, compression: int = zipfile.ZIP_STORED, **changed: bytes | None) -> pathlib.Path:
    file = folder / "ckpt.pt"
    records = {**RECORDS, **{name.replace("__", "/").replace("_dot_", "."): data for name, data in changed.items()}}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            if data is not None:
                archive.writestr(f"ckpt/{name}", data)
    return file


def all_of(file: pathlib.Path) -> dict[str, np.ndarray]:
    with open_torch_file(file) as opened:
        found = {name: opened.tensor(value, name) for name, value in opened.contents["model"].items()}
        opened.check(found.values())
        return {name: opened.read(tensor) for name, tensor in found.items()}


def test_reads_what_torch_wrote(tmp_path: pathlib.Path) -> None:
    file = torch_file(tmp_path)
    with open_torch_file(file) as opened:
        assert opened.contents["iter_num"] == 5
        assert list(opened.contents["model"]) == ["weight", "bias"]
        scalar = opened.read(opened.tensor(opened.contents["best_val_loss"], "best_val_loss"))
        assert scalar.shape == ()
        assert scalar == 1.5
    found = all_of(file)
    np.testing.assert_array_equal(found["weight"], [[0, 0.125], [0.25, 0.375], [0.5, 0.625]])
    np.testing.assert_array_equal(found["bias"], [1, -2, 3])
    assert found["weight"].dtype == np.float32


def test_byteorder_may_be_left_out(tmp_path: pathlib.Path) -> None:
    assert all_of(torch_file(tmp_path, byteorder=None))["bias"][1] == -2


def tensor(offset: Any, shape: Any, stride: Any, count: Any = 6, key: Any = "0", kind: str = "FloatStorage") -> Call:
    storage = Persistent(("storage", Global("torch", kind), key, "cpu", count))
    arguments = (storage, offset, shape, stride, False, Call(Global("collections", "OrderedDict"), ()))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def with_weight(folder: pathlib.Path, value: Any) -> pathlib.Path:
    return torch_file(folder, data_dot_pkl=write_pickle({"model": {"weight": value}}))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ((0, (2, 3), (1, 2)), [[0, 2, 4], [1, 3, 5]]),  # transposed
        ((2, (2, 2), (2, 1)), [[2, 3], [4, 5]]),
        ((5, (), ()), 5),
        ((0, (3,), (2,)), [0, 2, 4]),
        ((1, (1, 2, 1), (2**62, 3, 2**62)), [[[1], [4]]]),  # a step along one value leads nowhere
    ],
)
def test_views(view: tuple[Any, ...], expected: list[Any], tmp_path: pathlib.Path) -> None:
    found = all_of(with_weight(tmp_path, tensor(*view)))["weight"]
    np.testing.assert_array_equal(found * 8, expected)


def test_parameters(tmp_path: pathlib.Path) -> None:
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), (tensor(0, (6,), (1,)), True, {}))
    np.testing.assert_array_equal(all_of(with_weight(tmp_path, parameter))["weight"], WEIGHT)


@pytest.mark.parametrize(
    "view",
    [
        (1, (3, 2), (2, 1)),
        (0, (3, 2), (3, 1)),
        (-1, (3, 2), (2, 1)),
        (5, (3,), (-1,)),
        (0, (-3, -2), (2, 1)),
        (0, (3, 2), (2,)),
        (0, (1000, 1000), (0, 0)),
        (0, (7,), (0,)),
        (0, (3, 3), (1, 1)),
        (6, (), ()),
        (0, (0,), (1,)),
        (0, (0, 2**60), (1, 2**62)),
        (0, (1,) * 9, (1,) * 9),
        (0, (2**2000,) * 5000, (2**2000,) * 5000),
        (0, (2**60, 2**60), (1, 1)),
        (0, (2.0,), (1,)),
        (0, (6,), (True,)),
    ],
)
def test_views_beyond_their_storage(view: tuple[Any, ...], tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"ckpt\.pt: weight is not a view within its storage"):
        all_of(with_weight(tmp_path, tensor(*view)))


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        {},
        Global("torch", "FloatStorage"),
        Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6)),
        Call(Global("torch", "FloatStorage"), ()),
        Call(Global("torch._utils", "_rebuild_tensor_v2"), ()),
        Call(Global("torch._utils", "_rebuild_parameter"), (5,)),
        tensor("0", (6,), (1,)),
        tensor(0, {}, (1,)),
        tensor(0, (6,), (1,), key=0),
        tensor(0, (6,), (1,), kind="OrderedDict"),
    ],
)
def test_what_is_no_tensor(value: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"ckpt\.pt: (weight is no tensor|data\.pkl: it asks for)"):
        all_of(with_weight(tmp_path, value))


def test_types(tmp_path: pathlib.Path) -> None:
    kinds = {
        "DoubleStorage": np.float64,
        "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": np.int64,
        "BoolStorage": np.bool_,
    }
    for kind, dtype in kinds.items():
        values = np.array([0, 1, 1], dtype)
        pickled = write_pickle({"model": {"weight": tensor(0, (3,), (1,), count=3, kind=kind)}})
        found = all_of(torch_file(tmp_path, data_dot_pkl=pickled, data__0=values.tobytes()))["weight"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)


def refused(file: pathlib.Path, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        all_of(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_records_that_are_not_as_they_should_be(tmp_path: pathlib.Path) -> None:
    refused(torch_file(tmp_path, data__0=None), "no record 'ckpt/data/0'")
    refused(torch_file(tmp_path, data__0=WEIGHT.tobytes()[:-4]), "has 20 bytes, by data.pkl it should be 6 values")
    refused(torch_file(tmp_path, byteorder=b"big"), "byteorder is not little")
    refused(torch_file(tmp_path, data_dot_pkl=None), "it is no file of torch.save")
    refused(torch_file(tmp_path, data_dot_pkl=b"\x80\x02cos\nsystem\n."), "asks for 'os.system'")
    refused(torch_file(tmp_path, data_dot_pkl=TORCH_PICKLE + b" " * MAX_BYTES), f"allowed: {MAX_BYTES}")
    far = write_pickle({"model": {"weight": tensor(0, (6,), (1,), key="../../../etc/passwd")}})
    refused(torch_file(tmp_path, data_dot_pkl=far), "no record")
    refused(torch_file(tmp_path, compression=zipfile.ZIP_DEFLATED), "compressed")


def test_a_small_file_never_takes_much_memory(tmp_path: pathlib.Path) -> None:
    zeros = np.zeros(10_000_000, np.float32).tobytes()
    pickled = write_pickle({"model": {"weight": tensor(0, (10_000_000,), (1,), count=10_000_000)}})
    file = torch_file(tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("ckpt/data.pkl", pickled)
        archive.writestr("ckpt/data/0", zeros, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 100_000
    refused(file, "compressed")
    large = np.zeros(100_000, np.float32).tobytes()
    shared = write_pickle({"model": {str(number): tensor(0, (100_000,), (1,), count=100_000) for number in range(3)}})
    refused(torch_file(tmp_path, data_dot_pkl=shared, data__0=large), "they share storages")


def test_a_record_that_lies_about_its_size(tmp_path: pathlib.Path) -> None:
    """Its entry in the archive says 2^31 bytes more than there are."""
    file = torch_file(tmp_path, data_dot_pkl=write_pickle({"model": {"weight": tensor(0, (6,), (1,), 6 + 2**29)}}))
    whole = bytearray(file.read_bytes())
    place = whole.rindex(b"ckpt/data/0") - 46  # its entry in the central directory
    for field in (20, 24):
        whole[place + field : place + field + 4] = (24 + 2**31).to_bytes(4, "little")
    file.write_bytes(whole)
    refused(file, "compressed|not a whole file")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_record_twice(tmp_path: pathlib.Path) -> None:
    file = torch_file(tmp_path)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("ckpt/data/0", BIAS.tobytes())
    refused(file, "a record twice")


def test_other_files(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "ckpt.pt"
    refused(file, "no such file")
    for data, reason in (
        (b"", "not a file of torch.save"),
        (b"version https://git-lfs", "not a file of torch.save"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before version 1.6"),
        (b"PK\x03\x04", "not a whole file"),
    ):
        file.write_bytes(data)
        refused(file, reason)
    file.unlink()
    file.mkdir()
    refused(file, "Is a directory")


def test_damage_anywhere_is_told(tmp_path: pathlib.Path) -> None:
    file = torch_file(tmp_path)
    whole = file.read_bytes()
    for cut in range(0, len(whole), 37):
        file.write_bytes(whole[:cut])
        refused(file, "whole|no file of|not a file|ends too early")
    rng = np.random.default_rng(0)
    expected = {"weight": WEIGHT.reshape(3, 2), "bias": BIAS}
    told = 0
    for place in rng.permutation(len(whole))[:600]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            found = all_of(file)
        except DataError as error:
            assert "\n" not in str(error)
            told += 1
        else:  # what is not read, such as a time
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert told > 300


CONTENTS = {
    "model": {
        "a": tensor_in_pickle(0, np.dtype(np.float32), (2, 3)),
        "b": tensor_in_pickle(1, np.dtype(ml_dtypes.bfloat16), (4,)),
        "tied": tensor_in_pickle(0, np.dtype(np.float32), (2, 3)),
    },
    "n": 3,
}
STORAGES = [np.arange(6, dtype=np.float32).reshape(3, 2).T, np.ones(4, ml_dtypes.bfloat16)]


def test_python_alone_reads_what_was_written(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "ckpt.pt"
    write_torch_file(file, CONTENTS, STORAGES)
    found = load(file)
    assert found["n"] == 3
    np.testing.assert_array_equal(found["model"]["a"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(found["model"]["b"].astype(np.float32), [1, 1, 1, 1])
    assert np.shares_memory(found["model"]["a"], found["model"]["tied"])
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
    assert list(tmp_path.iterdir()) == [file]


def test_what_fails_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "ckpt.pt"
    file.write_bytes(b"old")

    def storages() -> Iterator[np.ndarray]:
        yield STORAGES[0]
        raise KeyError("no more")

    with pytest.raises(KeyError):
        write_torch_file(file, CONTENTS, storages())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("ckpt.pt", b"old")]
