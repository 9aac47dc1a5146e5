"""Where documents come from: the files that a source names, in a fixed order, cut into units of work."""

import dataclasses
import difflib
import functools
import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator

from gpt2_jax.data.document_formats import (
    SPAN_BYTES,
    DocumentFormat,
    JsonLines,
    Parquet,
    PythonFile,
    Span,
    TextFile,
)
from gpt2_jax.data.tfds_documents import find_tfds
from gpt2_jax.errors import UsageError

KINDS = ("stdlib", "text:GLOB", "jsonl:GLOB", "parquet:GLOB", "tfds:NAME", "nanogpt:DIR", "tokens:DIR")
_NOT_IN_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class WorkUnit:
    """Consecutive documents, from number `first_document` of the source on, that one worker reads."""

    index: int
    first_document: int
    num_documents: int
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class DocumentSource:
    """Documents in a fixed order. Make one with `open_source`.

    `signature` (sha256, hexadecimal) changes with the names, sizes and times of the files; for stdlib, with the
    interpreter's version and the names and sizes.
    """

    spec: str
    signature: str
    format: DocumentFormat
    paths: tuple[str, ...]

    @functools.cached_property
    def units(self) -> tuple[WorkUnit, ...]:
        """All documents, in runs of about 64 MiB of text. The files are scanned, not decoded."""
        units: list[WorkUnit] = []
        spans: list[Span] = []
        first = documents = size = 0
        for path in self.paths:
            for span in self.format.spans(path):
                spans.append(span)
                documents += span.num_documents
                size += span.num_bytes
                if size >= SPAN_BYTES:
                    units.append(WorkUnit(len(units), first, documents, tuple(spans)))
                    first += documents
                    spans, documents, size = [], 0, 0
        if documents:
            units.append(WorkUnit(len(units), first, documents, tuple(spans)))
        return tuple(units)

    @property
    def num_documents(self) -> int:
        """Documents in the source, empty ones included."""
        return sum(unit.num_documents for unit in self.units)

    def read(self, unit: WorkUnit) -> Iterator[str]:
        """The documents of a unit, in order; DataError, naming file and place, for one that is damaged."""
        return read_unit(self.format, unit)


def read_unit(document_format: DocumentFormat, unit: WorkUnit) -> Iterator[str]:
    """The documents of a unit, in order."""
    for span in unit.spans:
        yield from document_format.read(span)


def open_source(spec: str, text_field: str = "text") -> DocumentSource:
    """The documents that `spec` names.

    stdlib: each Python file of the running interpreter's own library. text:GLOB: each file. jsonl:GLOB,
    parquet:GLOB: each line or row, with the text in `text_field`. tfds:NAME: each example of a prepared data
    set. Raises UsageError for a spec that names nothing.
    """
    kind, colon, argument = spec.partition(":")
    if spec == "stdlib":
        return _stdlib()
    if kind not in ("text", "jsonl", "parquet", "tfds") or not colon:
        near = difflib.get_close_matches(kind, [known.partition(":")[0] for known in KINDS], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"source {spec!r} is unknown; allowed: {', '.join(KINDS)}{hint}")
    if not argument:
        raise UsageError(f"source {spec!r}: nothing is named after the colon")
    if kind == "tfds":
        examples, folder = find_tfds(argument, text_field)
        signature = _signature(spec, text_field, _stamps(sorted(glob.glob(os.path.join(folder, "*")))))
        return DocumentSource(spec, signature, examples, (folder,))
    document_format: DocumentFormat
    if kind == "text":
        document_format = TextFile()
    else:
        document_format = JsonLines(text_field) if kind == "jsonl" else Parquet(text_field)
    paths = _matching_files(spec, argument)
    return DocumentSource(spec, _signature(spec, text_field, _stamps(paths)), document_format, tuple(paths))


def _stdlib() -> DocumentSource:
    root = sysconfig.get_path("stdlib")
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_IN_STDLIB]
        relative = os.path.relpath(folder, root)
        names += [os.path.normpath(os.path.join(relative, name)) for name in files if name.endswith(".py")]
    names = sorted((name for name in names if os.path.isfile(os.path.join(root, name))), key=_posix)
    paths = [os.path.join(root, name) for name in names]
    # No times: the same interpreter installed anew has the same library.
    sizes = [(_posix(name), os.path.getsize(path)) for name, path in zip(names, paths, strict=True)]
    signature = _signature("stdlib", "", [platform.python_version(), sizes])
    return DocumentSource("stdlib", signature, PythonFile(), tuple(paths))


def _posix(path: str) -> str:
    return path.replace(os.sep, "/")


def _matching_files(spec: str, pattern: str) -> list[str]:
    pattern = os.path.abspath(os.path.expanduser(pattern))
    # A file whose own name has brackets or stars in it is meant literally.
    matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted(path for path in matches if os.path.isfile(path))
    if not paths:
        raise UsageError(f"source {spec!r}: no file matches {pattern}")
    return paths


def _stamps(paths: list[str]) -> list[tuple[str, int, int]]:
    statuses = [(path, os.stat(path)) for path in paths]
    return [(path, status.st_size, status.st_mtime_ns) for path, status in statuses]


def _signature(spec: str, text_field: str, files: list) -> str:
    return hashlib.sha256(json.dumps([spec, text_field, files]).encode()).hexdigest()
