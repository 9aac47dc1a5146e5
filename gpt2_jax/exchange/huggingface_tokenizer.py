"""The tokenizer of a Hugging Face GPT-2 folder, which must give the ids that GPT-2's scheme gives to its merges."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_jax.config import TokenizerConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.json_object import read_json
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_merges
from gpt2_jax.tokenizer.byte_pair_encoding import BYTE_OF_SYMBOL, END_OF_TEXT, merge_lines

_GPT2_VOCAB_SIZE = 50257
# Names of the same two files, Hugging Face's and OpenAI's.
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def read_tokenizer(folder: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that the folder describes; without a description GPT-2's, if `vocab_size` is GPT-2's.

    Raises:
      DataError: a file is damaged, or the tokenizer is not byte-level BPE with GPT-2's numbering; names what differs.
    """
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    for vocab_name, merges_name in _PAIRS:
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            return _from_vocab_and_merges(folder / vocab_name, folder / merges_name)
    if _GPT2_VOCAB_SIZE <= vocab_size <= padded_vocab_size(_GPT2_VOCAB_SIZE):
        return make_tokenizer("gpt2")
    raise DataError(
        f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; the vocabulary of {vocab_size} is not GPT-2's"
    )


def _from_tokenizer_json(file: pathlib.Path) -> Tokenizer:
    content = read_json(file)
    model, cutter = content.get("model"), content.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise DataError(f"{file}: model is not of type BPE; only GPT-2's byte-level BPE can be read")
    if not isinstance(cutter, dict) or cutter.get("type") != "ByteLevel":
        raise DataError(f"{file}: pre_tokenizer is not ByteLevel; only GPT-2's byte-level BPE can be read")
    for where, part, field, allowed in (
        ("normalizer", content, "normalizer", (None,)),
        ("pre_tokenizer.add_prefix_space", cutter, "add_prefix_space", (False,)),
        ("pre_tokenizer.use_regex", cutter, "use_regex", (True, None)),
        ("model.dropout", model, "dropout", (None, 0)),
        ("model.continuing_subword_prefix", model, "continuing_subword_prefix", (None, "")),
        ("model.end_of_word_suffix", model, "end_of_word_suffix", (None, "")),
        ("model.byte_fallback", model, "byte_fallback", (None, False)),
        ("model.ignore_merges", model, "ignore_merges", (None, False)),
    ):
        if part.get(field) not in allowed:
            raise DataError(f"{file}: {where} is {part.get(field)!r}, GPT-2's is {allowed[0]!r}; it cannot be read")
    try:
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        ids = {**model["vocab"], **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}
    except (TypeError, KeyError, AttributeError):
        raise DataError(f"{file}: vocab, merges or added_tokens are not as they should be; fetch it again") from None
    return _checked(file, lines, ids)


def _from_vocab_and_merges(vocab_file: pathlib.Path, merges_file: pathlib.Path) -> Tokenizer:
    settings = vocab_file.with_name("tokenizer_config.json")
    if settings.is_file() and read_json(settings).get("add_prefix_space"):
        raise DataError(f"{settings}: add_prefix_space is true, GPT-2's is false; it cannot be read")
    try:
        lines = merge_lines(merges_file.read_bytes()).decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{merges_file}: cannot be read ({error}); fetch it again") from None
    return _checked(vocab_file, lines, read_json(vocab_file))


def _checked(file: pathlib.Path, merges: Sequence[str], ids: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of the merges, if `ids`, token to id, number them as GPT-2 does: bytes, merges, end-of-text."""
    numbered = [*BYTE_OF_SYMBOL, *("".join(merge.split(" ")) for merge in merges), END_OF_TEXT]
    expected = {token: number for number, token in enumerate(numbered)}
    for token in ids:
        if token not in expected:
            raise DataError(f"{file}: token {token!r} is neither a byte, nor made by a merge, nor {END_OF_TEXT}")
    for token, number in expected.items():
        if ids.get(token) != number:
            raise DataError(f"{file}: token {token!r} has id {ids.get(token)}; by GPT-2's numbering it is {number}")
    tokenizer = tokenizer_from_merges(merges)
    try:
        TokenizerConfig(tokenizer.name)
    except UsageError as error:
        raise DataError(f"{file}: {error}") from None
    return tokenizer
