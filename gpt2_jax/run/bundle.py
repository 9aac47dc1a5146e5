"""A model folder as what is exported: the model, its tokenizer, and what a reader should know of its training."""

import itertools
import json
import pathlib
import shutil

import gpt2_jax
from gpt2_jax.config import RunConfig
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.export import export
from gpt2_jax.exchange.huggingface import is_huggingface
from gpt2_jax.run.load import load, saved_step
from gpt2_jax.run.run_folder import folder_to_read


def load_bundle(folder: str | pathlib.Path, step: int | None = None) -> Bundle:
    """What is in a run folder or Hugging Face folder. Arguments and errors are those of `load`."""
    folder = folder_to_read(folder)
    if is_huggingface(folder):
        config, params, tokenizer = load(folder, step)
        return Bundle(config.model, params, tokenizer, {"made from": f"{folder.resolve().name}, by gpt2_jax"})
    step = saved_step(folder, step)  # first, since a training that is under way may save a better one
    config, params, tokenizer = load(folder, step)
    return Bundle(config.model, params, tokenizer, training_facts(config, folder, step))


def export_best(folder: pathlib.Path, config: RunConfig, best: Bundle | None = None) -> pathlib.Path:
    """The Hugging Face folder in the run `folder`, written anew unless it is of the best save already.

    One that is of another save is kept under a number. `best` is that save, where it has been loaded: several processes
    must do so together. Raises like `load` and `export`.
    """
    out = folder / "huggingface"
    facts = training_facts(config, folder, saved_step(folder)) if best is None else best.facts
    if not _is_of(out, dict(facts)):
        new = folder / "huggingface.new"
        shutil.rmtree(new, ignore_errors=True)
        export(load_bundle(folder) if best is None else best, "huggingface", new)
        if out.exists():
            numbered = (folder / f"huggingface.{number}" for number in itertools.count(1))
            out.rename(next(free for free in numbered if not free.exists()))
        new.rename(out)
    return out


def _is_of(exported: pathlib.Path, facts: dict[str, str]) -> bool:
    try:
        return bool(json.loads((exported / "export.json").read_text(encoding="utf-8"))["facts"] == facts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def training_facts(config: RunConfig, folder: pathlib.Path, step: int) -> dict[str, str]:
    """For the model card, of the run in `folder` at a saved step."""
    tokens = step * config.train.batch_size * config.context_length
    kind, colon, path = config.data.source.partition(":")
    facts = {
        "data": f"{kind}{colon}{pathlib.PurePath(path).name}",  # where it lay is nobody's business
        "training": f"{step:,} steps of {config.train.batch_size} windows of {config.context_length:,} tokens, "
        f"{tokens:,} tokens in all; AdamW, {config.optimizer.schedule} rate up to {config.optimizer.learning_rate:g}",
    }
    if config.init_from:
        facts["started from"] = pathlib.PurePath(config.init_from).name
    for name, what in {"loss": "training loss", "held_out_loss": "held-out loss"}.items():
        value = _metric(folder / "metrics.jsonl", step, name)
        if value is not None:
            facts[what] = f"{value:.4f} nats per token, at step {step:,}"
    facts["trained with"] = f"gpt2_jax {gpt2_jax.__version__}"
    return facts


def _metric(file: pathlib.Path, step: int, name: str) -> float | None:
    """The newest value of a step, if one was written."""
    found = None
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:  # a line that was cut short by a crash
                continue
            if isinstance(values, dict) and values.get("step") == step and isinstance(values.get(name), float):
                found = values[name]
    return found
