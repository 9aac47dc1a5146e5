"""The train step and the evaluation step: pure functions of state and batch.

A batch is a dict of `tokens`, `targets` (int32) and `weights` (float32), each `[B, T]`. Metrics are sums and counts;
the host divides.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.model.token_table import look_up, table_per_share
from gpt2_jax.sharding import constrain
from gpt2_jax.training.loss import cross_entropy_sums
from gpt2_jax.training.loss_scale import adjust
from gpt2_jax.training.optimizer import global_norm, updates_done
from gpt2_jax.training.skippable import skippable
from gpt2_jax.training.train_state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What is fixed when a step is compiled.

    Attributes:
      model: the module.
      optimizer: see `make_optimizer`.
      schedule: the optimizer's learning rate, for the metrics.
      seed: of dropout; the key of a step is a function of this and the step's number.
      microbatches: parts of the batch (a divisor of B) whose gradients are added up one after another.
      loss_chunk: see `cross_entropy_sums`.
      ema_decay: decay of the state's moving average.
      max_skipped: steps with a loss or gradient that is not finite which may be left out; after one more, no step
        changes the state.
    """

    model: GPT2
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    seed: int = 0
    microbatches: int = 1
    loss_chunk: int = 0
    ema_decay: float = 0.0
    max_skipped: int = 0


def loss_sums(
    model: GPT2,
    params: Params,
    batch: Batch,
    *,
    loss_chunk: int = 0,
    rounded: bool = False,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss in nats and summed weight of a batch; no dropout without a key. See `cross_entropy_sums`."""
    wte_SVD = table_per_share(params["wte"]["embedding"])
    x_BTD: Any = model.apply(
        {"params": params},
        batch["tokens"],
        look_up(wte_SVD, batch["tokens"]),
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="hidden_states",
    )
    return cross_entropy_sums(
        x_BTD,
        wte_SVD,
        batch["targets"],
        batch["weights"],
        vocab_size=model.config.vocab_size,
        chunk=loss_chunk,
        rounded=rounded,
    )


def gradients(
    model: GPT2,
    params: Params,
    batch: Batch,
    *,
    microbatches: int = 1,
    loss_chunk: int = 0,
    dropout_key: jax.Array | None = None,
    scale: jax.Array | float = 1.0,
) -> tuple[Params, Metrics]:
    """Gradients of `scale` times the weighted mean loss of the whole batch, and `loss_sum`, `weight_sum`.

    Microbatches only bound the memory: each is divided by the weight of the whole batch, so the sum is the mean's
    gradient however the weights are spread.
    """
    weight_sum = batch["weights"].sum()
    factor = scale / jnp.maximum(weight_sum, 1e-8)

    def part(params: Params, microbatch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        loss_sum, _ = loss_sums(model, params, microbatch, loss_chunk=loss_chunk, rounded=True, dropout_key=key)
        return loss_sum * factor, loss_sum

    differentiate = jax.grad(part, has_aux=True)
    if microbatches == 1:
        grads, loss_sum = differentiate(params, batch, dropout_key)
        return grads, {"loss_sum": loss_sum, "weight_sum": weight_sum}

    def add(carry: tuple[Params, jax.Array], numbered: tuple[jax.Array, Batch]) -> tuple:
        index, microbatch = numbered
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        grads, loss_sum = differentiate(params, microbatch, key)
        return (jax.tree.map(jnp.add, carry[0], grads), carry[1] + loss_sum), None

    # Interleaved rows, so that each microbatch is spread over the devices as the batch is.
    parts = {name: jnp.swapaxes(rows.reshape(-1, microbatches, *rows.shape[1:]), 0, 1) for name, rows in batch.items()}
    loss_type = jnp.promote_types(model.config.dtype, jnp.float32)
    zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros((), loss_type))
    (grads, loss_sum), _ = jax.lax.scan(add, zeros, (jnp.arange(microbatches), parts))
    return grads, {"loss_sum": loss_sum, "weight_sum": weight_sum}


def step_gradients(state: TrainState, batch: Batch, settings: StepSettings) -> tuple[Params, Metrics]:
    """The gradients of one step from `state`, and `loss_sum`, `weight_sum` and `grad_norm`."""
    config = settings.model.config
    uses_dropout = config.embd_pdrop or config.attn_pdrop or config.resid_pdrop
    scale = None if state.loss_scale is None else state.loss_scale.scale
    grads, metrics = gradients(
        settings.model,
        state.params,
        batch,
        microbatches=settings.microbatches,
        loss_chunk=settings.loss_chunk,
        dropout_key=jax.random.fold_in(jax.random.key(settings.seed), state.step) if uses_dropout else None,
        scale=1.0 if scale is None else scale,
    )
    if scale is not None:
        grads = jax.tree.map(lambda grad: grad / scale, grads)
    return grads, metrics | {"grad_norm": global_norm(grads)}


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def train_step(state: TrainState, batch: Batch, *, settings: StepSettings) -> tuple[TrainState, Metrics]:
    """One optimizer update, left out where the loss or the gradient's norm is not finite.

    With more than `settings.max_skipped` of those, counted in the state, the state stays as it is, whatever is sent
    after: the host, which reads metrics late, cannot be too late. An overflow of float16 that a smaller loss scale may
    mend is not counted.

    Args:
      state: donated; its buffers become the new state's.
      batch: the global batch.
      settings: hashable; another value compiles another step.

    Returns:
      The next state, and scalars: loss_sum, weight_sum, grad_norm (before clipping), learning_rate, `skipped` (1 if
      the update was left out), `nonfinite_steps` (of the run so far); for float16 also loss_scale.
    """
    grads, metrics = step_gradients(state, batch, settings)
    metrics["learning_rate"] = settings.schedule(updates_done(state.opt_state))
    finite = jnp.isfinite(metrics["loss_sum"]) & jnp.isfinite(metrics["grad_norm"])
    mendable = False if state.loss_scale is None else state.loss_scale.scale > 1
    nonfinite_steps = state.nonfinite_steps + (~finite & ~jnp.asarray(mendable))
    stopped = nonfinite_steps > settings.max_skipped
    applied = finite & ~stopped

    optimizer = skippable(settings.optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, applied=applied)
    params, ema = optax.apply_updates(state.params, updates), state.ema
    if ema is not None:
        average = optax.incremental_update(params, ema, 1 - settings.ema_decay)
        ema = jax.tree.map(lambda after, before: jnp.where(applied, after, before), average, ema)
    new = state.replace(
        step=state.step + ~stopped, params=params, opt_state=opt_state, ema=ema, nonfinite_steps=nonfinite_steps
    )
    if state.loss_scale is not None:
        adjusted = adjust(state.loss_scale, finite)
        new = new.replace(
            loss_scale=jax.tree.map(lambda after, before: jnp.where(stopped, before, after), adjusted, state.loss_scale)
        )
        metrics["loss_scale"] = state.loss_scale.scale
    metrics["skipped"] = 1.0 - applied.astype(jnp.float32)
    metrics["nonfinite_steps"] = nonfinite_steps
    return new, metrics


@functools.partial(jax.jit, static_argnames="settings")
def nonfinite_shares(state: TrainState, batch: Batch, *, settings: StepSettings) -> tuple[Params, Metrics]:
    """What is not finite in a step from `state`, which stays: the share of each gradient's numbers, [L] for stacked
    layers, else a scalar; and the step's metrics.
    """
    grads, metrics = step_gradients(state, batch, settings)

    def share(path: tuple, grad: jax.Array) -> jax.Array:
        stacked = path[0].key == "h"
        shares = (~jnp.isfinite(grad)).mean(axis=tuple(range(int(stacked), grad.ndim)))
        return constrain(shares, None) if stacked else shares

    return jax.tree_util.tree_map_with_path(share, grads), metrics


@functools.partial(jax.jit, static_argnames=("model", "loss_chunk"))
def eval_step(params: Params, batch: Batch, *, model: GPT2, loss_chunk: int = 0) -> Metrics:
    """Summed loss in nats and summed weight of a batch, without dropout."""
    loss_sum, weight_sum = loss_sums(model, params, batch, loss_chunk=loss_chunk)
    return {"loss_sum": loss_sum, "weight_sum": weight_sum}
