"""How fast is the train step, beside torch, and how much of the machine's matrix-product rate does it reach?

    python -m benchmarks.train --config=configs/gpt2_124m.py --config.train.batch_size=2 ... --against=torch

Steps on random tokens of the config's shape, on the CPU, without dropout unless a side has it, in float32 unless its
name says otherwise, with AdamW at a constant rate of learning, whatever the config has. Each side starts from the same
weights and sees the same batches; that its first ten losses agree with ours (1e-3 in float32) is checked. Rounds go
through the sides forth and back (A B, B A), each time in a fresh process, which waits for each of its first ten steps
and then measures five windows of steps, of which the median counts; a turn in which other programs took more than a
tenth of a core is repeated, at most twice. Each side measures the rate of its own library's float32 matrix products
before and after its steps, the larger of which is its bound.

`gpt2_jax` keeps freed memory as train.py does where there is only a CPU; `gpt2_jax-system-malloc` does not. Memory is
the peak resident size above that of the process with the weights' file in it. Prints a table and a JSON line; medians
and ranges over the rounds, ratios within them.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks.machine import BUSY_CORES
from benchmarks.report import print_columns, print_json, spread
from benchmarks.train_side import SIDES
from gpt2_jax.cli.malloc import VARIABLE
from gpt2_jax.cli.overrides import parse_overrides
from gpt2_jax.config import OptimizerConfig, RunConfig
from gpt2_jax.config_file import load_config
from gpt2_jax.errors import UsageError
from gpt2_jax.exchange.names import tensors_from_params
from gpt2_jax.model.gpt2 import GPT2, init_params
from gpt2_jax.run.hardware import flops_per_token

_FIRST, _SYSTEM = "gpt2_jax", "gpt2_jax-system-malloc"
_AGREE = {"float32": 1e-3, "bfloat16": 5e-2}
_RATE = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0)


def turn(task: dict[str, Any], cache: pathlib.Path) -> dict[str, Any]:
    """One side in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **SIDES[task["side"]].environment(),
    }
    for attempt in range(3):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.train_side"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            raise SystemExit(f"{task['side']}: {done.stderr[-2000:]}")
        figures = json.loads(done.stdout.splitlines()[-1])
        if figures["cores_of_others"] <= BUSY_CORES or attempt == 2:
            return figures
    raise AssertionError


def measure(
    config: RunConfig, sides: list[str], *, rounds: int, seconds: float, threads: int, cache: pathlib.Path
) -> dict[str, Any]:
    """Figures by side, ours first."""
    config = dataclasses.replace(config, optimizer=_RATE)
    task = {"config": dataclasses.asdict(config), "seconds": seconds, "threads": threads}
    done: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder, "weights.npz")
        params = init_params(GPT2(config.model), jax.random.key(0))
        np.savez(weights, **{tensor.name: value for tensor, value in tensors_from_params(config.model, params)})
        for number in range(rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                done[side].append(turn({**task, "side": side, "weights": str(weights)}, cache))
                print(f"{number + 1} {side}: {done[side][-1]['step_seconds'] * 1e3:.1f} ms", file=sys.stderr)
    tokens = config.train.batch_size * config.context_length
    flops = tokens * flops_per_token(config.model, config.context_length)
    result = {
        "parameters_of": str(config.model),
        "tokens_per_step": tokens,
        "rounds": rounds,
        "sides": {side: _figures(side, done, tokens, flops) for side in sides},
    }
    if {"torch", _SYSTEM} <= done.keys():
        peaks = zip(done[_SYSTEM], done["torch"], strict=True)
        result["system_malloc_memory_over_torch"] = spread([a["peak_bytes"] / b["peak_bytes"] for a, b in peaks], 2)
    return result


def _figures(side: str, done: dict[str, list[dict[str, Any]]], tokens: int, flops: float) -> dict[str, Any]:
    ours, turns = done[_FIRST], done[side]
    _check_losses(side, ours[0]["losses"], turns[0]["losses"])
    pairs = list(zip(ours, turns, strict=True))
    figures: dict[str, Any] = {
        "tokens_per_second": spread([tokens / one["step_seconds"] for one in turns], 0),
        "step_ms": spread([1e3 * one["step_seconds"] for one in turns], 2),
        "processor_ms": spread([1e3 * one["processor_seconds"] for one in turns], 1),
        "of_it_in_the_kernel": spread([one["system_seconds"] / one["processor_seconds"] for one in turns], 2),
        "page_faults_per_step": spread([one["page_faults"] for one in turns], 0),
        "peak_mb": spread([one["peak_bytes"] / 1e6 for one in turns], 0),
        "first_step_seconds": spread([one["first_step_seconds"] for one in turns], 2),
        "cores_of_others": round(max(one["cores_of_others"] for one in turns), 2),
        "last_loss": round(turns[0]["losses"][-1], 5),
    }
    rates = [one["matmul_rate"] for one in turns]
    figures["matmul_gflops"] = spread([rate / 1e9 for rate in rates], 0)
    shares = [flops / one["step_seconds"] / rate for one, rate in zip(turns, rates, strict=True)]
    figures["share_of_matmul_rate"] = spread(shares, 3)
    if side != _FIRST:
        figures["ours_times_as_fast"] = spread([b["step_seconds"] / a["step_seconds"] for a, b in pairs], 2)
    return figures


def _check_losses(side: str, ours: list[float], theirs: list[float]) -> None:
    if SIDES[side].dropout:
        return
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if not apart <= _AGREE[SIDES[side].dtype]:
        raise SystemExit(f"{side}: the first losses are {apart:.2g} apart: ours {ours}, its {theirs}")


def without_dropout(config: RunConfig, vocab_size: int) -> RunConfig:
    """The config as it is measured."""
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = dataclasses.replace(config.model, vocab_size=vocab_size or config.model.vocab_size, **rates)
    return dataclasses.replace(config, model=model)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Keys of the config are overridden as for train.py: --config.SECTION.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--vocab_size", type=int, default=0, help="ids, where the config leaves them to the tokenizer")
    parser.add_argument("--against", default="", metavar="SIDE[,SIDE...]", help=", ".join(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores, for all sides")
    flags, rest = parser.parse_known_args()
    sides = list(dict.fromkeys([_FIRST, *filter(None, flags.against.split(","))]))
    unknown = [side for side in sides if side not in SIDES]
    if unknown:
        parser.error(f"--against={','.join(unknown)}; allowed: {', '.join(SIDES)}")
    try:
        config = without_dropout(load_config(flags.config, parse_overrides(rest, [])), flags.vocab_size)
    except UsageError as error:
        parser.error(str(error))
    if not config.model.vocab_size:
        parser.error(f"{flags.config} leaves the vocabulary to the tokenizer: give --vocab_size, such as 65 for chars")
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as cache:
        result = measure(
            config,
            sides,
            rounds=flags.rounds,
            seconds=flags.seconds,
            threads=flags.threads,
            cache=pathlib.Path(cache),
        )
    print_columns(pathlib.Path(flags.config).stem, result["sides"])
    print_json("train", config=flags.config, overrides=rest, **result)


if __name__ == "__main__":
    main()
