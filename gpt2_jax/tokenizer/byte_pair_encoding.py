"""Merges of a byte-level BPE: their text form, their ids, and how they are learned from a corpus.

A merge is a line "left right" of two symbols joined by a space. Symbols are written in GPT-2's alphabet,
which gives each of the 256 bytes a printable character.
"""

import json
from collections.abc import Callable, Iterable

from gpt2_jax.errors import DataError

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into pieces before it merges bytes within each.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable character of each byte, in the order of the ids 0 to 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_SYMBOL = _byte_of_symbol()


def merge_ranks(merges: Iterable[str], where: str) -> dict[bytes, int]:
    """The id of each token: the 256 bytes in GPT-2's order, then merge i as 256 + i.

    Raises DataError, naming `where`, for a line that is no merge of two earlier tokens into a new one.
    """
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_OF_SYMBOL.values())}
    for number, merge in enumerate(merges):
        try:
            left, right = (bytes(BYTE_OF_SYMBOL[symbol] for symbol in part) for part in merge.split(" "))
        except (KeyError, ValueError):
            raise DataError(f"{where}: merge {number} is {merge!r}; expected two symbols and one space") from None
        if left not in ranks or right not in ranks or left + right in ranks:
            raise DataError(f"{where}: merge {number}, {merge!r}, does not make a new token of two earlier ones")
        ranks[left + right] = 256 + number
    return ranks


def learn_merges(num_merges: int, texts: Callable[[], Iterable[str]]) -> tuple[str, ...]:
    """Learn `num_merges` merges from `texts`, with GPT-2's way of cutting text.

    Raises DataError when no pair of tokens is left that occurs twice before there are that many.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        min_frequency=2,
        special_tokens=[],  # end-of-text comes last, after the merges
        initial_alphabet=list(BYTE_OF_SYMBOL),
        show_progress=False,
    )
    learner.train_from_iterator(texts(), trainer)

    merges: dict[str, str] = {}
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        merges.setdefault(left + right, f"{left} {right}")  # a token reached by two merges has the id of the first
    if len(merges) < num_merges:
        remedy = f"ask for bpe:{len(merges)}, or give it more text" if merges else "give it more text"
        raise DataError(f"tokenizer bpe:{num_merges}: the training text yields only {len(merges)} merges; {remedy}")
    return tuple(merges.values())


def merges_to_text(merges: Iterable[str]) -> str:
    """The contents of a `merges.txt`, as other programs read it."""
    return "".join(f"{line}\n" for line in ("#version: 0.2", *merges))


def merge_lines(data: bytes) -> bytes:
    """The merges of a `merges.txt` or `vocab.bpe` without its version line, each ended by a newline."""
    lines = data.replace(b"\r\n", b"\n").rstrip(b"\n").split(b"\n")
    if lines[0].startswith(b"#version"):
        del lines[0]
    return b"".join(line + b"\n" for line in lines)
