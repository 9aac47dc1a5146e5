"""MFU's arithmetic, the table of chips, and the rate measured on a CPU."""

import dataclasses
import math

import jax
import pytest

from gpt2_jax.config import ModelConfig
from gpt2_jax.run import hardware

GPT2_124M = ModelConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=50257)


def test_flops_per_token_by_hand() -> None:
    # Matrix products of a token, forward: per layer 2 * (3 + 1 + 4 + 4) * 768^2 and 4 * 1024 * 768 for scores and
    # values; the head 2 * 768 * 50257. Backward costs twice as much. What is left of 6 N are biases and norms.
    D, L, T, V = 768, 12, 1024, 50257
    products = 3 * (L * (2 * 12 * D**2 + 4 * T * D) + 2 * D * V)
    vectors = 6 * (L * (3 * D + D + 4 * D + D + 4 * D) + 2 * D)
    assert hardware.flops_per_token(GPT2_124M, T) == pytest.approx(products + vectors, rel=1e-12)
    assert hardware.flops_per_token(GPT2_124M, T) == pytest.approx(0.855e9, rel=1e-2)


@dataclasses.dataclass
class Chip:
    device_kind: str
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("Somebody's new chip", None),
    ],
)
def test_chips_are_found_by_name(kind: str, peak: float | None) -> None:
    assert hardware.peak_flops(Chip(kind)) == peak  # type: ignore[arg-type]


def test_cpu_peak_is_measured() -> None:
    rate = hardware.measured_matmul_rate(256, 0.05)
    assert math.isfinite(rate)
    assert 1e8 < rate < 1e14
    assert hardware.peak_flops(jax.devices()[0]) > 1e8


def test_memory_is_that_of_this_process() -> None:
    assert 50 * 2**20 < hardware.memory_in_use() < 2**42
