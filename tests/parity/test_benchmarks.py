"""The benchmarks beside torch run, at toy size, and their sides compute the same."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="needs torch and transformers: pip install -e '.[parity]'")
pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[parity]'")

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# A machine with jax, flax, optax, torch and transformers, and what they need, has none of these.
ABSENT = (
    "ml_collections",
    "orbax.checkpoint",
    "grain",
    "tiktoken",
    "tensorflow_datasets",
    "fsspec.gcs",
    "pyarrow.parquet",
)
FINDER = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {ABSENT!r}:
            raise ModuleNotFoundError(f"no module named {{name}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run(arguments: list[str], *path: pathlib.Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, REPOSITORY))), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_gpu_benchmark_needs_little_and_measures_all(tmp_path: pathlib.Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FINDER)
    out = tmp_path / "gpu.json"
    found = run(["benchmarks.gpu", "--platform=cpu", "--sizes=toy", f"--out={out}"], tmp_path)
    assert found == json.loads(out.read_text())
    assert found["left_out"] == []
    sides = found["sizes"]["toy"]
    for side in ("gpt2_jax", "torch"):
        assert sides[side]["tokens_per_second"] == pytest.approx(2 * 64 / sides[side]["step_seconds"])
        assert sides[side]["decode_8_tokens_per_second"] > sides[side]["decode_1_tokens_per_second"] > 0
        assert sides[side]["last_loss"] < sides[side]["first_loss"]
    assert sides["times_as_fast"].keys() == {
        "tokens_per_second",
        "decode_1_tokens_per_second",
        "decode_8_tokens_per_second",
    }


def test_what_there_is_no_time_for_is_told(tmp_path: pathlib.Path) -> None:
    found = run(["benchmarks.gpu", "--platform=cpu", "--sizes=toy", "--minutes=0.01"])
    assert found["left_out"] == ["toy gpt2_jax: no time left", "toy torch: no time left"]
    assert found["sizes"] == {}


@pytest.mark.parametrize("bias", ["true", "false"])
def test_the_sides_of_the_training_benchmark_agree(bias: str) -> None:
    """It checks itself that ten losses are the same, and ends with an error if not."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "bias": bias}
    found = run(
        [
            "benchmarks.train",
            f"--config={REPOSITORY / 'configs' / 'shakespeare_char_cpu.py'}",
            *(f"--config.model.{name}={value}" for name, value in shape.items()),
            *("--vocab_size=65", "--against=torch,gpt2_jax-dropout", "--rounds=1", "--seconds=0.2"),
        ]
    )
    sides = found["sides"]
    assert list(sides) == ["gpt2_jax", "torch", "gpt2_jax-dropout"]
    assert sides["torch"]["last_loss"] == pytest.approx(sides["gpt2_jax"]["last_loss"], abs=1e-4)
    assert sides["gpt2_jax-dropout"]["last_loss"] != sides["gpt2_jax"]["last_loss"]
    assert sides["torch"]["ours_times_as_fast"]["median"] > 0
