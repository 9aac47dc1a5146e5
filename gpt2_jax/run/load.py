"""Loading a model, of a finished or interrupted run or of a Hugging Face folder: `gpt2_jax.load`."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from gpt2_jax.config import ModelConfig, RunConfig, TokenizerConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.huggingface import is_huggingface, load_huggingface
from gpt2_jax.exchange.huggingface_config import read_config as read_huggingface_config
from gpt2_jax.exchange.huggingface_tokenizer import read_tokenizer
from gpt2_jax.model.gpt2 import GPT2, Params, init_params
from gpt2_jax.remote_folder import address_of
from gpt2_jax.run.run_folder import checkpoints_folder, folder_to_read, read_config
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer


def load(folder: str | pathlib.Path, step: int | None = None) -> tuple[RunConfig, Params, Tokenizer]:
    """The config, parameters and tokenizer of a run folder, or of a folder with a GPT-2 in Hugging Face's format.

    Args:
      folder: one that `train.py` or transformers' `save_pretrained` wrote; it may be at gs://.
      step: of a run, a saved step; default: the one of lowest held-out loss, or the newest if none was measured.

    Returns:
      `(config, params, tokenizer)`; `GPT2(config.model).apply({"params": params}, tokens)` gives logits. The parameters
      are on the first device, float32, the moving average if the run kept one.

    Raises:
      DataError: the folder holds no model, or a file in it is damaged, missing or of another model.
      UsageError: a step is asked for where there are none, or gs:// cannot be reached.
    """
    folder = folder_to_read(folder)
    _check_is_no_other_format(folder)
    if is_huggingface(folder):
        if step is not None:
            raise UsageError(
                f"{address_of(folder)} is a Hugging Face folder, which has no steps; step {step} was asked for"
            )
        model, params, tokenizer = load_huggingface(folder)
        return _as_run_config(model, tokenizer), params, tokenizer
    config, tokenizer = load_settings(folder)
    with _checkpoints(folder) as checkpoints:
        from gpt2_jax.run.checkpoint import abstract_on_one_device

        found = _choose(checkpoints, step, folder)
        shapes = jax.eval_shape(lambda: init_params(GPT2(config.model), jax.random.key(0)))
        return config, checkpoints.restore_params(found, abstract_on_one_device(shapes)), tokenizer


def load_settings(folder: str | pathlib.Path) -> tuple[RunConfig, Tokenizer]:
    """Config and tokenizer as `load` gives them, without the parameters. Raises like it."""
    folder = folder_to_read(folder)
    _check_is_no_other_format(folder)
    if is_huggingface(folder):
        model = read_huggingface_config(folder / "config.json")
        tokenizer = read_tokenizer(folder, model.vocab_size)
        return _as_run_config(model, tokenizer), tokenizer
    config = read_config(folder)
    # A kernel that training was told to use may not run on the device that is here.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    return config, load_tokenizer(folder / "tokenizer")


def saved_step(folder: pathlib.Path, step: int | None = None) -> int:
    """The step that `load` takes from a run folder. Raises DataError where there is none."""
    load_settings(folder)  # which says what is wrong, if it is no run
    with _checkpoints(folder) as checkpoints:
        return _choose(checkpoints, step, folder)


def _as_run_config(model: ModelConfig, tokenizer: Tokenizer) -> RunConfig:
    settings = TokenizerConfig(tokenizer.name, "", tokenizer.normalization, tokenizer.lowercase)
    return RunConfig(model=model, tokenizer=settings)


@contextlib.contextmanager
def _checkpoints(folder: pathlib.Path) -> Iterator[Any]:
    saves = checkpoints_folder(folder)
    if not saves.is_dir():
        raise DataError(f"{saves.parent} has no checkpoints yet")
    # Orbax takes a third of a second to import, and Hugging Face folders do without it.
    from gpt2_jax.run.checkpoint import Checkpoints

    with contextlib.closing(Checkpoints(saves)) as opened:
        yield opened


def _check_is_no_other_format(folder: pathlib.Path) -> None:
    for name, form in {"model.npz": "npz", "ckpt.pt": "nanogpt"}.items():
        if (folder / name).is_file() and not list(folder.glob("*.safetensors*")):
            raise DataError(
                f"{folder}: {name} is not read as it is; make a Hugging Face folder of it: "
                f"gpt2-jax import --from {form} --model {folder} --out DIR"
            )


def _choose(checkpoints: Any, step: int | None, folder: pathlib.Path) -> int:
    found = checkpoints.best_step() if step is None else step
    steps = checkpoints.steps()
    if found is None or found not in steps:
        raise DataError(f"{address_of(folder)} has no checkpoint of step {found}; saved: {steps or 'none'}")
    return found
