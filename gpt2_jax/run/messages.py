"""What a run prints at its start and at its end."""

import json
import pathlib
import shlex
from collections.abc import Sequence

from jax.sharding import Mesh

from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.model.gpt2 import parameter_count
from gpt2_jax.remote_folder import address_of


def summary(
    config: RunConfig,
    store: TokenStore,
    batches: TrainBatches,
    mesh: Mesh,
    choices: str,
    malloc: str,
    flags: list[str],
    folder: pathlib.Path,
    start: int,
) -> str:
    """Data, model, training and devices, a line each.

    Args:
      config: of the run.
      store: its tokens.
      batches: its training batches.
      mesh: its devices.
      choices: what was chosen for them.
      malloc: what was done about the allocator.
      flags: of the compiler.
      folder: of the run.
      start: the step that is gone on from.
    """
    device = mesh.local_devices[0]
    steps, batch_size = config.train.steps, config.train.batch_size
    epochs = steps * batch_size / batches.num_windows
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    resumed = f", resumed after step {start}" if start else ""
    return "\n".join(
        [
            f"run       {address_of(folder)}{resumed}",
            f"data      {config.data.source}: {len(store.split('train')):,} training tokens, "
            f"{len(store.split('held_out')):,} held out; tokenizer {store.tokenizer.name}, "
            f"{store.tokenizer.vocab_size:,} ids",
            f"model     {parameter_count(config.model):,} parameters, {config.model.dtype}",
            f"training  {steps:,} steps of {batch_size * config.context_length:,} tokens, {epochs:.3g} epochs",
            f"devices   {device.device_kind}, mesh {axes}",
            f"compiler  {choices}; flags: {'; '.join(flags) or 'none'}",
            *([f"malloc    {malloc}"] if device.platform == "cpu" else []),
        ]
    )


def farewell(
    config: RunConfig, config_flags: Sequence[str], folder: pathlib.Path, losses: dict[int, float], start: int
) -> str:
    """The last held-out loss, and commands to go on with."""
    lines, where = [], address_of(folder)
    if start >= config.train.steps:
        lines.append(f"{where} was done already: {start} of {config.train.steps} steps")
    elif losses:
        lines.append(f"held-out loss {losses[max(losses)]:.4f} after step {max(losses)}")
    load = f"import gpt2_jax; config, params, tokenizer = gpt2_jax.load({json.dumps(where)}); print(config.model)"
    finetune = [
        *config_flags,
        f"--workdir={address_of(folder.parent / folder.resolve().name)}-finetuned",
        f"--config.init_from={where}",
        f"--config.optimizer.learning_rate={config.optimizer.learning_rate / 10:g}",
    ]
    if config.checkpoint.export_best:
        lines.append(f"the best parameters, for transformers and others, {where}/huggingface")
    lines += [
        f"loss curve {where}/loss.png, numbers {where}/metrics.jsonl, samples {where}/samples",
        "to use it, or to go on from it with a smaller rate (on your text: --config.data.source=text:GLOB):",
        f"  python -c {shlex.quote(load)}",
        f"  python train.py {shlex.join(finetune)}",
    ]
    return "\n".join(lines)
