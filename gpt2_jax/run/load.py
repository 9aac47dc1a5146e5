"""Loading a model, of a finished or interrupted run or of a Hugging Face folder: `gpt2_jax.load`."""

import pathlib

import jax

from gpt2_jax.config import RunConfig, TokenizerConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.huggingface import is_huggingface, load_huggingface
from gpt2_jax.model.gpt2 import GPT2, Params, init_params
from gpt2_jax.run.checkpoint import Checkpoints, abstract_on_one_device
from gpt2_jax.run.run_folder import read_config
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer
from gpt2_jax.user_paths import expand_user


def load(folder: str | pathlib.Path, step: int | None = None) -> tuple[RunConfig, Params, Tokenizer]:
    """The config, parameters and tokenizer of a run folder, or of a folder with a GPT-2 in Hugging Face's format.

    Args:
      folder: one that `train.py` or transformers' `save_pretrained` wrote.
      step: of a run, a saved step; default: the one of lowest held-out loss, or the newest if none was measured.

    Returns:
      `(config, params, tokenizer)`; `GPT2(config.model).apply({"params": params}, tokens)` gives logits. The parameters
      are on the first device, float32, the moving average if the run kept one.

    Raises:
      DataError: the folder holds no model, or a file in it is damaged, missing or of another model.
      UsageError: a step is asked for where there are none.
    """
    folder = expand_user(folder)
    if is_huggingface(folder):
        if step is not None:
            raise UsageError(f"{folder} is a Hugging Face folder, which has no steps; step {step} was asked for")
        model, params, tokenizer = load_huggingface(folder)
        return RunConfig(model=model, tokenizer=TokenizerConfig(name=tokenizer.name)), params, tokenizer
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if not (folder / "checkpoints").is_dir():
        raise DataError(f"{folder} has no checkpoints yet")
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        found = checkpoints.best_step() if step is None else step
        if found is None or found not in checkpoints.steps():
            raise DataError(f"{folder} has no checkpoint of step {found}; saved: {checkpoints.steps() or 'none'}")
        shapes = jax.eval_shape(lambda: init_params(GPT2(config.model), jax.random.key(0)))
        return config, checkpoints.restore_params(found, abstract_on_one_device(shapes)), tokenizer
    finally:
        checkpoints.close()
