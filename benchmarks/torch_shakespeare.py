"""nanoGPT's run on Tiny Shakespeare for a CPU, on torch: 4 layers, width 128, context 64, 12 rows, 2,000 steps.

    python -m benchmarks.torch_shakespeare input.txt

The settings are those of nanoGPT's README: random windows, AdamW (1e-3 to 1e-4 along a cosine after 100 steps of
warm-up, betas 0.9 and 0.99, decay 0.1), clipping at 1, no dropout, no biases, GELU by erf. Prints `trained` after the
last step, and then the loss over the whole last tenth of the text.
"""

import math
import pathlib
import sys

import numpy as np
import torch

from benchmarks.torch_gpt2 import TorchTrainer
from gpt2_jax.config import ModelConfig, OptimizerConfig

STEPS, WARM_UP, RATE, LAST_RATE = 2000, 100, 1e-3, 1e-4
B, T = 12, 64


def learning_rate(step: int) -> float:
    """Of a step, from 0."""
    if step < WARM_UP:
        return RATE * (step + 1) / (WARM_UP + 1)
    progress = (step - WARM_UP) / (STEPS - WARM_UP)
    return LAST_RATE + (RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def main(path: str, seed: int) -> None:
    """Trains, tells, evaluates."""
    torch.manual_seed(seed)
    text = pathlib.Path(path).read_text("utf-8")
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.from_numpy(np.array([ids[character] for character in text], np.int64))
    train, tail = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": T, "vocab_size": len(ids)}
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = ModelConfig(**shape, **rates, bias=False, activation="gelu_erf")  # type: ignore[arg-type]
    trainer = TorchTrainer(config, OptimizerConfig(learning_rate=RATE, b2=0.99, weight_decay=0.1, clip_norm=1.0))
    for step in range(STEPS):
        starts = torch.randint(len(train) - T, (B,))
        windows = torch.stack([train[start : start + T + 1] for start in starts.tolist()])
        loss = trainer.step(windows[:, :-1], windows[:, 1:], learning_rate(step))
    print(f"trained {float(loss):.4f}", flush=True)
    trainer.model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(tail) - 1, T):
            window = tail[start : start + T + 1][None]
            total += float(trainer.model(window[:, :-1], window[:, 1:])) * (window.shape[1] - 1)
            count += window.shape[1] - 1
    print(f"loss {total / count:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
