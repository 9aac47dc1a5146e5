"""The tokenizer of a Hugging Face GPT-2 folder: one that gives the ids of GPT-2's scheme, or one that we wrote."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_jax.config import MAX_MERGES
from gpt2_jax.errors import DataError
from gpt2_jax.exchange.json_object import TOKENIZER_BYTES, brief, read_file, read_json, shown
from gpt2_jax.exchange.tokenizer_json import FINAL_SIGMA, NORMAL_FORMS
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_characters, tokenizer_from_merges
from gpt2_jax.tokenizer.byte_pair_encoding import BYTE_OF_SYMBOL, END_OF_TEXT, merge_lines

_GPT2_VOCAB_SIZE = 50257
# Names of the same two files, Hugging Face's and OpenAI's.
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_BYTES = {**BYTE_OF_SYMBOL, END_OF_TEXT: 256}  # the ids of the tokenizer "bytes"
_UNREADABLE = "it cannot be read"


def read_tokenizer(folder: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that the folder describes; without a description GPT-2's, if `vocab_size` is GPT-2's.

    Raises:
      DataError: a file is damaged, the tokenizer is not byte-level BPE with GPT-2's numbering, or it has more ids than
        the model's `vocab_size`; names what differs.
    """
    tokenizer = _described(folder, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, config.json vocab_size {vocab_size}; "
            "the files do not belong together"
        )
    return tokenizer


def _described(folder: pathlib.Path, vocab_size: int) -> Tokenizer:
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
    content = read_json(file, TOKENIZER_BYTES)
    model = content.get("model")
    # OpenAI's own file is from before models named their type.
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise DataError(f"{file}: model is not of type BPE; only GPT-2's byte-level BPE can be read")
    for field, allowed in (
        ("dropout", (None, 0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        ("byte_fallback", (None, False)),
        ("ignore_merges", (None, False)),
    ):
        if model.get(field) not in allowed:
            found = shown(model.get(field))
            raise DataError(f"{file}: model.{field} is {found}, GPT-2's is {allowed[0]!r}; {_UNREADABLE}")
    if not _adds_nothing(content.get("post_processor")):
        raise DataError(f"{file}: post_processor adds tokens to each text, GPT-2's adds none; {_UNREADABLE}")
    normalization, lowercase = _normalization(file, content.get("normalizer"))
    try:
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in _list(model["merges"])]
        added = _list(content.get("added_tokens") or [])
        ids = _numbers({**model["vocab"], **{token["content"]: token["id"] for token in added}})
        special = {token["content"] for token in added if token.get("special") is True}
    except (TypeError, KeyError):
        raise DataError(f"{file}: vocab, merges or added_tokens are not as they should be; fetch it again") from None
    cutter = content.get("pre_tokenizer")
    if cutter is None and not lines:
        return _characters(file, ids, normalization, lowercase)
    if not isinstance(cutter, dict) or cutter.get("type") != "ByteLevel":
        raise DataError(f"{file}: pre_tokenizer is not ByteLevel; only GPT-2's byte-level BPE can be read")
    if cutter.get("add_prefix_space") is not False:
        raise DataError(
            f"{file}: pre_tokenizer.add_prefix_space is {shown(cutter.get('add_prefix_space'))}, GPT-2's is False; "
            f"{_UNREADABLE}"
        )
    if not lines and ids == _BYTES:  # how the text is cut before makes no difference
        return make_tokenizer("bytes", normalization=normalization, lowercase=lowercase)
    if cutter.get("use_regex") not in (True, None):
        found = shown(cutter["use_regex"])
        raise DataError(f"{file}: pre_tokenizer.use_regex is {found}, GPT-2's is True; {_UNREADABLE}")
    # Such as padding, added for fine-tuning. Text never becomes one here, so they need no tokenizer.
    ids = {token: number for token, number in ids.items() if token not in special or number <= 256 + len(lines)}
    return _checked(file, lines, ids, normalization, lowercase)


def _adds_nothing(post_processor: Any) -> bool:
    """Whether the ids of a text stay as they are: of the known kinds only a template adds some."""
    match post_processor:
        case None | {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
            return True
        case {"type": "Sequence", "processors": list(parts)}:
            return all(isinstance(part, dict) and _adds_nothing(part) for part in parts)
    return False


def _normalization(file: pathlib.Path, normalizer: Any) -> tuple[str, bool]:
    """Our normal form and whether text is lowered, if the normalizer is one of ours."""
    steps = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    if normalizer is None:
        return "none", False
    for form, name in {"none": None, **NORMAL_FORMS}.items():
        for lowercase in (False, True):
            ours: list[Any] = [{"type": name}] if name else []
            ours += [FINAL_SIGMA, {"type": "Lowercase"}] if lowercase else []
            if steps == ours:
                return form, lowercase
    raise DataError(f"{file}: normalizer is {shown(normalizer)}, GPT-2's is None; {_UNREADABLE}")


def _characters(file: pathlib.Path, ids: Mapping[str, int], normalization: str, lowercase: bool) -> Tokenizer:
    characters = "".join(ids)
    if len(characters) != len(ids) or list(ids.values()) != list(range(len(ids))):
        raise DataError(f"{file}: without merges and pre_tokenizer, the vocabulary is single characters from 0 up")
    try:
        return tokenizer_from_characters(characters, normalization, lowercase)
    except (DataError, UnicodeEncodeError) as error:  # JSON can spell half of a surrogate pair
        raise DataError(f"{file}: {brief(error)}") from None


def _from_vocab_and_merges(vocab_file: pathlib.Path, merges_file: pathlib.Path) -> Tokenizer:
    settings = vocab_file.with_name("tokenizer_config.json")
    for field in ("add_prefix_space", "add_bos_token"):
        value = read_json(settings).get(field) if settings.is_file() else None
        if value not in (None, False):
            raise DataError(f"{settings}: {field} is {shown(value)}, GPT-2's is False; {_UNREADABLE}")
    content = merge_lines(read_file(merges_file, TOKENIZER_BYTES))
    try:
        lines = content.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{merges_file}: not UTF-8 ({error}); fetch it again") from None
    try:
        ids = _numbers(read_json(vocab_file, TOKENIZER_BYTES))
    except TypeError:
        raise DataError(f"{vocab_file}: not a number for each token; fetch it again") from None
    return _checked(vocab_file, lines, ids)


def _checked(
    file: pathlib.Path,
    merges: Sequence[str],
    ids: Mapping[str, int],
    normalization: str = "none",
    lowercase: bool = False,
) -> Tokenizer:
    """The tokenizer of the merges, if `ids`, token to id, number them as GPT-2 does: bytes, merges, end-of-text."""
    if len(merges) > MAX_MERGES:
        raise DataError(f"{file}: {len(merges):,} merges; at most {MAX_MERGES:,} can be read")
    numbered = [*BYTE_OF_SYMBOL, *("".join(merge.split(" ")) for merge in merges), END_OF_TEXT]
    expected = {token: number for number, token in enumerate(numbered)}
    for token in ids:
        if token not in expected:
            raise DataError(f"{file}: token {shown(token)} is neither a byte, nor made by a merge, nor {END_OF_TEXT}")
    for token, number in expected.items():
        if ids.get(token) != number:
            raise DataError(
                f"{file}: token {shown(token)} has id {ids.get(token)}; by GPT-2's numbering it is {number}"
            )
    try:
        tokenizer = tokenizer_from_merges(merges, normalization, lowercase)
    except (DataError, UnicodeEncodeError) as error:
        raise DataError(f"{file}: {brief(error)}") from None
    if tokenizer.name != "gpt2":
        _check_merges_make_their_tokens(file, merges, expected)
    return tokenizer


def _check_merges_make_their_tokens(file: pathlib.Path, merges: Sequence[str], ids: dict[str, int]) -> None:
    """Raises DataError unless the bytes of each token become that token by the merges, as with learned ones.

    Two pieces are joined here whenever together they are a token, by Hugging Face's library only where a merge is of
    just these two. Where merges make their tokens, that is the same.
    """
    from tokenizers.models import BPE  # heavy, and not needed for GPT-2's own

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    model = BPE(vocab=ids, merges=pairs)
    for pair in pairs:
        token = "".join(pair)
        if len(model.tokenize(token)) != 1:
            raise DataError(f"{file}: the merges do not make the token {shown(token)} of its bytes; {_UNREADABLE}")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _numbers(ids: dict[str, Any]) -> dict[str, int]:
    if not all(type(number) is int for number in ids.values()):  # True would do for 1
        raise TypeError
    return ids
