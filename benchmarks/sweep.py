"""To which held-out loss do variants of a config train?

    python -m benchmarks.sweep --config=configs/shakespeare_char_cpu.py --config.data.source=text:input.txt \
        --vary optimizer.learning_rate=2e-3,4e-3 --vary optimizer.name=adamw,muon --seeds=3 --at=400

Trains each combination of the values, with each seed, to `train.steps` as a run would, without saving anything, and
prints the held-out loss as the run would (`train.eval_windows`), after the steps of `--at` too, and the seconds that
the steps took (compiling, and evaluating, left out). Two runs at a time, each with a core of its own, finish sooner
than one after another with both. Prints a table and a JSON line.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import pathlib
import tempfile
import time
from typing import Any

from benchmarks.report import print_json, spread
from gpt2_jax.cli.overrides import parse_overrides
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import load_config
from gpt2_jax.errors import UsageError


def train(config: RunConfig, core: int | None = None, at: tuple[int, ...] = ()) -> dict[str, float]:
    """Held-out loss in nats per token after the last step and those of `at`, and seconds of the steps but the first."""
    if core is not None:
        os.sched_setaffinity(0, {core})

    import jax

    from gpt2_jax.evaluation.held_out import held_out_loss
    from gpt2_jax.run.run_data import cut_batches, open_data, with_vocabulary
    from gpt2_jax.run.step_settings import for_device, make_settings
    from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
    from gpt2_jax.training.steps import train_step
    from gpt2_jax.training.train_state import sharded_init

    mesh = make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as folder:
        store = open_data(config, pathlib.Path(folder))
    config = with_vocabulary(config, store.tokenizer.vocab_size)
    train_batches, held_out_batches = cut_batches(config, store, mesh)
    config, _ = for_device(config, mesh.devices.flat[0])
    settings = make_settings(config, mesh)
    with use_mesh(mesh):
        state = sharded_init(settings.model, settings.optimizer, config.seed, mesh, ema=config.optimizer.ema_decay > 0)
        began, evaluating = 0.0, 0.0

        def loss() -> float:
            return held_out_loss(state.eval_params, held_out_batches, model=settings.model, mesh=mesh)["held_out_loss"]

        losses = {}
        for index, batch in train_batches.iterate(0, config.train.steps):
            state, _ = train_step(state, place_batch(batch, mesh), settings=settings)
            if index == 0:
                jax.block_until_ready(state)
                began = time.perf_counter()
            if index + 1 in at:
                jax.block_until_ready(state)
                since = time.perf_counter()
                losses[f"loss_at_{index + 1}"] = loss()
                evaluating += time.perf_counter() - since
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began - evaluating
        return {**losses, "loss": loss(), "seconds": seconds}


def variants(varied: dict[str, list[str]], seeds: int) -> list[dict[str, str]]:
    """Overrides of each combination."""
    axes = {**varied, "seed": [str(seed) for seed in range(seeds)]}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _one(task: tuple[str, dict[str, str], int | None, tuple[int, ...]]) -> dict[str, float]:
    path, overrides, core, at = task
    return train(load_config(path, overrides), core, at)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE[,VALUE...]")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--at", default="", metavar="STEP[,STEP...]", help="after which steps to evaluate besides")
    parser.add_argument("--at_a_time", type=int, default=len(os.sched_getaffinity(0)), help="runs, each on one core")
    flags, rest = parser.parse_known_args()
    varied = {key: values.split(",") for key, _, values in (text.partition("=") for text in flags.vary)}
    tasks = variants(varied, flags.seeds)
    try:
        at = tuple(int(step) for step in flags.at.split(",") if step)
    except ValueError:
        parser.error(f"--at={flags.at}: numbers of steps are wanted, with commas between")
    try:
        fixed = parse_overrides(rest, [])
        for task in tasks:
            steps = load_config(flags.config, {**fixed, **task}).train.steps  # a mistake shows before the first run
            if not all(1 <= step <= steps for step in at):
                parser.error(f"--at={flags.at}: of steps 1 to train.steps={steps}")
    except UsageError as error:
        parser.error(str(error))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cores = sorted(os.sched_getaffinity(0))
    early = [f"loss_at_{step}" for step in at]
    done: list[dict[str, float]] = [{}] * len(tasks)
    results: dict[tuple[str, ...], list[dict[str, float]]] = {}
    with concurrent.futures.ProcessPoolExecutor(
        flags.at_a_time, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        waiting = {}
        free = cores[: flags.at_a_time] if flags.at_a_time > 1 else [None]
        todo = list(enumerate(tasks))
        while todo or waiting:
            while todo and free:
                number, task = todo.pop(0)
                core = free.pop()
                future = pool.submit(_one, (flags.config, {**fixed, **task}, core, at))
                waiting[future] = (number, core)
            ended, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                number, core = waiting.pop(future)
                free.append(core)
                done[number] = future.result()
                shown = " ".join(f"{key}={value}" for key, value in tasks[number].items())
                losses = " ".join(f"{done[number][name]:.4f}" for name in (*early, "loss"))
                print(f"{losses} {done[number]['seconds']:6.1f} s  {shown}", flush=True)
    for task, figures in zip(tasks, done, strict=True):
        results.setdefault(tuple(task[key] for key in varied), []).append(figures)
    rows: list[dict[str, Any]] = [
        {
            **dict(zip(varied, values, strict=True)),
            **{name: spread([one[name] for one in runs], 4) for name in (*early, "loss")},
            "seconds": spread([one["seconds"] for one in runs], 1),
        }
        for values, runs in results.items()
    ]
    print()
    for row in sorted(rows, key=lambda row: row["loss"]["median"]):
        settings = " ".join(f"{key}={row[key]}" for key in varied)
        print(f"{row['loss']['median']:.4f} ({row['loss']['min']:.4f} to {row['loss']['max']:.4f})  {settings}")
    print_json("sweep", config=flags.config, overrides=fixed, seeds=flags.seeds, results=rows)


if __name__ == "__main__":
    main()
