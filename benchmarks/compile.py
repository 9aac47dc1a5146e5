"""How long does the compiler take: for more layers, and at a second start?

    python -m benchmarks.compile

layers  The train step of 12 and of 48 scanned layers of width 768, compiled for the CPU without a cache.
start   All programs that a 124M run compiles to train and to evaluate (`--layers`, `--width`, ...), at a first start
        with an empty persistent cache and at a second one; the sum of what JAX reports as compile time, which at the
        second is the time to fetch and load.

Each compile in a process of its own, by turns. Prints a table and a JSON line, medians and ranges.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.report import print_json, shown, spread
from gpt2_jax.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig

_RATES = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def config_of(layers: int, scan_unroll: int) -> RunConfig:
    """GPT-2's width, few tokens."""
    model = ModelConfig(n_layer=layers, vocab_size=50257, scan_unroll=scan_unroll, **_RATES)
    return RunConfig(
        model=model,
        optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"),
        train=TrainConfig(batch_size=2, context_length=128),
    )


def compile_step(layers: int) -> dict[str, float]:
    """Seconds of tracing and lowering, and of compiling, in this process."""
    import jax

    from gpt2_jax.run.fit_memory import lower_train_step
    from gpt2_jax.sharding import make_mesh

    jax.config.update("jax_enable_compilation_cache", False)
    config = config_of(layers, scan_unroll=1)
    mesh = make_mesh(config.mesh)
    began = time.perf_counter()
    lowered = lower_train_step(config, mesh)
    lowered_at = time.perf_counter()
    lowered.compile()
    return {"lower": lowered_at - began, "compile": time.perf_counter() - lowered_at}


def start_run(layers: int) -> dict[str, float]:
    """Seconds of compiling that JAX reports from nothing to a trained and evaluated step, and of all of it."""
    import jax

    from gpt2_jax.run.step_settings import for_device, make_settings
    from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
    from gpt2_jax.training.steps import eval_step, train_step
    from gpt2_jax.training.train_state import sharded_init

    compiling = 0.0

    def note(event: str, duration: float, **_: Any) -> None:
        nonlocal compiling
        if event == "/jax/core/compile/backend_compile_duration":
            compiling += duration

    jax.monitoring.register_event_duration_secs_listener(note)
    began = time.perf_counter()
    config = config_of(layers, scan_unroll=0)
    mesh = make_mesh(config.mesh)
    config, _ = for_device(config, mesh.devices.flat[0])
    settings = make_settings(config, mesh)
    shape = (config.train.batch_size, config.context_length)
    ids = np.zeros(shape, np.int32)
    with use_mesh(mesh):
        batch = place_batch({"tokens": ids, "targets": ids, "weights": np.ones(shape, np.float32)}, mesh)
        state = sharded_init(settings.model, settings.optimizer, 0, mesh)
        state, _ = train_step(state, batch, settings=settings)
        jax.block_until_ready(eval_step(state.params, batch, model=settings.model, loss_chunk=settings.loss_chunk))
    return {"compile": compiling, "all": time.perf_counter() - began}


def in_process(what: str, layers: int, cache: str = "") -> dict[str, float]:
    """One of the two in a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "benchmarks.compile", f"--do={what}", f"--layers={layers}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="of the start")
    parser.add_argument("--do", choices=("compile_step", "start_run"), help="one measurement in this process")
    flags = parser.parse_args()
    if flags.do:
        print(json.dumps((compile_step if flags.do == "compile_step" else start_run)(flags.layers)))
        return
    few, many, first, second = [], [], [], []
    for _ in range(flags.rounds):
        few.append(in_process("compile_step", 12)["compile"])
        many.append(in_process("compile_step", 48)["compile"])
        with tempfile.TemporaryDirectory() as cache:
            first.append(in_process("start_run", flags.layers, cache))
            second.append(in_process("start_run", flags.layers, cache))
    figures = {
        "compile_12_layers_seconds": spread(few, 2),
        "compile_48_layers_seconds": spread(many, 2),
        "48_over_12": spread([b / a for a, b in zip(few, many, strict=True)], 2),
        "first_start_compile_seconds": spread([one["compile"] for one in first], 2),
        "second_start_compile_seconds": spread([one["compile"] for one in second], 2),
        "second_over_first": spread([b["compile"] / a["compile"] for a, b in zip(first, second, strict=True)], 3),
        "first_start_seconds": spread([one["all"] for one in first], 2),
        "second_start_seconds": spread([one["all"] for one in second], 2),
    }
    for name, value in figures.items():
        print(f"{name:<30} {shown(value)}")
    print_json("compile", layers=flags.layers, **figures)


if __name__ == "__main__":
    main()
