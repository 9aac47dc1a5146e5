"""Document sources: what each reads, in which order, and how it refuses what it cannot read."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import sysconfig
import time

import pyarrow
import pyarrow.parquet
import pytest

from gpt2_jax.data import document_formats, documents, held_out
from gpt2_jax.data.documents import DocumentSource, open_source
from gpt2_jax.data.held_out import HeldOutSplit
from gpt2_jax.errors import DataError, UsageError

TEXTS = ["first", "", "third\nwith lines\r\n", "émoji 😀", " last\u2028 "]


def read_all(source: DocumentSource) -> list[str]:
    """All documents, with the numbering of the units checked on the way."""
    texts: list[str] = []
    for index, unit in enumerate(source.units):
        assert (unit.index, unit.first_document) == (index, len(texts))
        part = list(source.read(unit))
        assert len(part) == unit.num_documents
        texts += part
    assert len(texts) == source.num_documents
    return texts


def small_units(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in (documents, document_formats):
        monkeypatch.setattr(module, "SPAN_BYTES", size)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# stdlib


def test_stdlib_is_the_library_without_tests() -> None:
    source = open_source("stdlib")
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    names = [pathlib.Path(path).relative_to(root).as_posix() for path in source.paths]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "unittest/mock.py"} <= set(names)
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any(excluded & set(name.split("/")) for name in names)
    texts = read_all(source)
    with open(root / "argparse.py", encoding="utf-8", newline="") as file:
        assert texts[names.index("argparse.py")] == file.read()


def test_stdlib_signature_is_stable() -> None:
    assert open_source("stdlib").signature == open_source("stdlib").signature


def test_python_files_are_decoded_as_they_declare(tmp_path: pathlib.Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbf# caf\xc3\xa9\n")
    (tmp_path / "odd.py").write_bytes(b"# coding: no-such\n")
    reader = document_formats.PythonFile()
    texts = {name: list(reader.read(next(reader.spans(str(tmp_path / name))))) for name in ("latin.py", "bom.py")}
    assert texts == {"latin.py": ["# coding: latin-1\n# café\n"], "bom.py": ["# café\n"]}
    with pytest.raises(DataError, match=r"odd\.py: unknown encoding"):
        list(reader.read(next(reader.spans(str(tmp_path / "odd.py")))))


# text


def test_text_files_in_order(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, text in enumerate(TEXTS):
        folder = tmp_path / "sub" / str(number)
        folder.mkdir(parents=True)
        (folder / "x.txt").write_bytes(text.encode())
    assert read_all(open_source(f"text:{tmp_path}/**/*.txt")) == TEXTS
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_all(open_source("text:~/sub/[23]/x.txt")) == TEXTS[2:4]
    monkeypatch.chdir(tmp_path / "sub")
    assert read_all(open_source("text:*/x.txt")) == TEXTS
    small_units(monkeypatch, 5)
    source = open_source(f"text:{tmp_path}/**/*.txt")
    assert [unit.num_documents for unit in source.units] == [1, 2, 1, 1]
    assert read_all(source) == TEXTS


def test_text_file_with_brackets_in_its_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a[1].txt").write_text("text")
    assert read_all(open_source(f"text:{tmp_path}/a[1].txt")) == ["text"]


def test_text_that_is_not_utf8(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(DataError, match=r"bad\.txt: not utf-8 at byte 3") as error:
        read_all(open_source(f"text:{tmp_path}/*.txt"))
    one_line(error)


def test_signature_follows_the_files(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    spec = f"text:{tmp_path}/*.txt"
    signatures = [open_source(spec).signature, open_source(spec).signature]
    assert len(set(signatures)) == 1
    os.utime(file, ns=(1, 1))
    signatures.append(open_source(spec).signature)
    file.write_text("longer")
    os.utime(file, ns=(1, 1))
    signatures.append(open_source(spec).signature)
    (tmp_path / "b.txt").write_text("two")
    signatures.append(open_source(spec).signature)
    assert len(set(signatures)) == 4


@pytest.mark.parametrize(
    "spec, message",
    [
        ("text:{}/*.txt", "no file matches"),
        ("text:{}", "no file matches"),
        ("text:", "nothing is named"),
        ("text", "allowed: stdlib, text:GLOB"),
        ("jsn:x", "did you mean json"),
        ("stdlib:3", "unknown"),
        ("", "unknown"),
        ("tfds:a b", "write tfds:NAME"),
    ],
)
def test_refused_specs(spec: str, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        open_source(spec.format(tmp_path))
    one_line(error)


# jsonl


def write_jsonl(path: pathlib.Path, texts: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)))


@pytest.mark.parametrize("unit_bytes", [1, 40, 100, 2**20])
def test_jsonl(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    small_units(monkeypatch, unit_bytes)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (tmp_path / "b.jsonl").write_text("\n" + "\n \n".join(lines), encoding="utf-8")  # blank lines, no last newline
    source = open_source(f"jsonl:{tmp_path}/*.jsonl")
    assert read_all(source) == TEXTS + TEXTS
    assert (len(source.units) > 1) == (unit_bytes < 2**20)


def test_jsonl_other_field(tmp_path: pathlib.Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS, field="content")
    assert read_all(open_source(f"jsonl:{tmp_path}/a.jsonl", "content")) == TEXTS
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no field 'text'; there are: 'id', 'content'"):
        read_all(open_source(f"jsonl:{tmp_path}/a.jsonl"))


@pytest.mark.parametrize("unit_bytes", [1, 2**20])
@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "line 4: not JSON"),
        (b"[1]", "line 4: a JSON object is expected, this is list"),
        (b'{"text": 5}', "line 4: field 'text' holds int"),
        (b'{"text": null}', "line 4: field 'text' holds NoneType"),
        (b"[" * 200_000, "line 4: not JSON"),
        (b'{"text": "\xff"}', "line 4: not utf-8 at byte 38"),
    ],
)
def test_jsonl_damaged(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, line: bytes, message: str
) -> None:
    small_units(monkeypatch, unit_bytes)
    good = b'{"text":"12"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + b'{"text":"1"}\n' + line + b"\n" + good)
    with pytest.raises(DataError, match=f"a.jsonl, {message}") as error:
        read_all(open_source(f"jsonl:{tmp_path}/a.jsonl"))
    one_line(error)


# parquet


@pytest.mark.parametrize("unit_bytes", [1, 2**20])
def test_parquet(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    small_units(monkeypatch, unit_bytes)
    texts = TEXTS * 500
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1100)
    large = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string())})
    pyarrow.parquet.write_table(large, tmp_path / "b.parquet")
    source = open_source(f"parquet:{tmp_path}/*.parquet")
    assert read_all(source) == texts + TEXTS
    assert len(source.units) == (4 if unit_bytes == 1 else 1)


def test_parquet_damaged(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "number": [1, 2]}), file)
    for field, message in [
        ("txt", "no field 'txt'; there are: 'text', 'number'"),
        ("number", "column 'number' holds int64"),
        ("text", "row 1: field 'text' holds NoneType"),
    ]:
        with pytest.raises(DataError, match=f"a.parquet.*{message}") as error:
            read_all(open_source(f"parquet:{file}", field))
        one_line(error)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file") as error:
        read_all(open_source(f"parquet:{file}"))
    one_line(error)


# tfds


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two prepared data sets, written by TFDS in another process, without TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "make.py").write_text("""
import sys
import numpy as np
import tensorflow_datasets as tfds
class Docs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.10")
    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, dl):
        return {"train": self._generate_examples(0, 40), "test": self._generate_examples(40, 50)}
    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, {"text": f"document {i} é", "number": i}
builder = Docs(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
assert "tensorflow" not in sys.modules
""")
    made = subprocess.run(
        [sys.executable, str(folder / "make.py"), str(folder)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    old = folder / "docs" / "1.2.9"
    old.mkdir()
    (old / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    records = folder / "records" / "plain" / "1.0.0"
    records.mkdir(parents=True)
    (records / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("unit_bytes", [300, 2**20])
@pytest.mark.parametrize(
    "spec, numbers",
    [
        ("tfds:docs", range(40)),
        ("tfds:docs:1.2.10", range(40)),
        ("tfds:docs:test", range(40, 50)),
        ("tfds:docs:1.2.10:train+test", range(50)),
        ("tfds:docs:train[:50%]", None),
    ],
)
def test_tfds(
    tfds_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, spec: str, numbers: range | None
) -> None:
    small_units(monkeypatch, unit_bytes)
    monkeypatch.setattr("gpt2_jax.data.tfds_documents.SPAN_BYTES", unit_bytes)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    source = open_source(spec)
    texts = read_all(source)
    if numbers is None:
        assert len(set(texts)) == 20
    else:
        assert sorted(texts) == sorted(f"document {number} é" for number in numbers)
    assert (len(source.units) > 1) == (unit_bytes == 300 and len(texts) > 10)
    assert "tensorflow" not in sys.modules


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "spec, message",
    [
        ("tfds:tiny_shakespeare", "no prepared data set in .*TFDS_DATA_DIR"),
        ("tfds:docs:9.9.9", "no prepared data set"),
        ("tfds:docs:validation", "Unknown split 'validation'"),
        ("tfds:docs:train[:x", "Error parsing split"),
        ("tfds:records", "configurations there: plain"),
        ("tfds:records/plain", 'prepared as tfrecord, .*file_format="array_record"'),
    ],
)
def test_tfds_refused_at_once(tfds_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    start = time.monotonic()
    with pytest.raises(UsageError, match=message) as error:
        read_all(open_source(spec))
    assert time.monotonic() - start < 5
    one_line(error)


def test_tfds_fields(tfds_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    with pytest.raises(DataError, match="no feature 'txt'; there are: 'number', 'text'"):
        read_all(open_source("tfds:docs", "txt"))
    with pytest.raises(DataError, match="example 0: feature 'number' is not text"):
        read_all(open_source("tfds:docs", "number"))


def test_tfds_damaged_info(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "docs" / "1.0.0").mkdir(parents=True)
    (tmp_path / "docs" / "1.0.0" / "dataset_info.json").write_text("[")
    with pytest.raises(DataError, match="not the JSON"):
        open_source("tfds:docs")


# held out


@pytest.mark.parametrize("fraction", [0.1, 0.05, 0.3, 0.5, 0.9, 0.01, 1e-6, 0.999])
@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 100, 1003])
def test_held_out_takes_one_of_each_stratum(fraction: float, count: int) -> None:
    split = HeldOutSplit(fraction, count)
    held = [number for number in range(count) if split.is_held_out(number)]
    assert 1 <= len(held) < count
    assert abs(len(held) - fraction * count) <= 1
    if fraction in (0.1, 0.05, 0.5, 0.01):  # strata of 1/fraction documents, exactly
        size = round(1 / fraction)
        for stratum in range(count // size):
            assert sum(stratum * size <= number < (stratum + 1) * size for number in held) == 1


def test_held_out_positions_vary() -> None:
    split = HeldOutSplit(0.1, 10_000)
    positions = [number % 10 for number in range(10_000) if split.is_held_out(number)]
    assert len(positions) == 1000
    assert all(60 < positions.count(position) < 140 for position in range(10))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_held_out_refuses(fraction: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        held_out.HeldOutSplit(fraction, 10)


@pytest.mark.parametrize(
    "fraction, characters, cut",
    [(0.1, 1_115_394, 1_003_854), (0.9, 10, 1), (0.1, 10, 9), (0.5, 3, 1), (0.7, 10, 3)],
)
def test_cut_of_a_single_document(fraction: float, characters: int, cut: int) -> None:
    assert HeldOutSplit(fraction, 1).cut(characters) == cut
