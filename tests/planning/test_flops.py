"""The count of matrix products: by hand, and against the products in the step's own program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Jaxpr, jaxprs_in_params

from gpt2_jax.config import ModelConfig, RunConfig, TrainConfig
from gpt2_jax.planning.flops import PARTS, Product, flops_table, step_products
from gpt2_jax.run.hardware import flops_per_token
from gpt2_jax.run.step_settings import make_settings
from gpt2_jax.sharding import make_mesh
from gpt2_jax.training.steps import train_step
from gpt2_jax.training.train_state import abstract_state

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def config(**changes: object) -> RunConfig:
    model = ModelConfig(n_layer=3, n_head=2, n_embd=8, n_positions=6, vocab_size=100, dtype="bfloat16")
    model_changes = {name: value for name, value in changes.items() if hasattr(model, name)}
    train_changes = {name: value for name, value in changes.items() if name not in model_changes}
    train = TrainConfig(batch_size=4, **train_changes)  # type: ignore[arg-type]
    return RunConfig(model=dataclasses.replace(model, **model_changes), train=train)


def dot_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of all `dot_general` below a jaxpr, those in loops as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
            total += 2.0 * math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(dot_flops, jaxprs_in_params(eqn.params)))
    return total


def traced_flops(run: RunConfig) -> float:
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    settings = make_settings(run, mesh)
    state = abstract_state(settings.model, settings.optimizer, mesh, ema=False)
    shape = (run.train.batch_size, run.context_length)
    batch = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in batch.items()}
    return dot_flops(train_step.trace(state, shapes, settings=settings).jaxpr.jaxpr)


@pytest.mark.parametrize(
    "changes",
    [{}, {"remat": "dots"}, {"remat": "full", "loss_chunk": 3, "microbatches": 2}],
    ids=["none", "dots", "full-chunked"],
)
def test_equals_the_products_of_the_traced_step(changes: dict[str, object]) -> None:
    run = config(**changes)
    counted = sum(product.flops for product in step_products(run, ONE, run.train.loss_chunk))
    assert counted == traced_flops(run)


def test_by_hand() -> None:
    # Per layer and pass forward: 24 N D^2 for the projections and 4 N T D for scores and values.
    N, T, D, L, rows = 4 * 6, 6, 8, 3, 128
    table = flops_table(step_products(config(remat="full"), ONE), devices=1)
    assert table["forward"] == {
        "projections": 24 * N * D**2 * L,
        "attention": 4 * N * T * D * L,
        "head": 2 * N * D * rows,
    }
    assert table["backward"] == {part: 2 * table["forward"][part] for part in PARTS}
    # All but the MLP's second projection, whose output the backward pass of the block does not need.
    assert table["recompute"]["projections"] == 16 * N * D**2 * L
    assert table["recompute"]["head"] == 0


def test_124m_agrees_with_the_formula_of_mfu() -> None:
    model = ModelConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=50257)
    run = RunConfig(model=model, train=TrainConfig(batch_size=8))
    counted = sum(product.flops for product in step_products(run, ONE))
    # They differ by biases and norms (in 6 N) and padding rows of the table (here).
    assert counted / (8 * 1024) == pytest.approx(flops_per_token(model, 1024), rel=2e-3)


def test_kernels_compute_scores_again_and_skip_hidden_blocks() -> None:
    model = ModelConfig(n_layer=1, n_head=2, n_embd=128, n_positions=2048, vocab_size=128, attention="splash")
    run = RunConfig(model=model, train=TrainConfig(batch_size=1))
    table = flops_table(step_products(run, ONE), 1)
    scores = 2 * 2048**2 * 128 * 3 / 4  # of 2 x 2 blocks, one is hidden
    assert table["forward"]["attention"] == 2 * scores
    assert table["backward"]["attention"] == 4 * scores
    assert table["recompute"]["attention"] == scores


def test_split_over_a_mesh_with_heads_that_do_not_divide() -> None:
    model = ModelConfig(n_layer=1, n_head=25, n_embd=1600, n_positions=64, vocab_size=128)
    run = RunConfig(model=model, train=TrainConfig(batch_size=16))
    whole = flops_table(step_products(run, ONE), 1)
    parts = flops_table(step_products(run, {"data": 2, "fsdp": 2, "tensor": 4}), 16)
    assert parts["forward"]["attention"] == pytest.approx(whole["forward"]["attention"] * 28 / 25)
    mlp, attention = 16 / 24, 8 / 24
    projections = whole["forward"]["projections"] * (mlp + attention * 28 / 25)
    assert parts["forward"]["projections"] == pytest.approx(projections)
    assert parts["backward"]["head"] == whole["backward"]["head"]


def test_short_inner_dimensions_leave_tiles_idle() -> None:
    scores = Product("forward", "attention", 1, m=1024, k=64, n=1024)
    values = Product("forward", "attention", 1, m=1024, k=1024, n=64)
    assert scores.padded_flops(128) == 2 * scores.flops
    assert values.padded_flops(128) == values.flops  # the short side streams past the unit
    assert scores.padded_flops(64) == scores.flops
