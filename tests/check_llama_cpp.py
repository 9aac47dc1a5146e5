"""Whether llama.cpp takes our GGUF files: a script, since llama-cpp-python compiles for a quarter of an hour.

    pip install -e '.[gguf]' llama-cpp-python
    python tests/check_llama_cpp.py --model=runs/quickstart [--golden=bpe_golden.jsonl --vocabulary=FOLDER]

Of each type of file it shows that llama.cpp loads it, gives our ids, and continues prompts greedily as we do with the
weights of the file; where it first differs, how far apart our two logits are. Ends with 1 where a file fails. `golden`
has lines {"text": ..., "ids": [...]} of GPT-2's tokenizer, whose vocab.bpe is in `vocabulary`.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from llama_cpp import Llama

from gpt2_jax.config import ModelConfig
from gpt2_jax.decoding.generate import Generator
from gpt2_jax.decoding.settings import Sampling, Stopping
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.gguf_file import GGUF_TYPES, read_gguf, write_gguf
from gpt2_jax.model.gpt2 import GPT2, init_params
from gpt2_jax.run.bundle import load_bundle
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer

F32 = 0  # ggml's number of float32, for the cache
# Logits that are closer may change places: sums in another order, and for q8_0 activations of 8 bits.
UNDECIDED = {"float32": 1e-3, "float16": 0.05, "q8_0": 0.3}
PROMPTS = ("import os\n", "def main(", "class Reader:\n    ", "The ", "for name in ")
NEW_TOKENS = 64


def opened(file: pathlib.Path, context: int) -> Llama:
    return Llama(str(file), n_ctx=context, type_k=F32, type_v=F32, logits_all=True, verbose=False)


def theirs(model: Llama, prompt: list[int], new: int) -> list[int]:
    model.reset()
    model.eval(prompt)
    ids: list[int] = []
    while len(ids) < new:
        ids.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(ids[-1:])
    return ids


def check_texts(bundle: Bundle, dtype: str, folder: pathlib.Path) -> bool:
    """Greedy continuations of the prompts."""
    file = folder / f"{dtype}.gguf"
    write_gguf(file, bundle, dtype)
    config, params = read_gguf(file)
    params = jax.device_put(params)
    generator = Generator(config, params, bundle.tokenizer)
    model = opened(file, config.n_positions)
    good, equal, total = True, 0, 0
    for prompt in PROMPTS:
        ids = bundle.tokenizer.encode(prompt).tolist()
        good &= check_ids(model, bundle.tokenizer, prompt, ids)
        new = min(NEW_TOKENS, config.n_positions - len(ids) - 1)
        (ours,) = generator.generate([ids], sampling=Sampling(temperature=0), stopping=Stopping(max_new_tokens=new))
        other = theirs(model, ids, len(ours.ids))
        same = next((at for at, pair in enumerate(zip(ours.ids, other, strict=True)) if len(set(pair)) > 1), None)
        equal += len(other) if same is None else same
        total += len(other)
        if same is not None:
            read = np.array([[*ids, *ours.ids[:same]]], np.int32)
            logits = np.asarray(GPT2(config).apply({"params": params}, read))[0, -1]
            gap = float(logits[ours.ids[same]] - logits[other[same]])
            good &= gap < UNDECIDED[dtype]
            print(f"  {prompt!r}: differs from token {same} on, where our two logits are {gap:.2g} apart")
    print(f"{dtype}: {file.stat().st_size:,} bytes; {equal} of {total} greedy tokens up to the first difference")
    return good


def check_ids(model: Llama, tokenizer: Tokenizer, text: str, ids: list[int]) -> bool:
    got = model.tokenize(text.encode("utf-8"), add_bos=False, special=False)
    if got != ids:
        print(f"  other ids for {text[:60]!r}: {got[:10]} instead of {ids[:10]} ({tokenizer.name})")
    return got == ids


def check_golden(golden: pathlib.Path, vocabulary: str, folder: pathlib.Path) -> bool:
    """The ids of GPT-2's tokenizer, in the file of a small model."""
    tokenizer = make_tokenizer("gpt2", path=vocabulary)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=tokenizer.vocab_size)
    params = init_params(GPT2(config), jax.random.key(0))
    write_gguf(folder / "golden.gguf", Bundle(config, params, tokenizer), "float16")
    model = opened(folder / "golden.gguf", 64)
    lines = [json.loads(line) for line in golden.read_text(encoding="utf-8").splitlines()]
    right = sum(check_ids(model, tokenizer, line["text"], line["ids"]) for line in lines)
    print(f"golden ids: {right} of {len(lines)} texts")
    return right == len(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether llama.cpp takes our GGUF files.")
    parser.add_argument("--model", required=True, help="run folder or Hugging Face folder with a trained model")
    parser.add_argument("--golden", type=pathlib.Path, help="texts with GPT-2's ids, as JSON lines")
    parser.add_argument("--vocabulary", default="", help="folder with GPT-2's vocab.bpe")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.model)
    bundle = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, dtype="float32"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        good = [check_texts(bundle, dtype, folder) for dtype in GGUF_TYPES]
        if arguments.golden:
            good.append(check_golden(arguments.golden, arguments.vocabulary, folder))
    print("all as it should be" if all(good) else "not as it should be")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
