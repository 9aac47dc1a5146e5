"""How many tokens per second do the training batches deliver, without a device?

    python -m benchmarks.loader --context_length 1024 --batch_size 32

Prepares random ids once, in a temporary folder, and takes batches through the prefetching iterator in rounds, on one
core unless `--threads` says otherwise. Prints a table and a JSON line.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from benchmarks.machine import keep_to_cores
from benchmarks.report import print_json, spread
from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.windows import PackedWindows


def measure(context_length: int, batch_size: int, rounds: int, steps: int) -> dict[str, object]:
    """Tokens per second of each round."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = pathlib.Path(folder, "corpus.txt")
        ascii_bytes = np.random.default_rng(0).integers(32, 127, 64 * 2**20, dtype=np.uint8)
        corpus.write_bytes(ascii_bytes.tobytes())
        store = prepare(source=f"text:{corpus}", tokenizer_name="bytes", out=pathlib.Path(folder, "tokens"))
        batches = TrainBatches(PackedWindows(store.split("train"), context_length), batch_size=batch_size, seed=0)
        rates = []
        for number in range(rounds):
            began = time.perf_counter()
            for _ in batches.iterate(number * steps, (number + 1) * steps):
                pass
            rates.append(steps * batch_size * context_length / (time.perf_counter() - began))
    return {"context_length": context_length, "batch_size": batch_size, "tokens_per_second": spread(rates, 0)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200, help="of each round")
    parser.add_argument("--threads", type=int, default=1, help="cores, for reading ahead and for taking")
    flags = parser.parse_args()
    keep_to_cores(flags.threads)
    result = measure(flags.context_length, flags.batch_size, flags.rounds, flags.steps)
    rate = result["tokens_per_second"]
    print(f"tokens/s {rate['median']:,} ({rate['min']:,} to {rate['max']:,})")
    print_json("loader", threads=flags.threads, **result)


if __name__ == "__main__":
    main()
