"""Fused attention: the choice of a path, numbers and gradients, and what each platform is given to run.

Splash attention runs here in Pallas's interpreter; of cuDNN's, which runs on NVIDIA alone, the lowered program is read.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.numpy_gpt2 import causal_softmax

from gpt2_jax.config import MeshConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.model.attention_kernels import (
    attention_saveable,
    choose_attention,
    cudnn_attention,
    splash_attention,
)
from gpt2_jax.sharding import make_mesh, use_mesh


@dataclasses.dataclass
class Chip:
    platform: str
    device_kind: str = ""
    compute_capability: str = ""


CPU = Chip("cpu", "cpu")
H100 = Chip("gpu", "NVIDIA H100 80GB HBM3", "9.0")
A100 = Chip("gpu", "NVIDIA A100-SXM4-80GB", "8.0")
V100 = Chip("gpu", "Tesla V100", "7.0")
MI300 = Chip("gpu", "AMD Instinct MI300X", "gfx942")
V5E = Chip("tpu", "TPU v5 lite")
V3 = Chip("tpu", "TPU v3")


def choose(wanted: str, chip: Chip, **changed: object) -> tuple[str, str]:
    case = {"dtype": "bfloat16", "head_dim": 64, "length": 1024, "attn_dropout": 0.0, **changed}
    return choose_attention(wanted, chip, **case)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chip", "changed", "path"),
    [
        (CPU, {}, "xla"),
        (H100, {}, "cudnn"),
        (H100, {"dtype": "float16"}, "cudnn"),
        (H100, {"dtype": "float32"}, "xla"),
        (H100, {"attn_dropout": 0.1}, "xla"),
        (H100, {"head_dim": 256}, "cudnn"),
        (A100, {"head_dim": 256}, "xla"),
        (A100, {"head_dim": 68}, "xla"),
        (A100, {"length": 1023}, "xla"),
        (V100, {"dtype": "float16"}, "xla"),
        (MI300, {}, "xla"),
        (V5E, {}, "splash"),
        (V5E, {"length": 2048 + 128}, "splash"),
        (V5E, {"length": 1000}, "xla"),
        (V5E, {"dtype": "float16"}, "xla"),
        (V5E, {"attn_dropout": 0.1}, "xla"),
        (V5E, {"head_dim": 512}, "xla"),
        (V3, {}, "xla"),
    ],
)
def test_auto_takes_the_kernel_that_can_run_and_says_why_not(chip: Chip, changed: dict, path: str) -> None:
    chosen, line = choose("auto", chip, **changed)
    assert (chosen, line.split(";")[0]) == (path, path)
    if changed and path == "xla":
        reason = {"dtype": changed.get("dtype"), "attn_dropout": "model.attn_pdrop=0.1"}
        assert str(next(reason.get(key) or value for key, value in changed.items())) in line or chip is V100


@pytest.mark.parametrize(
    ("wanted", "chip", "changed", "message"),
    [
        ("cudnn", CPU, {}, "^model.attention=cudnn cannot run here: it needs an NVIDIA GPU; allowed: auto, xla$"),
        ("cudnn", MI300, {}, "it needs an NVIDIA GPU"),
        (
            "splash",
            H100,
            {},
            "=splash cannot run here: it needs a TPU v4 or newer; allowed: auto, xla, cudnn$",
        ),
        ("cudnn", V100, {}, "compute capability 8.0 or newer .*, this one has 7.0; allowed: auto, xla$"),
        ("cudnn", H100, {"attn_dropout": 0.1}, r"no attention dropout \(model.attn_pdrop=0.1; set it to 0\)"),
        ("splash", V5E, {"dtype": "float32"}, "needs model.dtype bfloat16, not float32"),
        ("splash", V5E, {"length": 64}, "multiple of 128, not 64"),
    ],
)
def test_a_configured_path_that_cannot_run_is_refused(wanted: str, chip: Chip, changed: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        choose(wanted, chip, **changed)
    assert "\n" not in str(caught.value)


def test_a_configured_path_that_can_run_is_taken() -> None:
    assert choose("xla", H100)[0] == choose("xla", V5E)[0] == "xla"
    assert choose("cudnn", H100)[0] == "cudnn"
    assert choose("splash", V5E)[0] == "splash"


def numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray) -> list[np.ndarray]:
    """Output and gradients of q, k, v in float64; arrays [B, T, H, K]."""
    q, k, v, d_out = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, d_out))
    weights = causal_softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]))
    d_weights = d_out @ v.swapaxes(2, 3)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    results = (weights @ v, d_scores @ k, d_scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ d_out)
    return [x.swapaxes(1, 2) for x in results]


def splash_with_gradients(*arrays: np.ndarray) -> list[np.ndarray]:
    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple[jax.Array, ...]:
        out, backward = jax.vjp(lambda *qkv: splash_attention(*qkv, interpret=True), q, k, v)
        return out, *backward(d_out)

    return [np.asarray(x, np.float64) for x in run(*arrays)]


@pytest.mark.parametrize(
    ("dtype", "K", "mesh", "tolerance"),
    [
        ("float32", 64, (1, 2, 2), 3e-6),
        pytest.param("float32", 80, None, 3e-6, marks=pytest.mark.slow),
        pytest.param("bfloat16", 64, (2, 1, 2), 1e-2, marks=pytest.mark.slow),
    ],
)
def test_splash_attention_and_its_gradients(
    dtype: str, K: int, mesh: tuple[int, int, int] | None, tolerance: float
) -> None:
    # 384 positions are three blocks of the kernel: wholly seen, on the diagonal, and skipped.
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, 384, 2, K)), dtype) for _ in range(4)]
    if mesh is None:
        found = splash_with_gradients(*arrays)
    else:
        with use_mesh(make_mesh(MeshConfig(*mesh), jax.devices()[:4])):
            found = splash_with_gradients(*arrays)
    for got, expected in zip(found, numpy_attention(*arrays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def lowered_layers(attention, policy, platform: str) -> str:
    """The program of a platform for the gradients of two scanned, rematerialised layers on a (2, 2, 2) mesh."""

    def layer(x_BTHK: jax.Array, w_3KK: jax.Array) -> jax.Array:
        return x_BTHK + attention(*(x_BTHK @ w_KK for w_KK in w_3KK))

    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

    def loss(x_BTHK: jax.Array, w_L3KK: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x_BTHK, w_L3KK)[0].astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((8, 128, 4, 64), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((2, 3, 64, 64), jnp.bfloat16)
    with use_mesh(make_mesh(MeshConfig(2, 2, 2))):
        return jax.jit(jax.grad(loss, argnums=1)).trace(x, w).lower(lowering_platforms=(platform,)).as_text()


KEEP_NOTHING = jax.checkpoint_policies.nothing_saveable


@pytest.mark.parametrize(("policy", "forward"), [(attention_saveable, 1), (KEEP_NOTHING, 2)])
def test_tpu_program_has_each_kernel_once_if_its_results_are_kept(policy, forward: int) -> None:
    program = lowered_layers(splash_attention, policy, "tpu")
    kernels = re.findall(r'kernel_name = "(\w+)"', program)
    assert [kernel.split("_")[2] for kernel in kernels] == ["fwd"] * forward + ["dkv"]


@pytest.mark.parametrize(("policy", "forward"), [(attention_saveable, 1), (KEEP_NOTHING, 2)])
def test_cuda_program_has_each_kernel_once_if_its_results_are_kept(policy, forward: int, monkeypatch) -> None:
    # JAX asks for cuDNN's version when it traces; no other part of cuDNN takes part in lowering.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
    program = lowered_layers(cudnn_attention, policy, "cuda")
    kernels = re.findall(r"@__cudnn\$(\w+)", program)
    assert kernels == ["fmhaSoftmax"] * forward + ["fmhaSoftmaxBackward"]
    # Each device has its part of the batch and of the heads, masks by itself, and scales by 1 / sqrt(64).
    assert program.count("\\22mask_type\\22: \\22CAUSAL\\22") == len(kernels)
    assert program.count("\\22fmha_scale\\22: 0.125") == len(kernels)
    assert "tensor<2x2x128x64xbf16>" in program
    assert "128x128x" not in program  # no mask, no scores
