"""How fast is decoding, beside Hugging Face transformers and beside what the memory allows?

    python -m benchmarks.decode --against transformers

Greedy decoding on the CPU with a key-value cache, float32, random prompts and random weights, the same on both sides.
Ours goes through `Batch`, theirs through `model.generate`; a call has ids on the host before and after it. That both
write the same tokens is checked. A round measures the memory bandwidth, ours, and theirs with each of its two kinds of
attention, of which the faster one counts. All happens in one process: the threads of torch go to sleep milliseconds
after their last work and those of XLA sooner, and neither side was faster in a process of its own. Turns follow each
other after 20 ms: after 200 ms of idleness Linux often wakes XLA's two threads on one core, and a first token takes up
to 25 ms more (`--pause`). A round in which other programs took more than a tenth of a core is measured again.

A step is one more token for each row. Its bound is the time in which the memory delivers what it needs at the rate that
a chain of products of a vector with matrices reaches: all weights but the position table, and the keys and values of
the tokens so far, on average over the text. The first token is one pass over the prompt, theirs without the machinery
of `generate`; steps are the rest of the whole call. Prints a table per batch size and a JSON line, medians and ranges.

Shapes: B rows, P prompt length, N new tokens.
"""

import argparse
import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.machine import BUSY_CORES, Bandwidth, OtherPrograms, keep_to_cores
from benchmarks.report import print_json, spread
from gpt2_jax.config import ModelConfig
from gpt2_jax.decoding.batch import Batch, Limits
from gpt2_jax.decoding.layout import Decoder, make_decoder
from gpt2_jax.decoding.settings import Sampling
from gpt2_jax.model.gpt2 import GPT2, Params, init_params

_TIE = 1e-4  # logits that differ less may be ordered either way


@dataclasses.dataclass(frozen=True)
class Turn:
    """One call: what it wrote, `[B, N]`, and the seconds to the first and to the last token."""

    tokens_BN: np.ndarray
    first: float
    total: float

    @property
    def step(self) -> float:
        """Seconds for each token after the first one."""
        return (self.total - self.first) / (self.tokens_BN.shape[1] - 1)


@dataclasses.dataclass(frozen=True)
class Round:
    """Measured one after another: bytes per second from memory, the turns, and cores that other programs took."""

    bandwidth: float
    read_bandwidth: float
    turns: dict[str, Turn]
    others: float


def our_turn(decoder: Decoder, prompts_BP: np.ndarray, new: int) -> Turn:
    """Decodes the prompts with this library."""
    began, seconds = time.perf_counter(), []
    tokens_BN: list[list[int]] = [[] for _ in prompts_BP]
    for token in Batch(decoder, prompts_BP.tolist(), sampling=Sampling(temperature=0), limits=Limits(new)):
        if not seconds:
            seconds.append(time.perf_counter() - began)
        tokens_BN[token.row].append(token.id)
    return Turn(np.array(tokens_BN), seconds[0], time.perf_counter() - began)


def their_turn(model: Any, attention: str, prompts_BP: np.ndarray, new: int) -> Turn:
    """Decodes the prompts with a `TransformersGPT2`."""
    model.use_attention(attention)
    began = time.perf_counter()
    model.first_token(prompts_BP)
    first = time.perf_counter() - began
    began = time.perf_counter()
    tokens_BN = model.generate(prompts_BP, new)
    return Turn(tokens_BN, first, time.perf_counter() - began)


def measure_rounds(
    sides: dict[str, Callable[[], Turn]], rounds: int, bandwidth: Bandwidth, pause: float
) -> tuple[list[Round], int]:
    """`rounds` rounds in which no other programs were at work, and how many were discarded.

    After three times as many, those that were disturbed least are taken; `Round.others` tells.
    """
    done: list[Round] = []
    while sum(one.others <= BUSY_CORES for one in done) < rounds and len(done) < 3 * rounds:
        others = OtherPrograms()
        rates = bandwidth.of_products(), bandwidth.of_reads()
        turns = {}
        for name, turn in sides.items():
            time.sleep(pause)
            turns[name] = turn()
        done.append(Round(*rates, turns, others.cores()))
    return sorted(done, key=lambda one: one.others)[:rounds], len(done) - rounds


def bytes_per_step(decoder: Decoder, rows: int, prompt: int, new: int) -> int:
    """Bytes of weights and cache that a step must read, on average over the text."""
    config = decoder.model.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves({**decoder.weights, "wpe": {}}))
    # A step reads the token before; the last token is not read.
    cache = 2 * config.n_layer * config.n_embd * 4 * rows * (prompt + new / 2)
    return round(weights + cache)


def tokens_in_common(model: Any, prompts_BP: np.ndarray, ours_BN: np.ndarray, theirs_BN: np.ndarray) -> int:
    """How many tokens are equal before their row's first difference; exits if one is more than a matter of rounding."""
    common = 0
    for prompt_P, ours_N, theirs_N in zip(prompts_BP, ours_BN, theirs_BN, strict=True):
        different = np.flatnonzero(ours_N != theirs_N)
        equal = int(different[0]) if len(different) else len(ours_N)
        common += equal
        if equal < len(ours_N):
            logits_V = model.next_logits(np.concatenate([prompt_P, theirs_N[:equal]])[None])[0]
            gap = abs(float(logits_V[theirs_N[equal]] - logits_V[ours_N[equal]]))
            if gap > _TIE:
                raise SystemExit(f"the texts differ from token {equal} on, where theirs leads by {gap:.2g}")
    return common


def measure(
    decoder: Decoder, model: Any, prompts_BP: np.ndarray, new: int, rounds: int, bandwidth: Bandwidth, pause: float
) -> dict[str, Any]:
    """Figures of one batch size; `model` is a `TransformersGPT2`, or None to measure this library alone."""
    rows, prompt = prompts_BP.shape
    sides: dict[str, Callable[[], Turn]] = {"gpt2_jax": functools.partial(our_turn, decoder, prompts_BP, new)}
    for attention in model.ATTENTION if model else ():
        sides[attention] = functools.partial(their_turn, model, attention, prompts_BP, new)
    first_calls = {name: turn() for name, turn in sides.items()}
    kept, discarded = measure_rounds(sides, rounds, bandwidth, pause)
    turns = {name: [one.turns[name] for one in kept] for name in sides}

    ours = turns["gpt2_jax"]
    needed = bytes_per_step(decoder, rows, prompt, new)
    bounds = [needed / one.bandwidth for one in kept]
    read_bounds = [needed / one.read_bandwidth for one in kept]
    result: dict[str, Any] = {
        "batch_size": rows,
        "rounds": len(kept),
        "discarded_rounds": discarded,
        "cores_of_others": round(max(one.others for one in kept), 2),
        "gpt2_jax": _figures(ours),
        "compile_seconds": round(first_calls["gpt2_jax"].total - statistics.median(turn.total for turn in ours), 1),
        "bytes_per_step": needed,
        "gb_per_second": spread([one.bandwidth / 1e9 for one in kept], 1),
        "bound_step_ms": spread([bound * 1e3 for bound in bounds], 2),
        "share_of_bound": spread([bound / turn.step for bound, turn in zip(bounds, ours, strict=True)], 3),
        "read_gb_per_second": spread([one.read_bandwidth / 1e9 for one in kept], 1),
        "share_of_read_rate": spread([bound / turn.step for bound, turn in zip(read_bounds, ours, strict=True)], 3),
    }
    if model:
        faster = min(model.ATTENTION, key=lambda name: statistics.median(turn.total for turn in turns[name]))
        pairs = list(zip(ours, turns[faster], strict=True))
        result["transformers"] = {"attention": faster, **_figures(turns[faster])}
        result["times_as_fast"] = {
            "tokens_per_second": spread([b.total / a.total for a, b in pairs], 2),
            "first_token_ms": spread([b.first / a.first for a, b in pairs], 2),
            "step_ms": spread([b.step / a.step for a, b in pairs], 2),
        }
        common = tokens_in_common(model, prompts_BP, ours[0].tokens_BN, turns[faster][0].tokens_BN)
        result["equal_tokens"] = f"{common} of {ours[0].tokens_BN.size}"
    return result


def _figures(turns: list[Turn]) -> dict[str, Any]:
    return {
        "tokens_per_second": spread([turn.tokens_BN.size / turn.total for turn in turns], 1),
        "first_token_ms": spread([turn.first * 1e3 for turn in turns], 1),
        "step_ms": spread([turn.step * 1e3 for turn in turns], 2),
    }


def print_table(result: dict[str, Any]) -> None:
    """One batch size, for people."""

    def shown(value: Any) -> str:
        return f"{value['median']} ({value['min']} to {value['max']})" if isinstance(value, dict) else str(value)

    columns = [name for name in ("gpt2_jax", "transformers", "times_as_fast") if name in result]
    title = f"batch of {result['batch_size']}"
    print(f"\n{title:<20}" + "".join(f"{name:<26}" for name in columns))
    for name in result["gpt2_jax"]:
        print(f"{name:<20}" + "".join(f"{shown(result[column][name]):<26}" for column in columns))
    for name, value in result.items():
        if name not in (*columns, "batch_size"):
            print(f"{name:<20}{shown(value)}")


def random_params(config: ModelConfig) -> Params:
    """The initializer's, with larger kernels: as they are, the most likely token is the same again and again."""
    params = jax.jit(init_params, static_argnums=0)(GPT2(config), jax.random.key(0))
    return jax.tree.map_with_path(lambda path, x: 5 * x if path[-1].key == "kernel" else x, params)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=("transformers", "none"), default="none")
    parser.add_argument("--batch_sizes", default="1,8")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens written after it, 2 or more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds of idleness before each turn")
    parser.add_argument("--threads", type=int, default=2, help="cores, for both sides")
    for name, default in {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    if flags.against == "transformers" and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        parser.error("--against transformers needs torch and transformers: pip install torch==2.13.0 transformers")

    keep_to_cores(flags.threads)
    jax.config.update("jax_platforms", "cpu")
    shape = {name: getattr(flags, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    config = ModelConfig(**shape, dtype="float32")
    params, model = random_params(config), None
    decoder = make_decoder(config, params, config.vocab_size, dtype="float32")
    if flags.against == "transformers":
        from benchmarks.transformers_gpt2 import TransformersGPT2  # torch is optional

        model = TransformersGPT2(config, params, flags.threads)
    del params

    bandwidth, rng, results = Bandwidth(), np.random.default_rng(0), []
    for rows in map(int, flags.batch_sizes.split(",")):
        prompts_BP = rng.integers(0, config.vocab_size, (rows, flags.prompt))
        results.append(measure(decoder, model, prompts_BP, flags.new, flags.rounds, bandwidth, flags.pause))
        print_table(results[-1])
    print_json("decode", **vars(flags), results=results)


if __name__ == "__main__":
    main()
