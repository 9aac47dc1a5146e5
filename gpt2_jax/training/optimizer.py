"""AdamW or Muon with clipping, decay by parameter name, and the learning rate as a function of the update's number."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gpt2_jax.config import OptimizerConfig
from gpt2_jax.training.skippable import (
    Skippable,
    scale_by_adam,
    scale_by_learning_rate,
    skippable,
    skippable_chain,
)

# Kernels and embeddings decay; biases and LayerNorm scales do not. By name, not by rank: stacked biases have two axes.
DECAYED = ("kernel", "embedding")

_ADAM_RMS = 0.2  # of an entry of AdamW's updates, before the learning rate (Liu et al. 2025)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of the update that follows `count` earlier ones.

    With s = count + 1, w warm-up steps, and p the peak (`config.learning_rate`): p * s / w while s <= w, then
      cosine        from p to p * end_fraction at s = steps, along half a cosine (Loshchilov & Hutter 2017)
      linear        the same along a line
      inverse_sqrt  p * sqrt(w / s) (Vaswani et al. 2017, with their factor folded into the peak)
      constant      p
      wsd           p, then along a line to p * end_fraction over the last `decay_steps` steps
    """
    peak, end = config.learning_rate, config.learning_rate * config.end_fraction
    warmup, decay = config.warmup_steps, config.decay_steps

    def schedule(count: Any) -> jax.Array:
        s = jnp.asarray(count, jnp.float32) + 1
        progress = jnp.clip((s - warmup) / max(1, steps - warmup), 0, 1)
        if config.schedule == "cosine":
            rate = end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "linear":
            rate = peak + (end - peak) * progress
        elif config.schedule == "inverse_sqrt":
            rate = peak * jnp.sqrt(warmup / s)
        elif config.schedule == "wsd":
            rate = peak + (end - peak) * jnp.clip((s - (steps - decay)) / decay, 0, 1)
        else:
            rate = jnp.full_like(s, peak)
        return jnp.where(s <= warmup, peak * s / max(1, warmup), rate)

    return schedule


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay acts on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(key, "key", None) in DECAYED for key in path), params
    )


def muon_dimensions(updates: Any) -> Any:
    """A tree like `updates` with the axes of the matrices that Muon orthogonalises: the last is out, the second in.

    The others, layers, and queries, keys and values, count matrices: each is one by itself.
    """
    return jax.tree.map(lambda leaf: MuonDimensionNumbers(reduction_axis=1, output_axis=leaf.ndim - 1), updates)


def make_optimizer(config: OptimizerConfig, steps: int) -> Skippable:
    """Global-norm clipping, then the optimizer, over `steps` updates.

    adamw  AdamW with bias correction (Loshchilov & Hutter 2019)
    muon   Muon (Jordan 2024) with a momentum of `b1`, its updates as large as AdamW's (Liu et al. 2025, "Muon is
           scalable for LLM training"), so that one learning rate serves both, for the kernels of the layers; AdamW for
           all else. Rows are scaled before the first iteration (Boissin et al. 2025, "Turbo-Muon"), so that four are
           enough (docs/numbers.md)
    """
    adam = scale_by_adam(config.b1, config.b2, config.eps, config.mu_dtype)
    directions: optax.GradientTransformation = adam
    if config.name == "muon":
        orthogonal = scale_by_muon(
            beta=config.b1,
            ns_steps=4,
            preconditioning="aol",
            mu_dtype=config.mu_dtype,
            weight_dimension_numbers=muon_dimensions,
        )
        muon = skippable(optax.chain(orthogonal, optax.stateless(_as_large_as_adam)))
        directions = optax.partition({"muon": muon, "adam": adam}, _muon_or_adam)
    optimizer = skippable_chain(
        directions,
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )
    return skippable_chain(clip_by_global_norm(config.clip_norm), optimizer) if config.clip_norm else optimizer


def global_norm(tree: Any) -> jax.Array:
    """The square root of the sum of all squares, in the type of the leaves."""
    return jnp.sqrt(sum(_sum_of_squares(leaf) for leaf in jax.tree.leaves(tree)))


def _sum_of_squares(leaf: jax.Array) -> jax.Array:
    # By columns first, which XLA on CPU sums at five times the speed of the whole in some versions (0.10).
    return jnp.square(leaf).sum(axis=tuple(range(leaf.ndim - 1))).sum()


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by one factor: it divides and multiplies, for which XLA would store what results."""

    def update(grads: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(global_norm(grads), 1e-30))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(update)


def _as_large_as_adam(updates: Any, _: Any) -> Any:
    """The entries of an orthogonal matrix have a root mean square of 1 / sqrt of its longer side."""
    return jax.tree.map(lambda leaf: leaf * (_ADAM_RMS * math.sqrt(max(leaf.shape[1], leaf.shape[-1]))), updates)


def _muon_or_adam(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if any(getattr(key, "key", None) == "kernel" for key in path) else "adam", params
    )


def updates_done(opt_state: optax.OptState) -> jax.Array:
    """How many updates the optimizer has made: its own count, which skipped steps do not advance."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
