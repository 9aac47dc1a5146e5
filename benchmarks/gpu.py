"""How fast is one GPU: training and decoding of all four sizes, beside torch compile with flash attention.

    python -m benchmarks.gpu --out=gpu.json

Needs jax, flax, optax, torch and transformers and nothing else; installs nothing, downloads nothing, and ends within
`--minutes`. Each side of each size is a process of its own that trains on random tokens at a context of 1,024
(bfloat16 products over float32 parameters, a vocabulary of 50,304, no dropout, AdamW, clipping) and then decodes
greedily (128 tokens after a prompt of 128, one row and eight). torch: nanoGPT's shape, fused attention and AdamW,
`torch.compile`, from 774M on of the blocks alone, as its documentation advises against long compiles, with head and
loss as they are; decoding: transformers' `generate`, its weights in bfloat16. Ours as `train.py` and `gpt2-jax
generate` run it. Each side has random weights of its own. The product rate is that of two 8,192 x 8,192 matrices in
bfloat16.

Prints a line per measurement and writes all figures as JSON, also those that it had when the time was up. With
`--platform=cpu --sizes=toy` it shows on any machine that it works.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig

# Layers, heads, width, context, vocabulary, rows of a training batch, rows of decoding.
SIZES = {
    "124m": (12, 12, 768, 1024, 50304, 32),
    "355m": (24, 16, 1024, 1024, 50304, 16),
    "774m": (36, 20, 1280, 1024, 50304, 8),
    "1558m": (48, 25, 1600, 1024, 50304, 4),
    "toy": (2, 2, 64, 64, 300, 2),
}
_BLOCK_BY_BLOCK = 36  # layers
_TRAIN_SECONDS = {"gpu": 6.0, "cpu": 0.5}
_WARM_UP = 5  # steps


def config_of(size: str, platform: str) -> RunConfig:
    """What is trained."""
    n_layer, n_head, n_embd, length, vocab, batch_size = SIZES[size]
    model = ModelConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=length,
        vocab_size=vocab,
        embd_pdrop=0,
        attn_pdrop=0,
        resid_pdrop=0,
        dtype="bfloat16" if platform == "gpu" else "float32",
    )
    return RunConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0),
        train=TrainConfig(batch_size=batch_size),
        mesh=MeshConfig(data=1),
    )


def tokens_of(config: RunConfig) -> np.ndarray:
    """Random ids `[B, T + 1]`, the same for both sides."""
    shape = (config.train.batch_size, config.context_length + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape)


def timed_steps(step: Any, wait: Any, seconds: float) -> dict[str, float]:
    """Seconds of the first step, and the median of windows of later ones; `wait` gives the last loss."""
    began = time.perf_counter()
    step()
    first_loss = wait()
    first = time.perf_counter() - began
    for _ in range(_WARM_UP):
        step()
    wait()
    began = time.perf_counter()
    step()
    wait()
    in_window = max(1, round(seconds / 5 / (time.perf_counter() - began)))
    windows = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(in_window):
            step()
        last_loss = wait()
        windows.append((time.perf_counter() - began) / in_window)
    return {
        "first_step_seconds": first,
        "step_seconds": statistics.median(windows),
        "slowest_window": max(windows),
        "first_loss": first_loss,
        "last_loss": last_loss,
    }


def our_side(size: str, platform: str) -> dict[str, Any]:
    """Figures of this library."""
    import jax
    import jax.numpy as jnp

    from gpt2_jax.decoding.batch import Batch, Limits
    from gpt2_jax.decoding.layout import make_decoder
    from gpt2_jax.decoding.settings import Sampling
    from gpt2_jax.run.fit_memory import memory_limit, with_memory_fitted
    from gpt2_jax.run.hardware import flops_per_token
    from gpt2_jax.run.step_settings import for_device, make_settings
    from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
    from gpt2_jax.training.steps import train_step
    from gpt2_jax.training.train_state import sharded_init

    if jax.default_backend() != platform:
        raise SystemExit(f"--platform={platform}, but JAX runs on {jax.default_backend()}")
    config = config_of(size, platform)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    device = mesh.devices.flat[0]
    config, choices = for_device(config, device)
    began = time.perf_counter()
    config, fitted = with_memory_fitted(config, mesh, memory_limit(device))
    fitting = time.perf_counter() - began
    settings = make_settings(config, mesh)
    tokens_BT = tokens_of(config).astype(np.int32)
    batch = {"tokens": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}
    batch["weights"] = np.ones(batch["tokens"].shape, np.float32)
    metrics: Any = None
    with use_mesh(mesh):
        placed = place_batch(batch, mesh)
        state = sharded_init(settings.model, settings.optimizer, 0, mesh)

        def step() -> None:
            nonlocal state, metrics
            state, metrics = train_step(state, placed, settings=settings)

        figures: dict[str, Any] = timed_steps(
            step,
            lambda: float(metrics["loss_sum"]) / float(jax.block_until_ready(metrics["weight_sum"])),
            _TRAIN_SECONDS[platform],
        )
    stats = device.memory_stats() or {}
    figures |= {
        "choices": f"{choices}; {fitted}",
        "fitting_seconds": fitting,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "flops_per_token": flops_per_token(config.model, config.context_length),
    }
    params = state.params
    del state
    decoder = make_decoder(config.model, params, config.model.vocab_size, dtype=config.model.dtype)
    for rows in (1, 8):
        prompts = tokens_BT[np.arange(rows) % len(tokens_BT), : prompt_length(config)].tolist()

        def write(prompts: list[list[int]] = prompts) -> None:
            batch = Batch(decoder, prompts, sampling=Sampling(temperature=0), limits=Limits(prompt_length(config)))
            assert sum(1 for _ in batch) == len(prompts) * prompt_length(config)

        figures[f"decode_{rows}_tokens_per_second"] = rows * prompt_length(config) / seconds_of(write)
    side = 8192 if platform == "gpu" else 512
    a = jnp.ones((side, side), config.model.dtype)
    multiply = jax.jit(lambda a: a @ a)
    figures["product_rate"] = 2 * side**3 / seconds_of(lambda: jax.block_until_ready(multiply(a)), times=20)
    return figures | {"device": device.device_kind, "jax": jax.__version__}


def their_side(size: str, platform: str) -> dict[str, Any]:
    """Figures of torch and transformers."""
    import torch
    import transformers

    from benchmarks.torch_gpt2 import TorchTrainer

    device = "cuda" if platform == "gpu" else "cpu"
    torch.set_float32_matmul_precision("high")
    config = config_of(size, platform)
    trainer = TorchTrainer(
        config.model,
        config.optimizer,
        device=device,
        dtype=config.model.dtype,
        compiled=platform == "gpu",
        block_by_block=config.model.n_layer >= _BLOCK_BY_BLOCK,
    )
    tokens_BT = torch.from_numpy(tokens_of(config)).to(device)
    losses: list[Any] = []

    def step() -> None:
        losses[:] = [trainer.step(tokens_BT[:, :-1], tokens_BT[:, 1:])]

    figures: dict[str, Any] = timed_steps(step, lambda: float(losses[0]), _TRAIN_SECONDS[platform])
    if platform == "gpu":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    trainer.free()
    shape = transformers.GPT2Config(
        vocab_size=config.model.vocab_size,
        n_positions=config.model.n_positions,
        n_embd=config.model.n_embd,
        n_layer=config.model.n_layer,
        n_head=config.model.n_head,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(shape).eval().to(device, getattr(torch, config.model.dtype))
    length = prompt_length(config)
    for rows in (1, 8):
        prompts_BP = tokens_BT[torch.arange(rows) % len(tokens_BT), :length]

        @torch.inference_mode()
        def write(prompts_BP: torch.Tensor = prompts_BP) -> None:
            mask = torch.ones_like(prompts_BP)
            out = model.generate(
                prompts_BP, attention_mask=mask, do_sample=False, use_cache=True, max_new_tokens=length
            )
            assert out.cpu().shape[1] == 2 * length

        figures[f"decode_{rows}_tokens_per_second"] = rows * length / seconds_of(write)
    return figures | {"torch": torch.__version__, "transformers": transformers.__version__}


def prompt_length(config: RunConfig) -> int:
    """Tokens of a prompt, and as many new ones."""
    return min(128, config.context_length // 2)


def seconds_of(call: Any, times: int = 3) -> float:
    """Median, after one call that is not counted."""
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(sizes: list[str], platform: str, minutes: float, out: pathlib.Path | None) -> dict[str, Any]:
    """All figures that there is time for; written after each."""
    end = time.monotonic() + 60 * minutes
    results: dict[str, Any] = {"benchmark": "gpu", "platform": platform, "sizes": {}, "left_out": []}
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if platform == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    for size in sizes:
        for side in ("gpt2_jax", "torch"):
            left = end - time.monotonic()
            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu",
                f"--platform={platform}",
                f"--side={side}",
                f"--sizes={size}",
            ]
            try:
                if left < 10:
                    raise subprocess.TimeoutExpired(command, left)
                done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=left)
            except subprocess.TimeoutExpired:
                results["left_out"].append(f"{size} {side}: no time left")
                continue
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
                results["left_out"].append(f"{size} {side}: {said[-1][:300]}")
                print(results["left_out"][-1], flush=True)
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            tokens = config_of(size, platform).train.batch_size * config_of(size, platform).context_length
            figures["tokens_per_second"] = tokens / figures["step_seconds"]
            results["sizes"].setdefault(size, {})[side] = figures
            _write(out, results)
            print(
                f"{size:<6} {side:<9} train {figures['tokens_per_second']:>10,.0f} tokens/s, first step "
                f"{figures['first_step_seconds']:.0f} s; decode {figures['decode_1_tokens_per_second']:,.0f} and "
                f"{figures['decode_8_tokens_per_second']:,.0f} tokens/s for one and eight rows",
                flush=True,
            )
        both = results["sizes"].get(size, {})
        if len(both) == 2:
            ours, theirs = both["gpt2_jax"], both["torch"]
            names = ("tokens_per_second", "decode_1_tokens_per_second", "decode_8_tokens_per_second")
            both["times_as_fast"] = {name: ours[name] / theirs[name] for name in names}
            model_flops = ours["flops_per_token"] * ours["tokens_per_second"]
            both["share_of_product_rate"] = model_flops / ours["product_rate"]
        _write(out, results)
    return results


def _write(out: pathlib.Path | None, results: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--sizes", default="124m,355m,774m,1558m", help=", ".join(SIZES))
    parser.add_argument("--minutes", type=float, default=9.5, help="to end within")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file (default: only printed)")
    parser.add_argument("--side", choices=("gpt2_jax", "torch"), help="measure one side of one size in this process")
    flags = parser.parse_args()
    sizes = flags.sizes.split(",")
    if unknown := set(sizes) - set(SIZES):
        parser.error(f"--sizes={','.join(sorted(unknown))}; allowed: {', '.join(SIZES)}")
    if flags.side:
        print(json.dumps((our_side if flags.side == "gpt2_jax" else their_side)(sizes[0], flags.platform)))
        return
    print(json.dumps(measure(sizes, flags.platform, flags.minutes, flags.out)))


if __name__ == "__main__":
    main()
