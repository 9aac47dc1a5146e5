"""Cases in which this package and transformers must agree: shapes, weights and tokens that both make for themselves.

Weights are drawn by NumPy's RandomState, whose numbers never change, with a stream for each of Hugging Face's names;
so they need not be stored, and no table of names decides their order. Nothing here imports jax or torch.

Shapes: B batch, T length, D width, V vocabulary.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

STEPS = 10

# How far float32 may be from float32. Logits have a standard deviation of about 1.
LOGITS = 2e-4
LOSS = 1e-5
GRADIENT = 1e-4  # of the norm of each parameter's
LOSSES = 1e-4
# Shifting all keys alike leaves the softmax as it is, so this third of c_attn's bias has rounding for a gradient.
KEY_BIAS_GRADIENT = 1e-6

# The norms of the gradients lie around clip_norm, so that clipping changes some steps and not others.
OPTIMIZER: dict[str, Any] = {
    **{"schedule": "constant", "warmup_steps": 0},
    **{"b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip_norm": 1.5},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The shape of a model and of its batches."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int = 32
    vocab_size: int = 257
    batch_size: int = 2
    length: int = 24
    # Far above the usual ones, so that ten steps show them.
    learning_rate: float = 5e-3
    weight_decay: float = 0.5

    @property
    def optimizer(self) -> dict[str, Any]:
        """Settings of AdamW, by this package's names."""
        return {**OPTIMIZER, "learning_rate": self.learning_rate, "weight_decay": self.weight_decay}

    @property
    def model(self) -> dict[str, int]:
        """The fields that transformers and this package have under the same names."""
        names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        return {name: getattr(self, name) for name in names}


# Layers and heads of the four GPT-2s, with heads of 4 instead of 64.
REDUCED = {
    "124M": Case(n_layer=12, n_head=12, n_embd=48),
    "355M": Case(n_layer=24, n_head=16, n_embd=64),
    "774M": Case(n_layer=36, n_head=20, n_embd=80),
    "1558M": Case(n_layer=48, n_head=25, n_embd=100),
}
# At the small models' rate this one would go astray, and differences of rounding would grow with it.
FULL_124M = Case(
    12, 12, 768, n_positions=1024, vocab_size=50257, batch_size=1, length=64, learning_rate=6e-4, weight_decay=0.1
)


def draw(name: str, size: int | tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal numbers, float64: a stream for each name and seed."""
    return np.random.RandomState([seed, zlib.crc32(name.encode())]).standard_normal(size)


def weight(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor by Hugging Face's name without `transformer.`, float32; kernels are `[in, out]`.

    Logits have unit scale, attention prefers some tokens clearly, no branch is lost in the residual stream, and no
    scale is 1 and no bias 0.
    """
    values = draw(name, shape, seed=0)
    if name.endswith("c_proj.bias"):
        values *= 0.2 / math.sqrt(case.n_layer)
    elif name.endswith("bias"):
        values *= 0.2
    elif ".ln_" in f".{name}":
        values = 1 + 0.2 * values
    elif name.endswith("c_proj.weight"):
        values *= 1.5 / math.sqrt(shape[0] * case.n_layer)
    elif name in ("wte.weight", "wpe.weight"):
        values *= 1 / math.sqrt(shape[1])
    else:
        values *= 1.5 / math.sqrt(shape[0])
    return values.astype(np.float32)


def token_stream(case: Case) -> np.ndarray:
    """STEPS batches of tokens and one more, uint16: low ids are frequent, as in text."""
    count = STEPS * case.batch_size * case.length + 1
    uniform = np.random.RandomState(0).random_sample(count)
    return (case.vocab_size * uniform**2).astype(np.uint16)


def without_key_bias(gradients: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Gradients by Hugging Face's name with the middle third of c_attn's biases taken out, and these thirds."""
    kept, keys = dict(gradients), {}
    for name, gradient in gradients.items():
        if name.endswith("c_attn.bias"):
            query, keys[name], value = np.split(gradient, 3)
            kept[name] = np.concatenate([query, value])
    return kept, keys
