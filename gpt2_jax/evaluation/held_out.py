"""Loss on the held-out split."""

import math
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.sharding import place_batch
from gpt2_jax.training.steps import eval_step


def held_out_loss(
    params: Params, batches: Iterable[dict[str, np.ndarray]], *, model: GPT2, mesh: Mesh, loss_chunk: int = 0
) -> dict[str, float]:
    """Mean loss over all weighted positions of `batches`, in nats per token, and its exponential.

    Call it within `use_mesh(mesh)`.
    """
    sums = [eval_step(params, place_batch(batch, mesh), model=model, loss_chunk=loss_chunk) for batch in batches]
    host = jax.device_get(sums)
    # Added up in float64: a held-out split can have more positions than float32 counts exactly.
    loss = sum(float(part["loss_sum"]) for part in host) / sum(float(part["weight_sum"]) for part in host)
    return {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 700.0))}
