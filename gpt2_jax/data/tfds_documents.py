"""Documents of a data set that TensorFlow Datasets has prepared as array_record, read without TensorFlow.

Nothing here touches the network: only a folder that is already there is read.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator

from gpt2_jax.data.document_formats import SPAN_BYTES, Span
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.user_paths import expand_user

_NAME = re.compile(
    r"(?P<name>\w+)(/(?P<config>[^:/]+))?(:(?P<version>\d+\.\d+\.\d+))?(:(?P<split>[a-zA-Z].*))?", re.ASCII
)


@dataclasses.dataclass(frozen=True)
class TfdsExamples:
    """Each example of `split` is a document with the text in the feature `text_field`."""

    split: str
    text_field: str

    def spans(self, path: str) -> Iterator[Span]:
        source, num_bytes = self._open(path)
        step = max(1, len(source) * SPAN_BYTES // max(1, num_bytes))
        for start in range(0, len(source), step):
            stop = min(start + step, len(source))
            yield Span(path, stop - start, num_bytes * (stop - start) // len(source), start, stop)

    def read(self, span: Span) -> Iterator[str]:
        source, _ = self._open(span.path)
        for index in range(span.start, span.stop):
            text = source[index][self.text_field]
            where = f"{span.path}, {self.split}, example {index}"
            if not isinstance(text, bytes):
                raise DataError(f"{where}: feature {self.text_field!r} is not text")
            try:
                yield text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not utf-8 at byte {error.start} ({error.reason})") from None

    def _open(self, path: str):  # type: ignore[no-untyped-def]  # a sequence of dictionaries, of tfds's own type
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(path)
        if self.text_field not in builder.info.features:
            names = ", ".join(map(repr, sorted(builder.info.features)))
            raise DataError(f"{path}: no feature {self.text_field!r}; there are: {names} (set text_field)")
        try:
            info = builder.info.splits[self.split]
        except ValueError as error:
            raise UsageError(f"{path}: {str(error).partition(chr(10))[0]}") from None
        whole = builder.info.splits[re.split(r"\W", self.split)[0]]
        num_bytes = int(whole.num_bytes * info.num_examples / max(1, whole.num_examples))
        return builder.as_data_source(self.split), num_bytes


def find_tfds(name: str, text_field: str) -> tuple[TfdsExamples, str]:
    """The format and the folder of `NAME[/CONFIG][:VERSION][:SPLIT]` below TFDS_DATA_DIR; the split is train
    unless named.

    Raises UsageError if there is no such prepared data set.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise UsageError(f"tfds:{name}: write tfds:NAME, NAME/CONFIG, NAME:VERSION or NAME:SPLIT")
    data_dir = expand_user(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    folder = data_dir / parts["name"]
    if parts["config"]:
        folder /= parts["config"]
    versions = {_version(file.parent.name): file.parent for file in folder.glob("*.*.*/dataset_info.json")}
    wanted = _version(parts["version"]) if parts["version"] else max(versions, default=None)
    if wanted not in versions:
        configs = sorted({file.parent.parent.name for file in folder.glob("*/*.*.*/dataset_info.json")})
        found = f"; configurations there: {', '.join(configs)} (write NAME/CONFIG)" if configs else ""
        raise UsageError(
            f"tfds:{name}: no prepared data set in {folder}{found}; prepare it "
            'there with tensorflow_datasets and file_format="array_record", '
            "or set TFDS_DATA_DIR to the folder that has it"
        )
    path = versions[wanted]
    try:
        file_format = json.loads((path / "dataset_info.json").read_text(encoding="utf-8")).get("fileFormat")
    except (ValueError, AttributeError):
        raise DataError(f"{path / 'dataset_info.json'}: not the JSON of a prepared data set") from None
    if file_format != "array_record":
        raise UsageError(
            f"tfds:{name}: prepared as {file_format or 'tfrecord'}, which needs TensorFlow to read; "
            'prepare it again with file_format="array_record"'
        )
    return TfdsExamples(parts["split"] or "train", text_field), str(path)


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else -1 for part in name.split("."))
