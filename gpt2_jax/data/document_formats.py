"""How documents lie in files: plain text, Python source, JSON Lines, Parquet.

A format lists the spans of a file (runs of consecutive documents, small enough to be read by one worker) and
reads the documents of a span. Every failure names the file, and the line, row or byte.
"""

import codecs
import dataclasses
import io
import json
import os
import tokenize
from collections.abc import Iterator
from typing import Protocol

from gpt2_jax.errors import DataError

SPAN_BYTES = 64 * 2**20  # of text, at least, in all spans of a large file but the last


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive documents of one file.

    `start` and `stop` are in the format's own unit (byte offsets, row groups, examples); `first` is the
    number of the first line or row, for error messages.
    """

    path: str
    num_documents: int
    num_bytes: int
    start: int = 0
    stop: int = 0
    first: int = 0


class DocumentFormat(Protocol):
    """One way in which documents lie in files; picklable, because workers read."""

    def spans(self, path: str) -> Iterator[Span]:
        """The spans of a file, in order."""
        ...

    def read(self, span: Span) -> Iterator[str]:
        """The documents of a span, in order; DataError for one that cannot be read."""
        ...


@dataclasses.dataclass(frozen=True)
class TextFile:
    """Each file is one document in UTF-8."""

    def spans(self, path: str) -> Iterator[Span]:
        yield Span(path, 1, os.path.getsize(path))

    def read(self, span: Span) -> Iterator[str]:
        yield _decode(_read_bytes(span.path), "utf-8", span.path)


@dataclasses.dataclass(frozen=True)
class PythonFile(TextFile):
    """Each file is one document in the encoding that it declares (PEP 263)."""

    def read(self, span: Span) -> Iterator[str]:
        data = _read_bytes(span.path)
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        except SyntaxError as error:
            raise DataError(f"{span.path}: {error.msg}") from None
        yield _decode(data, encoding, span.path)


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """Each line that is not blank is an object with the text in `text_field`."""

    text_field: str

    def spans(self, path: str) -> Iterator[Span]:
        start = stop = documents = 0
        first = 1
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if stop - start >= SPAN_BYTES and documents:
                    yield Span(path, documents, stop - start, start, stop, first)
                    start, documents, first = stop, 0, number
                stop += len(line)
                documents += not line.isspace()
        if documents:
            yield Span(path, documents, stop - start, start, stop, first)

    def read(self, span: Span) -> Iterator[str]:
        with open(span.path, "rb") as file:
            file.seek(span.start)
            offset = span.start
            for number, line in enumerate(file, start=span.first):
                if offset >= span.stop:
                    break
                if not line.isspace():
                    yield self._text(line, f"{span.path}, line {number}", offset)
                offset += len(line)

    def _text(self, line: bytes, where: str, offset: int) -> str:
        try:
            record = json.loads(_decode(line, "utf-8", where, offset))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON object is expected, this is {type(record).__name__}")
        return _checked(record, self.text_field, where)


@dataclasses.dataclass(frozen=True)
class Parquet:
    """Each row is a document with the text in the column `text_field`."""

    text_field: str

    def spans(self, path: str) -> Iterator[Span]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file that can be read ({_first_line(error)})") from None
        if self.text_field not in schema.names:
            raise DataError(_no_field(path, self.text_field, schema.names))
        kind = schema.field(self.text_field).type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise DataError(f"{path}: column {self.text_field!r} holds {kind}; text (string) is expected")
        row = 0
        for group in range(metadata.num_row_groups):
            rows, size = metadata.row_group(group).num_rows, metadata.row_group(group).total_byte_size
            yield Span(path, rows, size, group, group + 1, row)
            row += rows

    def read(self, span: Span) -> Iterator[str]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        row = span.first
        try:
            with ParquetFile(span.path) as file:
                groups = list(range(span.start, span.stop))
                for batch in file.iter_batches(1024, row_groups=groups, columns=[self.text_field]):
                    for text in batch.column(0).to_pylist():
                        yield _checked({self.text_field: text}, self.text_field, f"{span.path}, row {row}")
                        row += 1
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{span.path}, row {row} or after: {_first_line(error)}") from None


def _checked(record: dict[str, object], field: str, where: str) -> str:
    if field not in record:
        raise DataError(_no_field(where, field, list(record)))
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} holds {type(text).__name__}; text is expected")
    return text


def _no_field(where: str, field: str, names: list[str]) -> str:
    found = ", ".join(map(repr, names[:20])) or "none"
    return f"{where}: no field {field!r}; there are: {found} (set text_field)"


def _read_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _decode(data: bytes, encoding: str, where: str, offset: int = 0) -> str:
    try:
        return codecs.decode(data, encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not {encoding} at byte {offset + error.start} ({error.reason}); "
            "convert the file, or leave it out"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
