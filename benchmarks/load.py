"""How long from a Hugging Face folder to the first token, and how much memory does it take on the way?

    python -m benchmarks.load

A 124M folder of random weights is written once. Each turn is a fresh process on the CPU that has imported `gpt2_jax`
with `load` and `Generator`: it loads the folder and generates one token from a prompt of 16. Its bound is the time in
which a process reads the file's bytes once into its own memory, measured in turns with ours, plus the time in which
JAX, as it reports, traced, lowered and fetched from a warm cache of compiled programs. The file is in the page cache
throughout. Memory is the peak resident size less that of a process that only imported, as a multiple of the weights'
bytes. Before each turn 2 GB of memory are taken and given back: on a virtual machine, memory that no program had for a
while may have to come from its host first, which takes several times as long as reading the file. Linux only. Prints a
table and a JSON line, medians and ranges.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax

from benchmarks.report import print_json, spread
from gpt2_jax.config import ModelConfig
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.huggingface_write import write_huggingface
from gpt2_jax.model.gpt2 import GPT2, init_params
from gpt2_jax.tokenizer import make_tokenizer

_ALL = """
import json, sys, time
import gpt2_jax
from gpt2_jax.run.compile_cache import set_compile_cache
folder, cache = sys.argv[1:]
set_compile_cache(cache)
gpt2_jax.load, gpt2_jax.Generator  # the package imports its parts at first use
prompt, one = [[*range(16)]], gpt2_jax.Stopping(max_new_tokens=1)
compile_seconds = 0.0
"""
_END = """
with open("/proc/self/status") as status:  # not getrusage, which begins with the parent's
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "compile": compile_seconds, "peak": peak}))
"""
_PARTS = {
    "ours": """
import jax
intervals = []
def note(event, duration, **_):
    if event.startswith("/jax/core/compile/"):
        intervals.append((time.perf_counter() - duration, time.perf_counter()))
jax.monitoring.register_event_duration_secs_listener(note)
began = time.perf_counter()
config, params, tokenizer = gpt2_jax.load(folder)
generator = gpt2_jax.Generator(config.model, params, tokenizer)
del params
generator.generate(prompt, stopping=one)
seconds = time.perf_counter() - began
end = 0.0
for first, last in sorted(intervals):  # one may lie within another
    compile_seconds += max(0.0, last - max(first, end))
    end = max(end, last)
""",
    "read": """
began = time.perf_counter()
with open(folder + "/model.safetensors", "rb") as file:
    content = file.read()
seconds = time.perf_counter() - began
""",
    "idle": "seconds = 0.0",
}


def write_folder(folder: pathlib.Path) -> int:
    """A folder of the 124M shape with GPT-2's tokenizer; the bytes of its weights."""
    config = ModelConfig(n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257)
    params = init_params(GPT2(config), jax.random.key(0))
    write_huggingface(folder, Bundle(config, params, make_tokenizer("gpt2")))
    return (folder / "model.safetensors").stat().st_size


def turn(part: str, folder: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
    """One process, after another one has had 2 GB of memory and given it back."""
    subprocess.run([sys.executable, "-c", "import numpy; numpy.ones(250_000_000)"], check=True)
    command = [sys.executable, "-c", _ALL + _PARTS[part] + _END, str(folder), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(rounds: int, scratch: pathlib.Path) -> dict[str, Any]:
    """The figures of `rounds` rounds."""
    folder, cache = scratch / "model", scratch / "xla"
    folder.mkdir()
    size = write_folder(folder)
    for part in _PARTS:  # fills the caches
        turn(part, folder, cache)
    done = [{part: turn(part, folder, cache) for part in _PARTS} for _ in range(rounds)]
    seconds = {part: [one[part]["seconds"] for one in done] for part in ("ours", "read")}
    seconds["compile"] = [one["ours"]["compile"] for one in done]
    bound = [read + compiling for read, compiling in zip(seconds["read"], seconds["compile"], strict=True)]
    idle = statistics.median(one["idle"]["peak"] for one in done)
    return {
        "weights_bytes": size,
        **{f"{part}_seconds": spread(values, 3) for part, values in seconds.items()},
        "bound_seconds": spread(bound, 3),
        "of_bound": spread([ours / least for ours, least in zip(seconds["ours"], bound, strict=True)], 2),
        "idle_bytes": idle,
        "memory_of_weights": spread([(one["ours"]["peak"] - idle) / size for one in done], 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="From a Hugging Face folder to the first token: time and memory.")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repeats (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(arguments.rounds, pathlib.Path(scratch))
    rows = {
        "load and first token, s": figures["ours_seconds"],
        "read the bytes, s": figures["read_seconds"],
        "compile, warm cache, s": figures["compile_seconds"],
        "times the bound": figures["of_bound"],
        "peak memory, times the weights": figures["memory_of_weights"],
    }
    for name, value in rows.items():
        print(f"{name:32} {value['median']:8.3f}  ({value['min']:.3f} to {value['max']:.3f})")
    print_json("load", **figures)


if __name__ == "__main__":
    main()
