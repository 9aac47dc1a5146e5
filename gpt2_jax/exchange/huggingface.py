"""A folder with a GPT-2 as Hugging Face's transformers writes it: config.json, safetensors, tokenizer files.

Nothing in it is run, and nothing outside it is read.
"""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.huggingface_tokenizer import read_tokenizer
from gpt2_jax.exchange.json_object import read_json
from gpt2_jax.exchange.names import params_from_tensors, tensors
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.user_paths import expand_user

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Fields of config.json that change what is computed, and the only values under which it is this GPT-2; absent fields
# have the first, the default of transformers' GPT2Config (5.23, models/gpt2/configuration_gpt2.py).
_ONLY: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh approximation
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# Shape and dropout, with the defaults of GPT2Config.
_FIELDS: dict[str, int | float] = {
    **{"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257},
    **{"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    **{"layer_norm_epsilon": 1e-5, "initializer_range": 0.02},
}
_NOT_WEIGHTS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks, kept as buffers by old versions


def is_huggingface(folder: pathlib.Path) -> bool:
    """Whether config.json says a `model_type`, as Hugging Face's do and a run's does not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def load_huggingface(folder: str | pathlib.Path) -> tuple[ModelConfig, Params, Tokenizer]:
    """The model in a Hugging Face GPT-2 folder.

    Returns:
      Config, parameters (float32, on the first device) and tokenizer.

    Raises:
      DataError: a file is missing or damaged, or it is another model than GPT-2; names the file and field.
    """
    folder = expand_user(folder)
    config = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder, config.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, config.json vocab_size {config.vocab_size}; "
            "the files do not belong together"
        )
    params = params_from_tensors(config, _checked_reader(folder, config))
    return config, jax.device_put(params), tokenizer


def read_config(file: pathlib.Path) -> ModelConfig:
    """The shape of a model. Raises DataError, naming the field, for what is not this GPT-2."""
    fields = read_json(file)
    if fields.get("model_type") != "gpt2":
        raise DataError(f"{file}: model_type is {fields.get('model_type')!r}; only gpt2 can be read")
    for name, allowed in _ONLY.items():
        if fields.get(name, allowed[0]) not in allowed:
            listed = " or ".join(repr(value) for value in allowed)
            raise DataError(f"{file}: {name} is {fields[name]!r}, GPT-2's is {listed}; this model cannot be read")
    values = {name: fields.get(name, default) for name, default in _FIELDS.items()}
    if "n_positions" not in fields and "n_ctx" in fields:  # the name of the first versions
        values["n_positions"] = fields["n_ctx"]
    try:
        for name, default in _FIELDS.items():
            if isinstance(default, float) and type(values[name]) is int:
                values[name] = float(values[name])
        config = ModelConfig(**values)
    except UsageError as error:
        raise DataError(f"{file}: {error}") from None
    if config.vocab_size == 0:
        raise DataError(f"{file}: vocab_size is 0; a model has tokens")
    if fields.get("n_inner") not in (None, 4 * config.n_embd):
        raise DataError(f"{file}: n_inner is {fields['n_inner']!r}, GPT-2's is 4 * n_embd = {4 * config.n_embd}")
    return config


def _checked_reader(folder: pathlib.Path, config: ModelConfig) -> Callable[[str], np.ndarray]:
    """Reads tensors by name, once all have been found with the shapes that they should have."""
    places, shapes = _places(folder)
    wanted = {tensor.name: tensor.shape for tensor in tensors(config)}
    missing = [name for name in wanted if name not in places]
    unknown = [name for name in places if name not in wanted and name != "lm_head.weight"]
    if missing:
        raise DataError(f"{folder}: {_some(missing)} missing from the weights")
    if unknown:
        raise DataError(f"{folder}: {_some(unknown)} in the weights, which GPT-2 does not have")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise DataError(f"{folder}: {name} has shape {shapes[name]}, by config.json it should be {shape}")

    def read(name: str) -> np.ndarray:
        file, stored_name = places[name]
        return _read_tensor(file, stored_name)

    if "lm_head.weight" in places and not np.array_equal(read("lm_head.weight"), read("wte.weight")):
        raise DataError(f"{folder}: lm_head.weight differs from wte.weight; GPT-2's output head is its token table")
    return read


def _places(folder: pathlib.Path) -> tuple[dict[str, tuple[pathlib.Path, str]], dict[str, tuple[int, ...]]]:
    """Of each tensor, by its name without prefix: its file and full name there; and its shape."""
    places: dict[str, tuple[pathlib.Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                for stored_name in opened.keys():  # noqa: SIM118 (not a mapping)
                    name = stored_name.removeprefix("transformer.")
                    if _NOT_WEIGHTS.fullmatch(name):
                        continue
                    if name in places:
                        raise DataError(f"{folder}: {name} is there twice")
                    places[name] = file, stored_name
                    shapes[name] = tuple(opened.get_slice(stored_name).get_shape())
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None
    return places, shapes


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        names = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise DataError(f"{folder / _INDEX}: no weight_map from tensors to files; fetch it again")
        files = []
        for name in sorted(set(names.values())):
            if pathlib.Path(name).name != name:
                raise DataError(f"{folder / _INDEX}: {name!r} is not a file of the same folder; fetch it again")
            if not (folder / name).is_file():
                raise DataError(f"{folder / name}: missing, though {_INDEX} names it; fetch it")
            files.append(folder / name)
        return files
    if list(folder.glob("pytorch_model*.bin")):
        raise DataError(
            f"{folder}: the weights are in pytorch_model.bin, a pickle, which could run code and is not read; "
            "load it with transformers and save_pretrained it as safetensors"
        )
    raise DataError(f"{folder}: no {_WEIGHTS} or {_INDEX} there")


_TYPES = ("F64", "F32", "F16", "BF16")


def _read_tensor(file: pathlib.Path, name: str) -> np.ndarray:
    try:
        with safe_open(file, framework="numpy") as opened:
            stored = opened.get_slice(name).get_dtype()
            if stored not in _TYPES:
                raise DataError(f"{file}: {name} has type {stored}; allowed: {', '.join(_TYPES)}")
            return opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: {name} cannot be read ({error}); fetch the file again") from None


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"
