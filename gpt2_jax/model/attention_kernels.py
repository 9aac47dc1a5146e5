"""Fused causal self-attention for training: cuDNN on NVIDIA GPUs, splash attention on TPUs, and which of them can run.

Both keep scores and softmax in float32 on the chip and never write the `[T, T]` matrix to memory. What they cannot do
(attention dropout, float32, a cache) is left to the plain XLA path in `attention.py`.

Shapes: B batch, T length, H heads, K head dimension.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.errors import UsageError
from gpt2_jax.sharding import partition_spec

# What the backward pass needs of the kernels, as remat policies know it: a name, and the primitive of cuDNN.
_RESIDUALS = "attention_residuals"
_CUDNN_FORWARD = "dot_product_attention_fwd"

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def choose_attention(
    wanted: str, device: jax.Device, *, dtype: str, head_dim: int, length: int, attn_dropout: float
) -> tuple[str, str]:
    """The attention path of a training run, "xla", "cudnn" or "splash", and a line for the log that says why.

    Args:
      wanted: `model.attention`; "auto" takes the fused kernel of the platform where it can run, else "xla".
      device: one of the run's devices; nothing runs on it, so it may be that of a topology.
      dtype: `model.dtype`.
      head_dim: K.
      length: T; with several lengths, their greatest common divisor.
      attn_dropout: dropout rate on the attention weights.

    Raises:
      UsageError: a path that was asked for by name cannot run here.
    """
    obstacles = {
        "cudnn": _cudnn_obstacle(device, dtype, head_dim, length),
        "splash": _splash_obstacle(device, dtype, head_dim, length),
    }
    if attn_dropout:
        dropout = f"it has no attention dropout (model.attn_pdrop={attn_dropout:g}; set it to 0)"
        obstacles = {path: obstacle or dropout for path, obstacle in obstacles.items()}
    if obstacles.get(wanted):
        possible = ", ".join(["auto", "xla", *(path for path, obstacle in obstacles.items() if not obstacle)])
        raise UsageError(f"model.attention={wanted} cannot run here: {obstacles[wanted]}; allowed: {possible}")
    if wanted != "auto":
        return wanted, f"{wanted}, as configured"
    native = {"gpu": "cudnn", "tpu": "splash"}.get(device.platform)
    if native is None:
        return "xla", "xla"
    return ("xla", f"xla; not {native}: {obstacles[native]}") if obstacles[native] else (native, native)


def _cudnn_obstacle(device: jax.Device, dtype: str, head_dim: int, length: int) -> str:
    """Why cuDNN's attention cannot run, or "". The limits are those that `jax.nn.dot_product_attention` checks."""
    capability = str(getattr(device, "compute_capability", ""))
    # Of an AMD GPU it is a name like gfx942.
    if device.platform != "gpu" or not re.fullmatch(r"\d+\.\d+", capability):
        return "it needs an NVIDIA GPU"
    generation = int(capability.split(".")[0])
    largest = 256 if generation >= 9 else 128
    if generation < 8:
        return f"it needs a GPU of compute capability 8.0 or newer (A100, L4, H100), this one has {capability}"
    if dtype not in ("bfloat16", "float16"):
        return f"it needs model.dtype bfloat16 or float16, not {dtype}"
    if head_dim % 8 or head_dim > largest:
        return f"it needs a head dimension that is a multiple of 8 up to {largest}, not {head_dim}"
    # JAX lets odd lengths pass, but the backward pass has been seen to fail on them.
    return f"it needs an even context length, not {length}" if length % 2 else ""


def _splash_obstacle(device: jax.Device, dtype: str, head_dim: int, length: int) -> str:
    """Why splash attention cannot run, or "". The limits are those within which it compiles (libtpu 0.0.41, 0.0.50)."""
    # The matrix units of v2 and v3 take no bfloat16 from a kernel.
    if device.platform != "tpu" or device.device_kind.startswith(("TPU v2", "TPU v3")):
        return "it needs a TPU v4 or newer"
    if dtype != "bfloat16":
        return f"it needs model.dtype bfloat16, not {dtype}"
    if not 8 <= head_dim <= 256:
        return f"it needs a head dimension from 8 to 256, not {head_dim}"
    return f"it needs a context length that is a multiple of 128, not {length}" if length % 128 else ""


def cudnn_attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    """Causal attention `[B, T, H, K]` by cuDNN, each device with its part of B and H."""
    # is_causal, never a mask: cuDNN would read a mask as a bias, at three times the time.
    kernel = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return _on_each_device(kernel, q_BTHK, k_BTHK, v_BTHK)


def splash_attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Causal attention `[B, T, H, K]` by JAX's splash attention, each device with its part of B and H.

    T must be a multiple of 128. `interpret` runs the kernel as plain XLA operations, for tests without a TPU.
    """
    return _on_each_device(functools.partial(_splash, interpret=interpret), q_BTHK, k_BTHK, v_BTHK)


# By the value of `model.attention`.
KERNELS: dict[str, Kernel] = {"cudnn": cudnn_attention, "splash": splash_attention}


def _on_each_device(kernel: Kernel, q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    """Runs the kernel by shards where a mesh is in use: XLA cannot split a custom call."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q_BTHK, k_BTHK, v_BTHK)
    spec = partition_spec(("batch", "length", "heads", "head_dim"))
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q_BTHK, k_BTHK, v_BTHK)


def _splash(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, *, interpret: bool) -> jax.Array:
    # Here, so that only TPU runs wait for Pallas to be imported.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        make_splash_mha_single_device,
    )

    _, T, H, K = q_BTHK.shape
    # 1024 and the fused backward pass are faster than the kernel's default of 128 (v6e: 1.8 to 1.3 ms for both passes).
    # A wider head needs smaller blocks to fit the 16 MiB that a TPU v4 gives a kernel.
    block = next(size for size in (1024 if K <= 128 else 512, 512, 256, 128) if T % size == 0)
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    attend = make_splash_mha_single_device(
        MultiHeadMask([CausalMask((T, T))] * H),
        block_sizes=sizes,
        residual_checkpoint_name=_RESIDUALS,
        interpret=interpret,
    )
    # The kernel does not scale. Exact where K is a power of 4, as GPT-2's 64 is.
    q_BTHK = (q_BTHK.astype(jnp.float32) / math.sqrt(K)).astype(q_BTHK.dtype)
    out_BHTK = jax.vmap(attend)(*(x_BTHK.swapaxes(1, 2) for x_BTHK in (q_BTHK, k_BTHK, v_BTHK)))
    return out_BHTK.swapaxes(1, 2)


def attention_saveable(primitive: Any, *_: Any, **params: Any) -> bool:
    """Remat policy that keeps what the backward kernels read (the output and the `[B, H, T]` log-sums).

    To be joined with others by `jax.checkpoint_policies.save_from_both_policies`; without it the backward pass runs
    the forward kernel once more.
    """
    return params.get("name") == _RESIDUALS or primitive.name.startswith(_CUDNN_FORWARD)
