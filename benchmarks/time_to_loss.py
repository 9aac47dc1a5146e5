"""How long from the start of the process to the loss at which nanoGPT's settings end on torch?

    python -m benchmarks.time_to_loss --text=input.txt

Tiny Shakespeare by characters on a CPU. Theirs is `benchmarks.torch_shakespeare`: the time is from the start of the
process to the end of its 2,000 steps, its loss that over the whole held-out tail. Ours is `train.py` with
configs/shakespeare_char_cpu.py, whose settings were chosen by the same tail (docs/numbers.md), a warm cache
of compiled programs and prepared tokens, as after a first run: a run that evaluates often tells after which step the
loss over the whole tail is theirs; another one, which does not evaluate until then, how long it takes to come to that
step. By turns; one in which other programs took more than a tenth of a core is repeated, at most twice. Medians and
ranges over the seeds. Prints a table and a JSON line.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TypeVar

from benchmarks.machine import BUSY_CORES, OtherPrograms
from benchmarks.report import print_columns, print_json, spread

_EVERY = 50  # steps between evaluations
_ROOT = pathlib.Path(__file__).parents[1]

_Result = TypeVar("_Result")


def undisturbed(what: str, turn: Callable[[], _Result]) -> tuple[_Result, float]:
    """Of the first turn beside which other programs were idle, else the calmest; and how many cores they took."""
    turns: list[tuple[_Result, float]] = []
    while len(turns) < 3 and not (turns and turns[-1][1] <= BUSY_CORES):
        others = OtherPrograms()
        turns.append((turn(), others.cores()))
        print("{}: {}, other programs took {:.2f} cores".format(what, *turns[-1]), file=sys.stderr)
    return min(turns, key=lambda one: one[1])


def their_run(text: str, seed: int) -> tuple[float, float]:
    """Seconds to the end of training, and the loss."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.torch_shakespeare", text, str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.perf_counter() - began
        told = process.stdout.readline().split()
    if len(told) != 2:
        raise SystemExit("benchmarks.torch_shakespeare did not end well")
    return seconds, float(told[1])


def our_command(text: str, seed: int, folder: pathlib.Path, *flags: str) -> list[str]:
    """`train.py` on the preset."""
    return [
        *(sys.executable, str(_ROOT / "train.py"), f"--config={_ROOT / 'configs' / 'shakespeare_char_cpu.py'}"),
        *(f"--config.data.source=text:{text}", f"--workdir={folder}", f"--config.seed={seed}", *flags),
    ]


def our_losses(text: str, seed: int, folder: pathlib.Path) -> dict[int, float]:
    """The loss over the whole tail, by step."""
    command = our_command(text, seed, folder, f"--config.train.eval_every={_EVERY}")
    subprocess.run(command, check=True, capture_output=True)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}


def our_seconds(text: str, seed: int, base: str, step: int) -> float:
    """From the start of the process until the metrics of `step` are written, without an evaluation before."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=base))
    flags = ("--config.train.eval_every=0", f"--config.train.log_every={_EVERY}", "--config.checkpoint.every=100000")
    metrics, began = folder / "metrics.jsonl", time.perf_counter()
    with subprocess.Popen(
        our_command(text, seed, folder, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"train.py ended with {process.returncode} before step {step}")
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        process.terminate()
    return seconds


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="Tiny Shakespeare, input.txt")
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    text = str(pathlib.Path(flags.text).resolve())
    theirs, ours, steps, last, busy = [], [], [], [], []
    with tempfile.TemporaryDirectory() as base:
        for seed in range(flags.seeds):
            (seconds, loss), busy_then = undisturbed(f"{seed} torch", functools.partial(their_run, text, seed))
            theirs.append((seconds, loss))
            losses = our_losses(text, seed, pathlib.Path(base, f"often-{seed}"))
            reached = [step for step, ours_then in losses.items() if ours_then <= loss]
            if not reached:
                raise SystemExit(f"seed {seed}: ours ends at {min(losses.values()):.4f}, theirs at {loss:.4f}")
            steps.append(min(reached))
            last.append(losses[max(losses)])
            our_time, busy_now = undisturbed(
                f"{seed} gpt2_jax, {steps[-1]} steps", functools.partial(our_seconds, text, seed, base, steps[-1])
            )
            ours.append(our_time)
            busy.append(max(busy_then, busy_now))
    columns = {
        "torch": {
            "seconds": spread([seconds for seconds, _ in theirs], 1),
            "steps": spread([2000.0], 0),
            "last_loss": spread([loss for _, loss in theirs], 4),
        },
        "gpt2_jax": {
            "seconds": spread(ours, 1),
            "steps": spread(steps, 0),
            "last_loss": spread(last, 4),
            "mean_last_loss": round(statistics.mean(last), 4),
            "times_as_fast": spread([t / o for (t, _), o in zip(theirs, ours, strict=True)], 2),
            "cores_of_others": spread(busy, 2),
        },
    }
    print_columns("time to loss", columns)
    print_json("time_to_loss", **columns)


if __name__ == "__main__":
    main()
