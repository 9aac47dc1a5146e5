"""What a run's config means for its compiled steps: model, optimizer, and the choices that depend on devices."""

import dataclasses
import functools
import math

import jax
from jax.sharding import Mesh

from gpt2_jax.config import RunConfig
from gpt2_jax.model.attention_kernels import choose_attention
from gpt2_jax.model.gpt2 import GPT2, padded_vocab_size
from gpt2_jax.training.loss import choose_chunk
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.steps import StepSettings

_SCANNED_FROM = 24  # layers


def for_device(config: RunConfig, device: jax.Device) -> tuple[RunConfig, str]:
    """The config with `model.attention` and `model.scan_unroll` as they will run on such devices, and a log line.

    Raises:
      UsageError: a path of attention that is configured by name cannot run.
    """
    model = config.model
    attention, reason = choose_attention(
        model.attention,
        device,
        dtype=model.dtype,
        head_dim=model.n_embd // model.n_head,
        length=math.gcd(config.context_length, *config.train.context_lengths),
        attn_dropout=model.attn_pdrop,
    )
    # The compile time of layers one after another grows with the square of their number (CPU: 7 s for 24, 32 s for 48).
    unrolled = device.platform == "cpu" and model.n_layer < _SCANNED_FROM
    unroll = model.scan_unroll or (model.n_layer if unrolled else 1)
    model = dataclasses.replace(model, attention=attention, scan_unroll=unroll)
    layers = "one after another" if unroll >= model.n_layer else f"scanned by {unroll}"
    return dataclasses.replace(config, model=model), f"attention {reason}; layers {layers}"


@functools.lru_cache(maxsize=4)
def make_settings(config: RunConfig, mesh: Mesh) -> StepSettings:
    """The model, optimizer and compile-time choices of a run; `model.vocab_size` must be filled in.

    The same object for the same arguments, so that a step which was compiled to see its memory is not compiled again.
    """
    train_config = config.train
    chunk = train_config.loss_chunk
    if not chunk:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        tokens = train_config.batch_size // train_config.microbatches // shards * config.context_length
        vocab_rows = padded_vocab_size(config.model.vocab_size) // mesh.shape["tensor"]
        # The evaluation goes through the full context, whatever lengths training draws.
        chunk = choose_chunk(tokens, (*train_config.context_lengths, config.context_length), vocab_rows)
    return StepSettings(
        model=GPT2(config.model),
        optimizer=make_optimizer(config.optimizer, train_config.steps),
        schedule=learning_rate_schedule(config.optimizer, train_config.steps),
        seed=config.seed,
        microbatches=train_config.microbatches,
        loss_chunk=chunk,
        ema_decay=config.optimizer.ema_decay,
        max_skipped=train_config.max_skipped_steps,
    )
