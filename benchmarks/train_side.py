"""One side of `benchmarks.train`, in a process of its own: reads its task as JSON, trains, writes figures as JSON.

    echo TASK | python -m benchmarks.train_side

TASK: `side` (a name of SIDES), `config` (a RunConfig as a dict), `weights` (npz of Hugging Face's names), `seconds` to
measure, `threads`. The batches and the weights are the same for all sides, and the rate of learning is constant.

Shapes: N batches, B rows, T length.
"""

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import OtherPrograms, keep_to_cores, peak_memory
from gpt2_jax.cli.malloc import KEEP, VARIABLE
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import run_config

_BATCHES, _LOSSES, _WINDOWS = 4, 10, 5


@dataclasses.dataclass(frozen=True)
class Side:
    """How one side trains.

    Attributes:
      torch: on torch; else ours.
      compiled: by torch.compile.
      dtype: of the matrix products.
      dropout: rate of all dropouts; None: the config's.
      keep_memory: whether the allocator keeps freed memory (`cli/malloc.py`).
    """

    torch: bool = False
    compiled: bool = False
    dtype: str = "float32"
    dropout: float | None = None
    keep_memory: bool = False

    def environment(self) -> dict[str, str]:
        """What must be set before the process starts."""
        return {VARIABLE: KEEP} if self.keep_memory else {}

    def config(self, config: RunConfig) -> RunConfig:
        """The config as this side trains it."""
        rates = {} if self.dropout is None else dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.dropout)
        model = dataclasses.replace(config.model, dtype=self.dtype, **rates)
        return dataclasses.replace(config, model=model)


SIDES = {
    "gpt2_jax": Side(keep_memory=True),
    "gpt2_jax-system-malloc": Side(),
    "gpt2_jax-bf16": Side(keep_memory=True, dtype="bfloat16"),
    "gpt2_jax-dropout": Side(keep_memory=True, dropout=0.1),
    "torch": Side(torch=True),
    "torch-dropout": Side(torch=True, dropout=0.1),
    "torch-bf16": Side(torch=True, dtype="bfloat16"),
    "torch-compile": Side(torch=True, compiled=True),
    "torch-compile-bf16": Side(torch=True, compiled=True, dtype="bfloat16"),
}

Step = Callable[[int], float | None]


def batches(config: RunConfig) -> np.ndarray:
    """Random tokens `[N, B, T + 1]`, the same in each process."""
    shape = (_BATCHES, config.train.batch_size, config.context_length + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape)


def our_step(config: RunConfig, weights: dict[str, np.ndarray]) -> tuple[Step, Callable[[], float]]:
    """Takes the number of a step, or -1 to wait and give the loss of the last one; and what measures products."""
    import jax

    from gpt2_jax.exchange.names import params_from_tensors
    from gpt2_jax.run.hardware import measured_matmul_rate
    from gpt2_jax.run.step_settings import for_device, make_settings
    from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
    from gpt2_jax.training.steps import train_step
    from gpt2_jax.training.train_state import sharded_state

    mesh = make_mesh(config.mesh)
    config, _ = for_device(config, jax.devices()[0])
    settings = make_settings(config, mesh)
    tokens_NBT = batches(config).astype(np.int32)
    ones_BT = np.ones(tokens_NBT[0, :, 1:].shape, np.float32)
    with use_mesh(mesh):
        placed = [
            place_batch({"tokens": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:], "weights": ones_BT}, mesh)
            for tokens_BT in tokens_NBT
        ]
        params = params_from_tensors(config.model, weights.__getitem__)
        state = sharded_state(settings.model, settings.optimizer, params, mesh, ema=settings.ema_decay > 0)
    del params
    metrics: Any = None

    def step(number: int) -> float | None:
        nonlocal state, metrics
        if number < 0:
            jax.block_until_ready(state)
            return float(metrics["loss_sum"]) / float(metrics["weight_sum"])
        with use_mesh(mesh):
            state, metrics = train_step(state, placed[number % _BATCHES], settings=settings)
        return None

    return step, measured_matmul_rate


def torch_step(
    config: RunConfig, side: Side, weights: dict[str, np.ndarray], threads: int
) -> tuple[Step, Callable[[], float]]:
    """The same for torch."""
    import torch

    from benchmarks.torch_gpt2 import TorchTrainer, torch_matmul_rate

    torch.set_num_threads(threads)
    trainer = TorchTrainer(config.model, config.optimizer, dtype=side.dtype, compiled=side.compiled)
    trainer.model.load(weights)
    placed = torch.from_numpy(batches(config))
    loss: Any = None

    def step(number: int) -> float | None:
        nonlocal loss
        if number < 0:
            return float(loss)
        tokens_BT = placed[number % _BATCHES]
        loss = trainer.step(tokens_BT[:, :-1], tokens_BT[:, 1:])
        return None

    return step, torch_matmul_rate


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Figures of the side."""
    keep_to_cores(task["threads"])
    side = SIDES[task["side"]]
    config = side.config(run_config(task["config"]))
    with np.load(task["weights"], allow_pickle=False) as file:
        weights = dict(file)
    if side.torch:  # what is imported is no part of the memory
        import benchmarks.torch_gpt2  # noqa: F401
    else:
        import gpt2_jax.exchange.names
        import gpt2_jax.run.step_settings  # noqa: F401
    before = peak_memory()
    if side.torch:
        step, matmul_rate = torch_step(config, side, weights, task["threads"])
    else:
        step, matmul_rate = our_step(config, weights)
    weights.clear()
    losses, times = [], []
    for number in range(_LOSSES):
        began = time.perf_counter()
        step(number)
        losses.append(step(-1))
        times.append(time.perf_counter() - began)
    in_window = max(1, round(task["seconds"] / _WINDOWS / min(times[1:])))
    steps = _WINDOWS * in_window
    rates = [matmul_rate()]
    usage, others = resource.getrusage(resource.RUSAGE_SELF), OtherPrograms()
    windows = []
    for first in range(0, steps, in_window):
        began = time.perf_counter()
        for number in range(first, first + in_window):
            step(_LOSSES + number)
        step(-1)
        windows.append((time.perf_counter() - began) / in_window)
    used = resource.getrusage(resource.RUSAGE_SELF)
    busy = others.cores()
    rates.append(matmul_rate())
    return {
        "step_seconds": statistics.median(windows),  # a heap that grows once more shows in one
        "steps": steps,
        "first_step_seconds": times[0],
        "losses": losses,
        "processor_seconds": (used.ru_utime + used.ru_stime - usage.ru_utime - usage.ru_stime) / steps,
        "system_seconds": (used.ru_stime - usage.ru_stime) / steps,
        "page_faults": (used.ru_minflt - usage.ru_minflt) / steps,
        "peak_bytes": peak_memory() - before,
        "matmul_rate": max(rates),
        "cores_of_others": busy,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
