"""Our tokenizers in the files of Hugging Face's tokenizers: tokenizer.json, and GPT-2's own pair for plain BPE.

A byte-level BPE is what GPT-2's is. `bytes` is one without merges, whose 256 symbols have the ids of their bytes, and
`chars` a BPE without merges over characters. Normal forms and lower case are normalizers there.
"""

import json
import pathlib
from typing import Any

from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer.byte_pair_encoding import BYTE_OF_SYMBOL, END_OF_TEXT, merges_to_text

# Python lowers a capital sigma to a final one where a cased letter stands before it and none after it, apart from
# case-ignorable characters between; tokenizers lowers each character by itself. What \K leaves out of the match could
# be a look-behind, but one of any length takes quadratic time.
_CASED = r"(?!\p{Case_Ignorable})\p{Cased}"
_SIGMA = rf"{_CASED}\p{{Case_Ignorable}}*+\K\u03a3(?!\p{{Case_Ignorable}}*+{_CASED})"
FINAL_SIGMA = {"type": "Replace", "pattern": {"Regex": _SIGMA}, "content": "\u03c2"}
# tokenizers' are those of Unicode 9.0: a character newer than that keeps its form, and its place among other marks.
NORMAL_FORMS = {"nfc": "NFC", "nfkc": "NFKC"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, context: int) -> None:
    """Writes the tokenizer of a model with `context` positions into `folder`, which exists."""
    content = tokenizer_json(tokenizer)
    _write_json(folder / "tokenizer.json", content)
    plain = bool(tokenizer.merges) and content["normalizer"] is None
    if plain:
        vocab = {**content["model"]["vocab"], END_OF_TEXT: tokenizer.end_of_text}
        _write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text(merges_to_text(tokenizer.merges), encoding="utf-8", newline="\n")
    settings: dict[str, Any] = {
        # The first would make its tokenizer from vocab.json and merges.txt.
        "tokenizer_class": "GPT2Tokenizer" if plain else "PreTrainedTokenizerFast",
        "model_max_length": context,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.end_of_text is not None:
        settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    _write_json(folder / "tokenizer_config.json", settings)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    pre_tokenizer: dict[str, Any] | None = BYTE_LEVEL
    decoder: dict[str, Any] = BYTE_LEVEL
    if tokenizer.characters:
        vocab = {character: number for number, character in enumerate(tokenizer.characters)}
        pre_tokenizer, decoder = None, {"type": "Fuse"}
    elif tokenizer.merges:
        tokens = [*BYTE_OF_SYMBOL, *(merge.replace(" ", "") for merge in tokenizer.merges)]
        vocab = {token: number for number, token in enumerate(tokens)}
    else:
        vocab = dict(sorted(BYTE_OF_SYMBOL.items(), key=lambda item: item[1]))
        pre_tokenizer = {**BYTE_LEVEL, "use_regex": False}
    end = {"content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": []
        if tokenizer.end_of_text is None
        else [{"id": tokenizer.end_of_text, **end, "special": True}],
        "normalizer": _normalizer(tokenizer),
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [merge.split(" ") for merge in tokenizer.merges],
        },
    }


def _normalizer(tokenizer: Tokenizer) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if tokenizer.normalization != "none":
        steps.append({"type": NORMAL_FORMS[tokenizer.normalization]})
    if tokenizer.lowercase:
        steps += [FINAL_SIGMA, {"type": "Lowercase"}]
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _write_json(file: pathlib.Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")
