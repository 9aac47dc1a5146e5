"""Held-out loss: a mean over weighted positions, whatever the batches they come in."""

import math

import jax
import numpy as np
import pytest
from reference import numpy_gpt2

from gpt2_jax.config import MeshConfig, ModelConfig
from gpt2_jax.evaluation.held_out import held_out_loss
from gpt2_jax.model.gpt2 import GPT2, init_params
from gpt2_jax.sharding import make_mesh, use_mesh

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=19, attn_pdrop=0.5, resid_pdrop=0.5)


@pytest.mark.parametrize("shards", [1, 4])
def test_mean_over_weighted_positions(shards: int) -> None:
    rng = np.random.default_rng(0)
    batches = [
        {
            "tokens": rng.integers(0, 19, (4, 8)).astype(np.int32),
            "targets": rng.integers(0, 19, (4, 8)).astype(np.int32),
            "weights": (rng.random((4, 8)) < share).astype(np.float32),
        }
        for share in (1.0, 0.5, 0.1)
    ]
    model = GPT2(CONFIG)
    params = init_params(model, jax.random.key(0))
    mesh = make_mesh(MeshConfig(shards, 1, 1), jax.devices()[:shards])
    with use_mesh(mesh):
        got = held_out_loss(params, iter(batches), model=model, mesh=mesh)

    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    total = weight = 0.0
    for batch in batches:
        logits = numpy_gpt2.logits(exact, batch["tokens"], n_head=2, vocab_size=19, epsilon=CONFIG.layer_norm_epsilon)
        total += (numpy_gpt2.token_losses(logits, batch["targets"]) * batch["weights"]).sum()
        weight += batch["weights"].sum()
    assert got["held_out_loss"] == pytest.approx(total / weight, rel=1e-6)
    assert got["held_out_perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-5)
