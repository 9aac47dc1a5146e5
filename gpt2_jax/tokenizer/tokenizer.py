"""A tokenizer: its options, its vocabulary, and how it is made, saved and loaded."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.config import TokenizerConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.tokenizer.byte_pair_encoding import learn_merges, merge_lines, merges_to_text
from gpt2_jax.tokenizer.gpt2_merges import are_gpt2_merges, gpt2_merges
from gpt2_jax.tokenizer.token_codecs import ByteCodec, BytePairCodec, CharacterCodec, Codec
from gpt2_jax.user_paths import expand_user

_FILE = "gpt2_jax_tokenizer.json"
_MERGES_FILE = "merges.txt"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Make one with `make_tokenizer` or `load_tokenizer`.

    `name` is "gpt2", "bytes", "chars" or "bpe:N"; `normalization` and `lowercase` are applied before
    encoding.
    """

    name: str
    normalization: str
    lowercase: bool
    _codec: Codec = dataclasses.field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-text included."""
        return self._codec.vocab_size

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document, or None for a tokenizer of characters."""
        return self._codec.end_of_text

    @property
    def merges(self) -> tuple[str, ...]:
        """The merges as lines "left right" in GPT-2's byte alphabet; empty for bytes and chars."""
        return self._codec.merges if isinstance(self._codec, BytePairCodec) else ()

    @property
    def characters(self) -> str:
        """The characters in the order of their ids; empty for the other tokenizers."""
        return self._codec.content["characters"] if isinstance(self._codec, CharacterCodec) else ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, over everything that decides the ids."""
        content = {
            "kind": self.name.partition(":")[0],
            "normalization": self.normalization,
            "lowercase": self.lowercase,
            "end_of_text": self.end_of_text,
            **self._codec.content,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32 [number of tokens]; "<|endoftext|>" in it is plain text.

        Raises DataError for a character that a tokenizer of characters does not have.
        """
        return self._codec.encode(_normalize(text, self.normalization, self.lowercase))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes of `ids`, which may begin or end within a character.

        Raises DataError for an id outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return b""
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise DataError(f"token ids must be a row of integers, not {array.dtype} of shape {array.shape}")
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():
            raise DataError(
                f"token id {array[outside][0]} is outside the vocabulary of {self.name}, 0 to {self.vocab_size - 1}"
            )
        return self._codec.decode_bytes(array.astype(np.int64))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises like `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write all that `load_tokenizer` needs into `folder`, which is made if it does not exist."""
        root = pathlib.Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        if self.merges:
            write_text_atomically(root / _MERGES_FILE, merges_to_text(self.merges))
        settings = {
            "format": _FORMAT,
            "name": self.name,
            "normalization": self.normalization,
            "lowercase": self.lowercase,
            "fingerprint": self.fingerprint,
        }
        if isinstance(self._codec, CharacterCodec):
            settings |= self._codec.content
        # Last, because its presence says that the folder has a tokenizer.
        write_text_atomically(root / _FILE, json.dumps(settings, indent=1) + "\n")


def make_tokenizer(
    name: str,
    *,
    path: str = "",
    normalization: str = "none",
    lowercase: bool = False,
    texts: Callable[[], Iterable[str]] | None = None,
) -> Tokenizer:
    """Make the tokenizer `name`: "gpt2", "bytes", "chars" or "bpe:N".

    `path` is a folder with GPT-2's vocab.bpe or merges.txt; for chars and bpe:N, a folder where one was saved,
    which is then loaded. Without that they learn from the corpus that `texts` gives. Raises UsageError for
    settings that cannot be used, DataError for files or a corpus that cannot.
    """
    TokenizerConfig(name, path, normalization, lowercase)  # refuses what cannot be used
    kind = name.partition(":")[0]
    codec: Codec
    if kind == "gpt2":
        codec = BytePairCodec(name, gpt2_merges(path))
    elif kind == "bytes":
        codec = ByteCodec()
    elif path:
        return _saved_tokenizer(path, name, normalization, lowercase)
    elif texts is None:
        raise UsageError(f"tokenizer {name} is learned from a corpus, and none is given")
    else:

        def normalized_texts() -> Iterable[str]:
            return (_normalize(text, normalization, lowercase) for text in texts())

        if kind == "chars":
            characters: set[str] = set()
            for text in normalized_texts():
                characters.update(text)
            if not characters:
                raise DataError("tokenizer chars: the corpus has no characters")
            codec = CharacterCodec("".join(sorted(characters)))
        else:
            codec = BytePairCodec(name, learn_merges(int(name.partition(":")[2]), normalized_texts))
    return Tokenizer(name, normalization, lowercase, codec)


def tokenizer_from_merges(merges: Sequence[str], normalization: str = "none", lowercase: bool = False) -> Tokenizer:
    """The byte-level BPE of these merges, lines "left right" in GPT-2's byte alphabet: "gpt2" if they are GPT-2's.

    Raises DataError for a line that is no merge of two earlier tokens into a new one.
    """
    plain = normalization == "none" and not lowercase
    name = "gpt2" if plain and are_gpt2_merges(merges) else f"bpe:{len(merges)}"
    return Tokenizer(name, normalization, lowercase, BytePairCodec(name, tuple(merges)))


def tokenizer_from_characters(characters: str, normalization: str = "none", lowercase: bool = False) -> Tokenizer:
    """The tokenizer "chars" of these characters. Raises DataError unless they are there, sorted and different."""
    if not characters or list(characters) != sorted(set(characters)):
        raise DataError("the characters of a tokenizer are one or more, sorted, each once")
    return Tokenizer("chars", normalization, lowercase, CharacterCodec(characters))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`; DataError if it is missing or was changed."""
    path = pathlib.Path(folder, _FILE)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["format"] != _FORMAT:
            raise DataError(f"{path}: format {settings['format']!r}, but this version reads format {_FORMAT}")
        TokenizerConfig(settings["name"], "", settings["normalization"], settings["lowercase"])
        kind = settings["name"].partition(":")[0]
        codec: Codec
        if kind == "bytes":
            codec = ByteCodec()
        elif kind == "chars":
            codec = CharacterCodec(settings["characters"])
        else:
            lines = merge_lines(path.with_name(_MERGES_FILE).read_bytes()).decode("utf-8")
            codec = BytePairCodec(settings["name"], tuple(lines.removesuffix("\n").split("\n")))
        tokenizer = Tokenizer(settings["name"], settings["normalization"], settings["lowercase"], codec)
        expected = settings["fingerprint"]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: missing; the folder holds no complete tokenizer") from None
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise DataError(f"{path}: not a tokenizer file, or {_MERGES_FILE} beside it is damaged ({error})") from None
    if tokenizer.fingerprint != expected:
        raise DataError(
            f"{folder}: the tokenizer was changed: its fingerprint is {tokenizer.fingerprint}, saved as {expected}"
        )
    return tokenizer


def _saved_tokenizer(path: str, name: str, normalization: str, lowercase: bool) -> Tokenizer:
    if not expand_user(path).joinpath(_FILE).is_file():
        raise UsageError(f"tokenizer.path={path!r}: no saved tokenizer ({_FILE}) there; name a run's tokenizer folder")
    tokenizer = load_tokenizer(expand_user(path))
    wanted = {"name": name, "normalization": normalization, "lowercase": lowercase}
    for key, value in wanted.items():
        found = getattr(tokenizer, key)
        if found != value:
            raise UsageError(
                f"tokenizer.path={path!r} holds a tokenizer of tokenizer.{key}={found}, not {value}; "
                f"give --config.tokenizer.{key}={found}"
            )
    return tokenizer


def _normalize(text: str, normalization: str, lowercase: bool) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell, has no UTF-8 form
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if normalization == "nfc":
        text = unicodedata.normalize("NFC", text)
    elif normalization == "nfkc":
        text = unicodedata.normalize("NFKC", text)
    return text.lower() if lowercase else text
