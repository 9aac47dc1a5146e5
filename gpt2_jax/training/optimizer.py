"""AdamW with clipping, decay by parameter name, and the learning rate as a function of the update's number."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.config import OptimizerConfig

# Kernels and embeddings decay; biases and LayerNorm scales do not. By name, not by rank: stacked biases have two axes.
DECAYED = ("kernel", "embedding")


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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with bias correction (Loshchilov & Hutter 2019), over `steps` updates."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def updates_done(opt_state: optax.OptState) -> jax.Array:
    """How many updates the optimizer has made: its own count, which skipped steps do not advance."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
