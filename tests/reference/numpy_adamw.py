"""AdamW, clipping, schedules and the moving average of the weights by hand, in NumPy float64.

The tests compare the optimizer of the package with these functions. All take flat dicts: name -> array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.float64]]


def global_norm(grads: Arrays) -> float:
    """Euclidean norm of all gradients taken as one vector."""
    return math.sqrt(sum(float((g**2).sum()) for g in grads.values()))


def clip_by_global_norm(grads: Arrays, clip_norm: float) -> Arrays:
    """Scale all gradients together so that their global norm is at most `clip_norm`; 0 switches it off."""
    norm = global_norm(grads)
    if clip_norm == 0 or norm <= clip_norm:
        return grads
    return {name: g * (clip_norm / norm) for name, g in grads.items()}


class AdamW:
    """AdamW with bias correction and decoupled decay of the named leaves only.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
    p = p - lr (m / (1 - b1^s) / (sqrt(v / (1 - b2^s)) + eps) + weight_decay p),  s = 1, 2, ...
    """

    def __init__(
        self,
        params: Arrays,
        *,
        learning_rate: Callable[[int], float],
        b1: float,
        b2: float,
        eps: float,
        weight_decay: float,
        decayed: Collection[str],
        clip_norm: float = 0.0,
    ) -> None:
        self.params = {name: p.copy() for name, p in params.items()}
        self.m = {name: np.zeros_like(p) for name, p in params.items()}
        self.v = {name: np.zeros_like(p) for name, p in params.items()}
        self.learning_rate, self.b1, self.b2, self.eps = learning_rate, b1, b2, eps
        self.weight_decay, self.decayed, self.clip_norm = weight_decay, decayed, clip_norm
        self.count = 0

    def update(self, grads: Arrays) -> None:
        self.count += 1
        rate = self.learning_rate(self.count)
        for name, g in clip_by_global_norm(grads, self.clip_norm).items():
            self.m[name] = self.b1 * self.m[name] + (1 - self.b1) * g
            self.v[name] = self.b2 * self.v[name] + (1 - self.b2) * g**2
            m_hat = self.m[name] / (1 - self.b1**self.count)
            v_hat = self.v[name] / (1 - self.b2**self.count)
            decay = self.weight_decay if name in self.decayed else 0.0
            step = m_hat / (np.sqrt(v_hat) + self.eps) + decay * self.params[name]
            self.params[name] = self.params[name] - rate * step


def schedule(
    kind: str,
    s: int,
    *,
    peak: float,
    warmup: int,
    total: int,
    end_fraction: float = 0.0,
    decay_steps: int = 0,
) -> float:
    """Learning rate of update number `s` = 1, 2, ..., `total`.

    All kinds warm up linearly: peak * s / warmup for s <= warmup. Afterwards:
    cosine, linear   fall to peak * end_fraction, reached at s = total
    inverse_sqrt     peak * sqrt(warmup / s), with a warm-up of at least 1
    constant         peak
    wsd              peak, then linear to peak * end_fraction over the last `decay_steps` updates
    """
    end = peak * end_fraction
    if warmup and s <= warmup:
        return peak * s / warmup
    if kind == "constant":
        return peak
    if kind == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / s)
    if kind == "wsd":
        done = (s - (total - decay_steps)) / decay_steps
        return peak + (end - peak) * min(max(done, 0.0), 1.0)
    done = min((s - warmup) / (total - warmup), 1.0)
    if kind == "linear":
        return peak + (end - peak) * done
    if kind == "cosine":
        return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"no schedule named {kind!r}")


def moving_average(average: Arrays, params: Arrays, decay: float) -> Arrays:
    """One step of the exponential moving average: decay * average + (1 - decay) * params."""
    return {name: decay * average[name] + (1 - decay) * params[name] for name in params}
