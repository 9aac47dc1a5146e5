"""Continues a prompt with the GPT-2 in this folder, greedily, and prints what is new.

    python run.py --prompt "Once upon a time" --max_new_tokens 20
    python run.py --ids 1,2,3          (ids in, ids out)

Needs jax, numpy and flatbuffers. `model.json` says how the programs are called, for batches and other samplers.
"""

import argparse
import itertools
import json
import pathlib
import re
import sys
import unicodedata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

FOLDER = pathlib.Path(__file__).resolve().parent
# GPT-2's pattern for a text of ASCII alone, which `ascii_class` makes of any text.
WORD = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    re.ASCII,
)
WHITE_SPACE = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def ascii_class(character: str) -> str:
    """A character that WORD treats as GPT-2's pattern treats this one; "a" stands in no contraction."""
    if character.isascii():
        return character
    if character in WHITE_SPACE:
        return "\t"
    return {"L": "a", "N": "0"}.get(unicodedata.category(character)[0], "!")


def merged(pieces: list[bytes], ids: dict[bytes, int]) -> list[bytes]:
    """The pieces of a word after joining, again and again, the first pair whose token has the lowest id."""
    while True:
        pairs = (ids.get(left + right, len(ids)) for left, right in itertools.pairwise(pieces))
        lowest, at = min(((rank, at) for at, rank in enumerate(pairs)), default=(len(ids), 0))
        if lowest == len(ids):
            return pieces
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def encode(text: str, tokenizer: dict[str, Any]) -> list[int]:
    """The ids of a text; ValueError for a character that the tokenizer does not have."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if tokenizer["normalization"] != "none":
        text = unicodedata.normalize(tokenizer["normalization"].upper(), text)
    text = text.lower() if tokenizer["lowercase"] else text
    # Without end-of-text: in a prompt it is plain text.
    tokens = (pair for pair in enumerate(tokenizer["tokens"]) if pair[0] != tokenizer["end_of_text"])
    ids = {bytes.fromhex(token): number for number, token in tokens}
    if tokenizer["kind"] == "bpe":
        words = [text[word.start() : word.end()] for word in WORD.finditer("".join(map(ascii_class, text)))]
        pieces = [piece for word in words for piece in merged([bytes([byte]) for byte in word.encode()], ids)]
    else:
        pieces = [c.encode() for c in text] if tokenizer["kind"] == "chars" else [bytes([b]) for b in text.encode()]
    for piece in pieces:
        if piece not in ids:
            raise ValueError(f"character {piece.decode()!r} is not among the {len(ids)} of the tokenizer")
    return [ids[piece] for piece in pieces]


def generate(prompt: list[int], steps: int, model: dict[str, Any]) -> list[int]:
    """The most likely tokens after a prompt: `steps` of them, or up to end-of-text."""
    prefill, decode = (
        jax.jit(export.deserialize(bytearray((FOLDER / f"{name}.stablehlo").read_bytes())).call)
        for name in ("prefill", "decode")
    )
    with np.load(FOLDER / "weights.npz", allow_pickle=False) as stored:
        weights = tuple(jnp.asarray(stored[name]) for name in model["weights"])
    logits, *cache = prefill(weights, np.array([prompt], np.int32), np.array([len(prompt)], np.int32))
    cache = [jnp.pad(stored, [(0, 0)] * 3 + [(0, steps - 1), (0, 0)]) for stored in cache]  # a slot for each new token
    new: list[int] = []
    while True:
        new.append(int(np.argmax(np.asarray(logits)[0, : model["tokenizer_vocab_size"]])))
        if len(new) == steps or new[-1] == model["end_of_text"]:
            return new
        length = len(prompt) + len(new) - 1
        logits, *cache = decode(weights, np.array(new[-1:], np.int32), np.array([length], np.int32), *cache)


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a prompt with the GPT-2 in this folder.")
    parser.add_argument("--prompt", default="", help="text; empty: end-of-text")
    parser.add_argument("--ids", default="", help="token ids, as in 1,2,3: in place of --prompt; prints ids")
    parser.add_argument("--max_new_tokens", type=int, default=20, help="1 or more")
    args = parser.parse_args()
    model = json.loads((FOLDER / "model.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((FOLDER / "tokens.json").read_text(encoding="utf-8"))
    end, context, vocab_size = model["end_of_text"], model["context"], model["tokenizer_vocab_size"]
    try:
        if args.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens={args.max_new_tokens}; allowed: 1 or more")
        if args.ids and not re.fullmatch("[0-9]+(,[0-9]+)*", args.ids):
            raise ValueError(f"--ids={args.ids!r}; allowed: numbers with commas between them, as in 1,2,3")
        prompt = [int(number) for number in args.ids.split(",")] if args.ids else encode(args.prompt, tokenizer)
        prompt = prompt or [number for number in (end,) if number is not None]
        if not 1 <= len(prompt) <= context:
            raise ValueError(f"the prompt has {len(prompt)} tokens; allowed: 1 to {context}")
        if max(prompt) >= vocab_size:
            raise ValueError(f"--ids: {max(prompt)} is outside the vocabulary, 0 to {vocab_size - 1}")
    except ValueError as error:
        parser.exit(2, f"run.py: {error}\n")
    # The last token needs no position: it is not read.
    new = generate(prompt, min(args.max_new_tokens, context - len(prompt) + 1), model)
    text = b"".join(bytes.fromhex(tokenizer["tokens"][number]) for number in new if number != end)
    sys.stdout.write((",".join(map(str, new)) if args.ids else text.decode(errors="replace")) + "\n")


if __name__ == "__main__":
    main()
