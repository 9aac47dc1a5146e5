"""Runs that are killed, stopped and hung on purpose: how they are started, and what must be true of them afterwards."""

import contextlib
import hashlib
import json
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from tiny_run import REPOSITORY, Finished, Workshop, finish

from gpt2_jax.run.rendezvous import free_address
from gpt2_jax.run.state_hashes import state_hashes

# Many saves and evaluations in a few steps.
SHORT = {
    "train.steps": 24,
    "checkpoint.every": 3,
    "train.eval_every": 6,
    "train.sample_every": 0,
    "train.log_every": 1,
}
SECONDS = 240
HEARTBEAT = 15


def state_hash(folder: pathlib.Path, step: int | None = None) -> str:
    """sha256 over all arrays of a saved state, the newest by default, with their names."""
    return hashlib.sha256(json.dumps(state_hashes(folder, step), sort_keys=True).encode()).hexdigest()


def losses(folder: pathlib.Path) -> dict[tuple[int, str], float]:
    """All losses in the metrics of a run, by step and name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in ("loss", "held_out_loss") if name in line}


def batch_order(notes: Sequence[pathlib.Path]) -> dict[int, list[int]]:
    """The windows of each step, sorted, from files of noting_train.py; a step that was read twice must be the same."""
    order: dict[int, set[int]] = {}
    for file in notes:
        for line in file.read_text().splitlines():
            if line.count(" ") == 1 and not line.endswith(" "):
                step, window = map(int, line.split())
                order.setdefault(step, set()).add(window)
    return {step: sorted(windows) for step, windows in order.items()}


@contextlib.contextmanager
def started(
    tiny: Workshop,
    folder: pathlib.Path,
    *flags: str,
    faults: Sequence[str] = ("",),
    notes: pathlib.Path | None = None,
    settings: dict | None = None,
    devices: int = 1,
    prefix: Sequence[str] = (),
    program: Sequence[str] = (),
) -> Iterator[list[subprocess.Popen]]:
    """A run in as many processes as `faults`, which names the fault point of each, or none; ended with the block."""
    address, processes = free_address(), []
    with contextlib.ExitStack() as stack:
        for index, fault in enumerate(faults):
            environment = {**tiny.environment(), "JAX_NUM_CPU_DEVICES": str(devices), "TF_CPP_MIN_LOG_LEVEL": "3"}
            environment |= {"GPT2_JAX_FAULT": fault} if fault else {}
            place = [f"--coordinator_address={address}", f"--num_processes={len(faults)}", f"--process_id={index}"]
            words = [*program] or [str(REPOSITORY / "train.py")]
            if notes is not None:
                words = [
                    str(REPOSITORY / "tests" / "noting_train.py"),
                    str(notes / f"{time.time_ns()}.{index}.txt"),
                ]
            wanted = {**SHORT, **(settings or {})}
            arguments = tiny.arguments(folder, wanted, f"--heartbeat_timeout={HEARTBEAT}", *flags)
            command = [*prefix, sys.executable, *words, *arguments, *(place if len(faults) > 1 else [])]
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


def run(tiny: Workshop, folder: pathlib.Path, *flags: str, **options) -> list[Finished]:
    """The same, done; by process."""
    with started(tiny, folder, *flags, **options) as processes:
        return [finish(process, SECONDS) for process in processes]


def kill_plans(count: int, seed: int) -> list[str]:
    """Seeded fault points at which a run of `SHORT` gets SIGKILL: inside saves, between them, and around."""
    rng = random.Random(seed)
    names = (
        ("save.begin", 5, 0.0),
        ("save.copied", 5, 0.15),  # the background: arrays, metadata, renaming, clearing away
        ("save.seal", 5, 0.0),
        ("save.sealed", 5, 0.1),
        ("step", 16, 0.05),
        ("evaluate", 3, 0.05),
        ("compile", 1, 0.5),
    )
    plans = []
    for number in range(count):
        name, most, delay = names[number % len(names)]
        later = f"+{rng.uniform(0, delay):.3f}" if delay else ""
        plans.append(f"{name}#{rng.randint(1, most)}{later}=kill")
    rng.shuffle(plans)
    return plans


def check_kills(tiny: Workshop, base: pathlib.Path, plans: Sequence[str], processes: int = 1) -> None:
    """Kills one run at each of the points in turn, lets it end, and compares it with one that was left alone."""
    notes, alone_notes = base / "notes", base / "alone_notes"
    notes.mkdir()
    alone_notes.mkdir()
    clean = [""] * processes
    for done in run(tiny, base / "alone", faults=clean, notes=alone_notes):
        assert done.code == 0, done.err
    saved = 0
    for number, plan in enumerate(plans):
        faults = [*clean]
        faults[number % processes] = plan
        ended = run(tiny, base / "run", faults=faults, notes=notes)
        codes = [done.code for done in ended]
        # A run that is nearly done may not come to the point any more.
        assert all(code == 0 for code in codes) or 0 not in codes, (plan, [done.err[-2000:] for done in ended])
        steps = saved_steps(base / "run")
        assert max(steps, default=0) >= saved, f"{plan}: step {saved} was saved, now there are {steps}"
        saved = max(steps, default=0)
    for done in run(tiny, base / "run", faults=clean, notes=notes):
        assert done.code == 0, done.err
    assert state_hash(base / "run") == state_hash(base / "alone")
    assert losses(base / "run") == losses(base / "alone")
    order = batch_order(sorted(alone_notes.iterdir()))
    assert sorted(order) == [*range(SHORT["train.steps"])]
    assert batch_order(sorted(notes.iterdir())) == order


def saved_steps(folder: pathlib.Path) -> list[int]:
    """The steps whose folders have their names."""
    checkpoints = folder / "checkpoints"
    return sorted(int(step.name) for step in checkpoints.glob("*") if step.name.isdecimal())
