"""Bare steps for `benchmarks.loop`, in a process of its own: on batches that lie on the device, and nothing else.

The first line of its input is a task as of `benchmarks.train_side`. It answers each further line, a number of steps,
with the seconds of one of them, after as many that are not counted.
"""

import json
import sys
import time

import numpy as np

from benchmarks.machine import keep_to_cores
from benchmarks.train_side import our_step
from gpt2_jax.config_file import run_config


def main() -> None:
    """The process."""
    task = json.loads(sys.stdin.readline())
    keep_to_cores(task["threads"])
    with np.load(task["weights"], allow_pickle=False) as weights:
        step, _ = our_step(run_config(task["config"]), dict(weights))
    for line in sys.stdin:
        steps = int(line)
        for _ in range(2):
            began = time.perf_counter()
            for number in range(steps):
                step(number)
            step(-1)
        print((time.perf_counter() - began) / steps, flush=True)


if __name__ == "__main__":
    main()
