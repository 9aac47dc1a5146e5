"""What the chip could do: peak arithmetic, for the model FLOPs utilisation (MFU), and memory."""

import re
import resource
import sys
import time

import jax
import jax.numpy as jnp

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.gpt2 import parameter_count

# Dense bfloat16 matrix products, FLOP/s per JAX device, as the makers publish them. By the first words of
# `device_kind`.
PEAK_FLOPS = {
    "TPU v3": 123e12 / 2,  # a device is one core of two
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a device is one core of two
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100": 125e12,  # float16
    "Tesla T4": 65e12,  # float16
}


def flops_per_token(config: ModelConfig, context_length: int) -> float:
    """Arithmetic of one training token, 6 N + 12 L H K T (Chowdhery et al. 2022, "PaLM", appendix B).

    N leaves out the position table, which takes part in no matrix product; recomputation does not count.
    """
    matrix_parameters = parameter_count(config) - config.n_positions * config.n_embd
    return 6.0 * matrix_parameters + 12.0 * config.n_layer * config.n_embd * context_length


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s that the device could reach: from the table; on a CPU what a matrix product reaches now; else None."""
    if device.platform == "cpu":
        return measured_matmul_rate()
    # Whole words: an L40 is no L4.
    known = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}\b", device.device_kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def measured_matmul_rate(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a float32 product of two size x size matrices on the first device: the fastest of several."""
    multiply = jax.jit(jnp.matmul)
    a = jnp.ones((size, size), jnp.float32)
    multiply(a, a).block_until_ready()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def memory_in_use() -> float:
    """Peak bytes: of the first device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
