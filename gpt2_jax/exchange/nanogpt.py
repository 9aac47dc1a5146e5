"""nanoGPT's models: `ckpt.pt`, and `meta.pkl` beside it for models of characters. Nothing in them is run.

Tensors have Hugging Face's names, but kernels are `[out, in]`, the output head stands there by itself as
`lm_head.weight`, in the storage of the token table, and there may be no biases. GELU is exact (by erf), the LayerNorms'
epsilon 1e-5.
"""

import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gpt2_jax.atomic_file import whole_file
from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.huggingface_write import DTYPES as _DTYPES
from gpt2_jax.exchange.huggingface_write import as_stored
from gpt2_jax.exchange.names import Tensor, finite, params_from_tensors, tensors, tensors_from_params
from gpt2_jax.exchange.plain_pickle import MAX_BYTES, read_pickle, write_pickle
from gpt2_jax.exchange.torch_file import (
    StoredTensor,
    TorchFile,
    open_torch_file,
    tensor_in_pickle,
    write_torch_file,
)
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_characters

DTYPES = tuple(_DTYPES)

_FILE, _META = "ckpt.pt", "meta.pkl"
_EPSILON = 1e-5
_DATASET = "gpt2_jax"
_GPT2_VOCAB_SIZES = range(50257, padded_vocab_size(50257) + 1)
_COMPILED = "_orig_mod."  # prefix that torch.compile adds
_TABLE, _HEAD = "transformer.wte.weight", "lm_head.weight"
_NOT_WEIGHTS = re.compile(r"transformer\.h\.\d+\.attn\.bias")  # causal masks, where torch has no fused attention
# What `model_args` holds; ours for theirs, and the value where an early file has none.
_SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
_OPTIONS = {"bias": True, "dropout": 0.0}
_LARGEST = 2**31 - 1


def read_nanogpt(path: pathlib.Path, gpt2: Tokenizer | None = None) -> Bundle:
    """The model in nanoGPT's `ckpt.pt`; of its training, the number of steps and the best loss.

    The activation is read as `gelu_erf`, which nanoGPT computes today, also for early files, which were trained with
    the tanh approximation and do not say so. The optimizer's state is not read.

    Args:
      path: the file, or the folder with it. A model of characters needs `meta.pkl` of nanoGPT's data beside the file.
      gpt2: the tokenizer of other models; default: GPT-2's, from where `make_tokenizer` finds it.

    Raises:
      DataError: a file is missing, damaged, asks for code, or holds another model; names the file and the place.
    """
    file = path / _FILE if path.is_dir() else path
    with open_torch_file(file) as opened:
        checkpoint = opened.contents
        if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(key), dict) for key in ("model", "model_args")
        ):
            raise DataError(f"{file}: no dicts model and model_args in it; only what nanoGPT's train.py saves is read")
        config = _config(file, checkpoint["model_args"])
        facts = _facts(opened, checkpoint)
        tokenizer = _tokenizer(file, config.vocab_size, gpt2)
        stored = _weights(opened, checkpoint["model"], config)

        def read(name: str) -> np.ndarray:
            return finite(opened.read(stored[name]), f"{file}: {name}")

        if stored[_HEAD] != stored[_TABLE] and not np.array_equal(read(_HEAD), read(_TABLE)):
            raise DataError(f"{file}: {_HEAD} differs from {_TABLE}; GPT-2's output head is its token table")
        ours = {tensor.name: tensor for tensor in tensors(config)}
        params = params_from_tensors(config, lambda name: _turned(ours[name], read(_name(ours[name]))))
        return Bundle(config, params, tokenizer, facts)


def write_nanogpt(folder: pathlib.Path, bundle: Bundle, dtype: str = "float32") -> None:
    """Writes `ckpt.pt`, from which nanoGPT's sample.py samples, into `folder`, which exists.

    A tokenizer of characters goes into `meta.pkl` beside it; sample.py looks for it in its own folder
    `data/gpt2_jax/`, where it must be copied. nanoGPT has one rate of dropout, ours of the residual branches is taken.
    train.py's `init_from=resume` cannot go on from the file: it has no state of an optimizer, nor a step.

    Args:
      folder: where to write.
      bundle: the model.
      dtype: type of the weights, one of DTYPES; nanoGPT computes in its own all the same.

    Raises:
      UsageError: something that nanoGPT cannot express, by name; or a type that cannot hold a weight.
    """
    config, tokenizer = bundle.config, bundle.tokenizer
    _refuse_what_nanogpt_cannot_express(bundle, dtype)
    named = tensors(config)
    stored_type = np.dtype(_DTYPES[dtype])
    model = {
        _name(tensor): tensor_in_pickle(key, stored_type, _stored_shape(tensor)) for key, tensor in enumerate(named)
    }
    model[_HEAD] = model[_TABLE]
    args: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    args |= {"bias": config.bias, "dropout": float(config.resid_pdrop)}
    checkpoint: dict[str, Any] = {"model": model, "model_args": args}
    if tokenizer.characters:
        checkpoint["config"] = {"dataset": _DATASET}
        ids = {character: number for number, character in enumerate(tokenizer.characters)}
        meta = {"vocab_size": len(ids), "itos": {number: character for character, number in ids.items()}, "stoi": ids}
        with whole_file(folder / _META) as stream:
            stream.write(write_pickle(meta))
    storages = (
        as_stored(_name(tensor), _turned(tensor, value), dtype)
        for tensor, value in tensors_from_params(config, bundle.params)
    )
    write_torch_file(folder / _FILE, checkpoint, storages)


def _name(tensor: Tensor) -> str:
    return f"transformer.{tensor.name}"


def _stored_shape(tensor: Tensor) -> tuple[int, ...]:
    return tensor.shape[::-1] if tensor.path[-1] == "kernel" else tensor.shape


def _turned(tensor: Tensor, value: np.ndarray) -> np.ndarray:
    """Between kernels `[in, out]` and `[out, in]`; nothing else is transposed."""
    return value.T if tensor.path[-1] == "kernel" else value


def _config(file: pathlib.Path, args: Mapping[str | int, Any]) -> ModelConfig:
    unknown = [key for key in args if key not in _SIZES and key not in _OPTIONS]
    if unknown:
        raise DataError(f"{file}: model_args has {_some(unknown)}, which nanoGPT's GPT does not have")
    sizes: dict[str, Any] = {ours: args.get(theirs) for theirs, ours in _SIZES.items()}
    for theirs, ours in _SIZES.items():
        if type(sizes[ours]) is not int or not 1 <= sizes[ours] <= _LARGEST:
            raise DataError(f"{file}: model_args.{theirs} is not there, or no integer from 1 to {_LARGEST}")
    bias, dropout = (args.get(key, default) for key, default in _OPTIONS.items())
    if type(bias) is not bool:
        raise DataError(f"{file}: model_args.bias is not true or false")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise DataError(f"{file}: model_args.dropout is no number from 0, below 1")
    try:
        return ModelConfig(
            **sizes,
            bias=bias,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            layer_norm_epsilon=_EPSILON,
            activation="gelu_erf",
        )
    except UsageError as error:
        raise DataError(f"{file}: model_args: {error}") from None


def _facts(opened: TorchFile, checkpoint: Mapping[str | int, Any]) -> dict[str, str]:
    facts = {"trained with": "nanoGPT"}
    if "iter_num" in checkpoint:
        steps = checkpoint["iter_num"]
        if type(steps) is not int or steps < 0:
            raise DataError(f"{opened.path}: iter_num is no integer from 0 up")
        facts["training"] = f"{steps:,} steps"
    if "best_val_loss" in checkpoint:
        loss = checkpoint["best_val_loss"]
        if type(loss) is not float:
            stored = opened.tensor(loss, "best_val_loss")
            if math.prod(stored.shape) != 1:
                raise DataError(f"{opened.path}: best_val_loss is not one number")
            opened.check([stored])
            loss = opened.read(stored).item()
        facts["best held-out loss"] = f"{loss:.4f} nats per token"
    return facts


def _tokenizer(file: pathlib.Path, vocab_size: int, gpt2: Tokenizer | None) -> Tokenizer:
    meta = file.with_name(_META)
    if meta.is_file():
        return _characters(meta, vocab_size)
    if vocab_size in _GPT2_VOCAB_SIZES:
        return gpt2 or make_tokenizer("gpt2")
    raise DataError(
        f"{file}: the vocabulary of {vocab_size} is not GPT-2's, and no {_META} says what it is; copy {_META} from "
        f"nanoGPT's data folder beside {_FILE}"
    )


def _characters(file: pathlib.Path, vocab_size: int) -> Tokenizer:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    meta = read_pickle(data, str(file))
    stoi, itos = (meta.get(key) if isinstance(meta, dict) else None for key in ("stoi", "itos"))
    if (
        not isinstance(stoi, dict)
        or not isinstance(itos, dict)
        or not all(type(key) is str and len(key) == 1 and type(number) is int for key, number in stoi.items())
        or not all(type(key) is int and type(character) is str for key, character in itos.items())
        or sorted(stoi.values()) != list(range(len(stoi)))
        or itos != {number: character for character, number in stoi.items()}
    ):
        raise DataError(
            f"{file}: not stoi and itos between single characters and the ids from 0 up; only those of nanoGPT's "
            "models of characters can be read"
        )
    try:
        tokenizer = tokenizer_from_characters("".join(itos[number] for number in range(len(itos))))
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    if tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"{file}: {tokenizer.vocab_size} characters, where the model beside it has {vocab_size} ids; the files do "
            "not belong together"
        )
    return tokenizer


def _weights(opened: TorchFile, model: Mapping[str | int, Any], config: ModelConfig) -> dict[str, StoredTensor]:
    """Where each tensor lies, by nanoGPT's name, once all have been found as they should be."""
    file = opened.path
    wanted = {_name(tensor): _stored_shape(tensor) for tensor in tensors(config)}
    wanted[_HEAD] = wanted[_TABLE]
    stored: dict[str, StoredTensor] = {}
    unknown = []
    for full_name, value in model.items():
        name = str(full_name).removeprefix(_COMPILED)
        if name in stored:
            raise DataError(f"{file}: {name} is there twice")
        if name in wanted:
            stored[name] = opened.tensor(value, name)
        elif not _NOT_WEIGHTS.fullmatch(name):
            unknown.append(name)
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise DataError(f"{file}: {_some(missing)} missing from the weights")
    if unknown:
        raise DataError(f"{file}: {_some(unknown)} in the weights, which nanoGPT's GPT does not have")
    for name, shape in wanted.items():
        found = stored[name]
        if found.shape != shape:
            raise DataError(f"{file}: {name} has another shape than {shape}, which model_args says")
        if found.dtype not in (*_DTYPES.values(), np.float64):
            raise DataError(f"{file}: {name} has type {found.dtype}; allowed: float64, {', '.join(DTYPES)}")
    tied = stored[_HEAD] == stored[_TABLE]
    opened.check(tensor for name, tensor in stored.items() if name != _HEAD or not tied)
    return stored


def _refuse_what_nanogpt_cannot_express(bundle: Bundle, dtype: str) -> None:
    config, tokenizer = bundle.config, bundle.tokenizer
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype}; allowed for nanogpt: {', '.join(DTYPES)}")
    other = "export another format, or train with"
    if tokenizer.name not in ("gpt2", "chars"):
        raise UsageError(
            f"tokenizer {tokenizer.name} cannot be written for nanoGPT, which has gpt2 and chars; {other} "
            "--config.tokenizer.name=gpt2 or chars"
        )
    if tokenizer.normalization != "none":
        raise UsageError(
            f"tokenizer.normalization={tokenizer.normalization} cannot be written for nanoGPT, which takes text as it "
            f"is; {other} --config.tokenizer.normalization=none"
        )
    if tokenizer.lowercase:
        raise UsageError(
            "tokenizer.lowercase=True cannot be written for nanoGPT, which takes text as it is; "
            f"{other} --config.tokenizer.lowercase=False"
        )
    sizes = _GPT2_VOCAB_SIZES if tokenizer.name == "gpt2" else range(tokenizer.vocab_size, tokenizer.vocab_size + 1)
    if config.vocab_size not in sizes:
        allowed = " to ".join(str(size) for size in sorted({sizes[0], sizes[-1]}))
        raise UsageError(
            f"model.vocab_size={config.vocab_size} cannot be written for nanoGPT with the tokenizer {tokenizer.name}; "
            f"allowed: {allowed}"
        )
    if config.layer_norm_epsilon != _EPSILON:
        raise UsageError(
            f"model.layer_norm_epsilon={config.layer_norm_epsilon:g} cannot be written for nanoGPT, which has "
            f"{_EPSILON:g}; {other} --config.model.layer_norm_epsilon={_EPSILON:g}"
        )
    if config.activation != "gelu_erf":
        raise UsageError(
            f"model.activation={config.activation} cannot be written for nanoGPT, which has gelu_erf: logits would "
            f"differ; --accept_erf writes it so, {other} --config.model.activation=gelu_erf"
        )


def _some(names: Iterable[str | int]) -> str:
    """Some of the names, which may be anything that a file holds."""
    found = [str(name)[:80] for name in names]
    listed = ", ".join(name if name.isprintable() else repr(name) for name in found[:3])
    return listed if len(found) <= 3 else f"{listed} and {len(found) - 3} more"
