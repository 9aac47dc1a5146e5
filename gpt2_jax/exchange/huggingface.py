"""A folder with a GPT-2 as Hugging Face's transformers writes it: config.json, safetensors, tokenizer files.

Nothing in it is run, and nothing outside it is read.
"""

import concurrent.futures
import dataclasses
import pathlib
import re
from collections.abc import Callable

import jax
import numpy as np

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError
from gpt2_jax.exchange.huggingface_config import read_config
from gpt2_jax.exchange.huggingface_tokenizer import read_tokenizer
from gpt2_jax.exchange.json_object import INDEX_BYTES, read_json, shown
from gpt2_jax.exchange.names import finite, params_from_tensors, tensors
from gpt2_jax.exchange.safetensors_file import StoredTensor, stored_tensors
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.user_paths import expand_user

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"[\w.+ -]{1,200}\.safetensors", re.ASCII)
_NOT_WEIGHTS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks, kept as buffers by old versions


def is_huggingface(folder: pathlib.Path) -> bool:
    """Whether config.json says a `model_type`, as Hugging Face's do and a run's does not.

    Where that cannot be read, whether there are weights as Hugging Face names them.
    """
    try:
        return "model_type" in read_json(folder / "config.json")
    except DataError:
        return any((folder / name).is_file() for name in (_WEIGHTS, _INDEX))


def load_huggingface(folder: str | pathlib.Path) -> tuple[ModelConfig, Params, Tokenizer]:
    """The model in a Hugging Face GPT-2 folder.

    Returns:
      Config, parameters (float32, on the first device) and tokenizer.

    Raises:
      DataError: a file is missing or damaged, or it is another model than GPT-2; names the file and field.
    """
    folder = expand_user(folder)
    config = read_config(folder / "config.json")
    with concurrent.futures.ThreadPoolExecutor(1) as other_core:
        params = other_core.submit(lambda: params_from_tensors(config, _checked_reader(folder, config)))
        tokenizer = read_tokenizer(folder, config.vocab_size)
    return config, jax.device_put(params.result()), tokenizer


def _checked_reader(folder: pathlib.Path, config: ModelConfig) -> Callable[[str], np.ndarray]:
    """Reads tensors by name, once all have been found with the shapes that they should have."""
    places = _places(folder)
    if config.n_layer > len(places):  # before as many names are made
        raise DataError(f"{folder}: {len(places)} tensors in the weights, too few for n_layer={config.n_layer}")
    wanted = {tensor.name: tensor.shape for tensor in tensors(config)}
    missing = [name for name in wanted if name not in places]
    allowed = {tensor.name: tensor.shape for tensor in tensors(dataclasses.replace(config, bias=True))}
    empty = allowed.keys() - wanted.keys()  # zeros that stand for no biases
    allowed["lm_head.weight"] = wanted["wte.weight"]
    unknown = [name for name in places if name not in allowed]
    if missing:
        raise DataError(f"{folder}: {_some(missing)} missing from the weights")
    if unknown:
        raise DataError(f"{folder}: {_some([*map(shown, unknown)])} in the weights, which GPT-2 does not have")
    for name, stored in places.items():
        if stored.shape != allowed[name]:
            found = shown(stored.shape)
            raise DataError(f"{folder}: {name} has shape {found}, by config.json it should be {allowed[name]}")

    def read(name: str) -> np.ndarray:
        stored = places[name]
        return finite(stored.read(), f"{stored.file}: {stored.name}")

    for name in empty & places.keys():
        if read(name).any():
            raise DataError(f"{folder}: {name} is not zero, though config.json says that the model has no biases")

    if "lm_head.weight" in places and not np.array_equal(read("lm_head.weight"), read("wte.weight")):
        raise DataError(f"{folder}: lm_head.weight differs from wte.weight; GPT-2's output head is its token table")
    return read


def _places(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Where each tensor is, by its name without prefix."""
    places: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        for stored in stored_tensors(file):
            name = stored.name.removeprefix("transformer.")
            if _NOT_WEIGHTS.fullmatch(name):
                continue
            if name in places:
                raise DataError(f"{folder}: {shown(name)} is there twice")
            places[name] = stored
    return places


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        names = read_json(folder / _INDEX, INDEX_BYTES).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise DataError(f"{folder / _INDEX}: no weight_map from tensors to files; fetch it again")
        files = []
        for name in sorted(set(names.values())):
            if not _SHARD.fullmatch(name):
                raise DataError(
                    f"{folder / _INDEX}: {shown(name)} is not a safetensors file of the same folder; fetch it again"
                )
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


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"
