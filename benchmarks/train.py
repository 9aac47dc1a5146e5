"""How fast is the train step, and how much of the machine's matrix-product rate does it reach?

    python -m benchmarks.train --config=configs/shakespeare_char_cpu.py --vocab_size=65

Steps on random tokens of the config's shape, all on one batch that lies on the device, are timed in rounds; between the
rounds the float32 matrix-product rate is measured, so that both see the same machine. Prints a table and a JSON line of
medians and ranges.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import numpy as np

from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import load_config
from gpt2_jax.model.gpt2 import parameter_count
from gpt2_jax.run.hardware import flops_per_token, measured_matmul_rate
from gpt2_jax.run.step_settings import make_settings
from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
from gpt2_jax.training.steps import train_step
from gpt2_jax.training.train_state import sharded_init


def measure(config: RunConfig, rounds: int, seconds: float) -> dict[str, object]:
    """Times the config's train step; `model.vocab_size` must be set."""
    mesh = make_mesh(config.mesh)
    settings = make_settings(config, mesh)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (config.train.batch_size, config.context_length + 1))
    tokens = tokens.astype(np.int32)
    weights = np.ones((config.train.batch_size, config.context_length), np.float32)
    rates, peaks = [], []
    with use_mesh(mesh):
        batch = place_batch({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}, mesh)
        state = sharded_init(settings.model, settings.optimizer, 0, mesh, ema=config.optimizer.ema_decay > 0)
        began = time.perf_counter()
        state, metrics = train_step(state, batch, settings=settings)
        jax.block_until_ready(metrics)
        first_step = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(5):
            state, metrics = train_step(state, batch, settings=settings)
        jax.block_until_ready(metrics)
        steps = max(1, round(5 * seconds / (time.perf_counter() - began)))
        for _ in range(rounds):
            peaks.append(measured_matmul_rate())
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = train_step(state, batch, settings=settings)
            jax.block_until_ready(metrics)
            rates.append(steps * weights.size / (time.perf_counter() - began))
    flops = flops_per_token(config.model, config.context_length)
    shares = [rate * flops / peak for rate, peak in zip(rates, peaks, strict=True)]
    return {
        "parameters": parameter_count(config.model),
        "tokens_per_step": weights.size,
        "first_step_seconds": round(first_step, 2),
        "tokens_per_second": spread(rates, 0),
        "matmul_gflops": spread([peak / 1e9 for peak in peaks], 0),
        "share_of_matmul_rate": spread(shares, 3),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--vocab_size", type=int, default=0, help="ids, where the config leaves them to the tokenizer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    flags = parser.parse_args()
    config = load_config(flags.config, {})
    if not config.model.vocab_size:
        if flags.vocab_size < 1:
            parser.error(
                f"{flags.config} leaves the vocabulary to the tokenizer: give --vocab_size, such as 65 for chars"
            )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=flags.vocab_size))
    result = measure(config, flags.rounds, flags.seconds)
    for name, value in result.items():
        shown = f"{value['median']:,} ({value['min']:,} to {value['max']:,})" if isinstance(value, dict) else value
        print(f"{name:<22} {shown}")
    print(json.dumps({"benchmark": "train", "config": flags.config, **result}))


if __name__ == "__main__":
    main()
