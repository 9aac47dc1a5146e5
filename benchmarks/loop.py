"""What does the training loop add to its steps?

    python -m benchmarks.loop

Steps of configs/shakespeare_char_cpu.py (80 ms on two cores of a Xeon): those of `train.py`, from batches that are
read and placed to metrics that are written, as the rates in its metrics.jsonl say, against bare steps on batches that
lie on the device (`benchmarks.train_side`). By turns, each in a process of its own, both with the allocator that
train.py chooses on a CPU. Evaluations, saves and samples are left out of both. Prints a table and a JSON line,
medians and ranges.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import numpy as np

from benchmarks.report import print_json, shown, spread
from benchmarks.train import turn
from gpt2_jax.config_file import load_config
from gpt2_jax.exchange.names import tensors_from_params
from gpt2_jax.model.gpt2 import GPT2, init_params

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = str(_ROOT / "configs" / "shakespeare_char_cpu.py")
_EVERY = 50


def through_train(corpus: pathlib.Path, folder: pathlib.Path, steps: int) -> float:
    """Seconds per step of `train.py`: the median of the intervals between its reports, the first left out."""
    flags = [
        f"--config.data.source=text:{corpus}",
        f"--config.train.steps={steps}",
        f"--config.train.log_every={_EVERY}",
        "--config.train.eval_every=0",
        "--config.train.eval_windows=12",
        "--config.checkpoint.every=1000000",
        "--config.checkpoint.export_best=false",
        f"--workdir={folder}",
    ]
    subprocess.run(
        [sys.executable, str(_ROOT / "train.py"), f"--config={_CONFIG}", *flags],
        check=True,
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    config = load_config(_CONFIG, {})
    tokens = config.train.batch_size * config.context_length
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return statistics.median([tokens / line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="of each turn")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config = load_config(_CONFIG, {})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=65))
    looped, bare = [], []
    with tempfile.TemporaryDirectory() as base:
        corpus, weights = pathlib.Path(base, "corpus.txt"), pathlib.Path(base, "weights.npz")
        letters = np.random.default_rng(0).integers(0, 65, 2**20) + ord("0")
        corpus.write_text("".join(map(chr, letters)))
        params = init_params(GPT2(config.model), jax.random.key(0))
        np.savez(weights, **{tensor.name: value for tensor, value in tensors_from_params(config.model, params)})
        task = {
            **{"side": "gpt2_jax", "config": dataclasses.asdict(config), "weights": str(weights)},
            **{"seconds": 8.0, "threads": len(os.sched_getaffinity(0))},
        }
        for number in range(flags.rounds):
            looped.append(through_train(corpus, pathlib.Path(base, str(number)), flags.steps))
            bare.append(turn(task, pathlib.Path(base, "cache"))["step_seconds"])
    figures = {
        "train_py_step_ms": spread([1e3 * seconds for seconds in looped], 2),
        "bare_step_ms": spread([1e3 * seconds for seconds in bare], 2),
        "over_bare": spread([a / b for a, b in zip(looped, bare, strict=True)], 3),
        "median_over_median": round(statistics.median(looped) / statistics.median(bare), 3),
    }
    for name, value in figures.items():
        print(f"{name:<20} {shown(value)}")
    print_json("loop", **figures)


if __name__ == "__main__":
    main()
