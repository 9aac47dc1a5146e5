"""Writing a model as transformers' `save_pretrained` does: config.json, safetensors, tokenizer files."""

import errno
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gpt2_jax.errors import UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.huggingface_config import config_fields
from gpt2_jax.exchange.names import tensors_from_params
from gpt2_jax.exchange.tokenizer_json import write_tokenizer

_WEIGHTS = "model.safetensors"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_huggingface(folder: pathlib.Path, bundle: Bundle, dtype: str = "float32") -> None:
    """Writes all that `from_pretrained` reads into `folder`, which exists; the weights as `dtype`.

    Raises UsageError for a type that cannot hold a weight.
    """
    config = bundle.config
    weights = {
        f"transformer.{tensor.name}": as_stored(tensor.name, value, dtype)
        for tensor, value in tensors_from_params(config, bundle.params, always_biases=True)
    }
    # safetensors 0.8.0 scrambles arrays that are not C-contiguous; these are, by `tensors_from_params`.
    try:
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # how the library tells a full disk
        raise OSError(errno.EIO, str(error), str(folder / _WEIGHTS)) from None
    end_of_text = bundle.tokenizer.end_of_text
    _write_json(folder / "config.json", config_fields(config, end_of_text, dtype))
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
    write_tokenizer(folder, bundle.tokenizer, config.n_positions)


def as_stored(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """`value` rounded to `dtype`. Raises UsageError where that has no such numbers."""
    with np.errstate(over="ignore"):
        stored = value.astype(DTYPES[dtype])
    if not np.isfinite(stored).all():
        largest = np.abs(value).max()
        raise UsageError(f"dtype={dtype} cannot hold {name}, which has values up to {largest:.3g}; choose another")
    return stored


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
