"""The collectives of the real train step on a TPU slice, against the least that its parallelism needs.

Sizes are payloads: a gathered array, an array to be scattered; an all-reduce is both, one after the other.
"""

import functools

import pytest

from gpt2_jax.config import MeshConfig, ModelConfig, RunConfig, TrainConfig
from gpt2_jax.model.gpt2 import parameter_count
from gpt2_jax.planning.collectives import axes_of, read_collectives
from gpt2_jax.planning.compile_worker import lower_train
from gpt2_jax.planning.topology import devices, parse_topologies
from gpt2_jax.sharding import make_mesh

pytestmark = pytest.mark.tpu

L, D, T, B = 4, 256, 256, 32
MODEL = ModelConfig(
    n_layer=L, n_head=4, n_embd=D, n_positions=T, vocab_size=1000, dtype="bfloat16", attention="xla",
    embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
)  # fmt: skip
PARAMETERS = 2 * parameter_count(MODEL)  # bytes, in the type of the products
SLACK = 1.25
Moved = dict[tuple[tuple[str, ...], str], int]  # by axes and kind
SIZES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1, "collective-permute": 1}


@functools.cache
def moved(data: int, fsdp: int, tensor: int, remat: str = "none", loss_chunk: int = 0) -> Moved:
    """Bytes per axes and kind in one step on 16 chips."""
    config = RunConfig(
        model=ModelConfig(**{**vars(MODEL), "remat": remat}),
        train=TrainConfig(batch_size=B, loss_chunk=loss_chunk),
        mesh=MeshConfig(data, fsdp, tensor),
    )
    (topology,) = parse_topologies("v5e:4x4")
    mesh = make_mesh(config.mesh, devices(topology))
    total: Moved = {}
    for one in read_collectives(lower_train(config, mesh).compile().as_text()):
        key = (axes_of(one, mesh), one.kind)
        total[key] = total.get(key, 0) + SIZES[one.kind] * one.payload_bytes * one.executions
    return total


def along(axis: str, total: Moved) -> int:
    return sum(size for (axes, _), size in total.items() if axis in axes)


def test_data_parallelism_reduces_gradients_once() -> None:
    total = moved(16, 1, 1)
    assert {kind for _, kind in total} == {"all-reduce"}
    assert 2 * PARAMETERS <= along("data", total) <= SLACK * 2 * PARAMETERS


@pytest.mark.parametrize(("remat", "loss_chunk"), [("none", 0), ("dots", 0), ("full", 0), ("full", T // 4)])
def test_fsdp_gathers_once_per_pass_and_scatters_once(remat: str, loss_chunk: int) -> None:
    total = moved(1, 16, 1, remat, loss_chunk)
    gathered = total[("fsdp",), "all-gather"]
    # Of the token table, by all-to-all and a sum.
    scattered = total[("fsdp",), "reduce-scatter"] + total[("fsdp",), "all-to-all"]
    # Forwards and backwards (recomputing is part of that); the token table, here a fifth of all, once.
    assert 1.5 * PARAMETERS <= gathered <= SLACK * 2 * PARAMETERS
    assert 0.9 * PARAMETERS <= scattered <= SLACK * PARAMETERS
    assert along("fsdp", total) <= SLACK * 3 * PARAMETERS


def test_tensor_parallelism_needs_four_all_reduces_per_layer() -> None:
    total = moved(1, 4, 4)
    activations = 2 * (B // 4) * T * D
    theory = L * 4 * 2 * activations
    assert theory <= along("tensor", total) <= SLACK * theory
    assert total[("tensor",), "all-gather"] >= theory / 2
    assert total[("tensor",), "reduce-scatter"] >= theory / 2
    # Each device has a quarter of the parameters to gather and to scatter.
    fsdp = sum(size for (axes, _), size in total.items() if axes == ("fsdp",))
    assert fsdp <= SLACK * 3 * PARAMETERS / 4


def test_attention_is_a_kernel_on_a_tpu() -> None:
    model = ModelConfig(**{**vars(MODEL), "attention": "auto"})
    (topology,) = parse_topologies("v5e:2x2")
    config = RunConfig(model=model, train=TrainConfig(batch_size=4), mesh=MeshConfig(1, 2, 2))
    program = lower_train(config, make_mesh(config.mesh, devices(topology))).compile().as_text()
    assert program.count("tpu_custom_call") >= 2  # forwards and backwards
    assert f"[2,2,{T},{T}]" not in program  # the scores of a device
