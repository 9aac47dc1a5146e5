"""How long until something happens: until help is shown, and until a training run has made its first step?

    python -m benchmarks.startup

help    `gpt2-jax --help`, and a Python process that does nothing.
train   From the start of `train.py` with configs/shakespeare_char_cpu.py to its first line of metrics: a first time,
        with empty caches of tokens and compiled programs, and a second time; beside it a process that only imports
        what JAX needs.

Each a fresh process, by turns, on the CPU. Prints a table and a JSON line, medians and ranges in seconds.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.report import print_json, shown, spread

_ROOT = pathlib.Path(__file__).parents[1]
_ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def of_python(script: str) -> float:
    """Seconds of a process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=_ENVIRONMENT)
    return time.perf_counter() - began


def until_first_step(base: pathlib.Path, workdir: pathlib.Path) -> float:
    """Seconds until train.py has written the metrics of its first step."""
    flags = [
        f"--config={_ROOT / 'configs' / 'shakespeare_char_cpu.py'}",
        f"--config.data.source=text:{base / 'corpus.txt'}",
        f"--config.data.cache_dir={base / 'tokens'}",
        f"--compile_cache={base / 'xla'}",
        "--config.train.log_every=1",
        f"--workdir={workdir}",
    ]
    metrics = workdir / "metrics.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(_ROOT / "train.py"), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_ENVIRONMENT,
    )
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"train.py ended with {process.returncode} before its first step")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for _ in range(flags.rounds):
        with tempfile.TemporaryDirectory() as folder:
            base = pathlib.Path(folder)
            letters = np.random.default_rng(0).integers(0, 65, 2**20) + ord("0")
            (base / "corpus.txt").write_text("".join(map(chr, letters)))
            help_script = "import sys; from gpt2_jax.cli.main import main; sys.exit(main(['--help']))"
            turn = {
                "python": of_python("pass"),
                "help": of_python(help_script),
                "imports_of_jax": of_python("import jax, flax.linen, optax, orbax.checkpoint, grain"),
                "first_step_the_first_time": until_first_step(base, base / "first"),
                "first_step_the_second_time": until_first_step(base, base / "second"),
            }
        for name, value in turn.items():
            seconds.setdefault(name, []).append(value)
    figures = {name: spread(values, 2) for name, values in seconds.items()}
    for name, value in figures.items():
        print(f"{name:<28} {shown(value)}")
    print_json("startup", **figures)


if __name__ == "__main__":
    main()
