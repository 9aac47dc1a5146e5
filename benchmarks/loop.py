"""What does the training loop add to its steps?

    python -m benchmarks.loop

Steps of configs/shakespeare_char_cpu.py (80 ms on two cores of a Xeon): those of `train.py`, from batches that are
read and placed to metrics that are written, as the rates in its metrics.jsonl say, against bare steps on batches that
lie on the device (`benchmarks.bare_side`). Two processes, both with the allocator that train.py chooses on a CPU, go
by turns of some seconds, the other one stopped meanwhile (SIGSTOP), since what a machine gives moves by more within a
minute than the loop adds. The first half of a turn is left out, as are evaluations, saves and samples. Prints a table
and a JSON line, medians and ranges; `over_bare` is the median over pairs of turns for each pair of processes.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator

import jax
import numpy as np

from benchmarks.report import print_json, shown, spread
from benchmarks.train_side import SIDES
from gpt2_jax.config_file import load_config
from gpt2_jax.exchange.names import tensors_from_params
from gpt2_jax.model.gpt2 import GPT2, init_params

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = str(_ROOT / "configs" / "shakespeare_char_cpu.py")
_STEPS = 25  # of an interval


def intervals(corpus: pathlib.Path, folder: pathlib.Path) -> Generator[float]:
    """Seconds per step of `train.py`, an interval at a time; it is stopped in between, and killed at the end."""
    flags = [
        f"--config.data.source=text:{corpus}",
        "--config.train.steps=1000000",
        f"--config.train.log_every={_STEPS}",
        "--config.train.eval_every=0",
        "--config.train.eval_windows=12",
        "--config.checkpoint.every=1000000",
        "--config.checkpoint.export_best=false",
        f"--workdir={folder}",
    ]
    command = [sys.executable, str(_ROOT / "train.py"), f"--config={_CONFIG}", *flags]
    config = load_config(_CONFIG, {})
    tokens = config.train.batch_size * config.context_length
    folder.mkdir()
    with open(folder / "stderr", "w+") as said:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        try:
            seen = 1  # the first has the compiling in it
            while True:
                # The interval in which it was stopped, and one more.
                while len(rates := _rates(folder / "metrics.jsonl")) < seen + 2:
                    if process.poll() is not None:
                        said.seek(0)
                        raise SystemExit(f"train.py ended with {process.returncode}: {said.read()[-2000:]}")
                    time.sleep(0.05)
                process.send_signal(signal.SIGSTOP)
                seen = len(rates)
                yield tokens / rates[-1]
                process.send_signal(signal.SIGCONT)
        finally:
            process.kill()
            process.wait()


def _rates(metrics: pathlib.Path) -> list[float]:
    whole_lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [line["tokens_per_second"] for line in map(json.loads, whole_lines) if "tokens_per_second" in line]


def bare_steps(weights: pathlib.Path) -> Generator[float]:
    """Seconds per step of as many steps as an interval has; between turns the process waits for its input."""
    config = load_config(_CONFIG, {})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=65))
    params = init_params(GPT2(config.model), jax.random.key(0))
    np.savez(weights, **{tensor.name: value for tensor, value in tensors_from_params(config.model, params)})
    task = {
        "config": dataclasses.asdict(config),
        "weights": str(weights),
        "threads": len(os.sched_getaffinity(0)),
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **SIDES["gpt2_jax"].environment()}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bare_side"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin and process.stdout
    try:
        print(json.dumps(task), file=process.stdin, flush=True)
        while True:
            print(_STEPS, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"benchmarks.bare_side ended with {process.wait()}; what it said is above")
            yield float(answer)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="each with two new processes")
    parser.add_argument("--turns", type=int, default=15, help="of each process in a round")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    looped, bare, over_bare = [], [], []
    with tempfile.TemporaryDirectory() as base:
        corpus = pathlib.Path(base, "corpus.txt")
        letters = np.random.default_rng(0).integers(0, 65, 2**20) + ord("0")
        corpus.write_text("".join(map(chr, letters)))
        for number in range(flags.rounds):
            folder, weights = pathlib.Path(base, str(number)), pathlib.Path(base, "weights.npz")
            with (
                contextlib.closing(bare_steps(weights)) as bare_turns,
                contextlib.closing(intervals(corpus, folder)) as looped_turns,
            ):
                pairs = [(next(bare_turns), next(looped_turns)) for _ in range(flags.turns + 1)][1:]
            bare += [alone for alone, _ in pairs]
            looped += [whole for _, whole in pairs]
            over_bare.append(statistics.median(whole / alone for alone, whole in pairs))
    figures = {
        "train_py_step_ms": spread([1e3 * seconds for seconds in looped], 2),
        "bare_step_ms": spread([1e3 * seconds for seconds in bare], 2),
        "over_bare": spread(over_bare, 3),
    }
    for name, value in figures.items():
        print(f"{name:<20} {shown(value)}")
    print_json("loop", **figures)


if __name__ == "__main__":
    main()
