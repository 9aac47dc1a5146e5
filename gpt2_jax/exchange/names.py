"""The one table of names and shapes between our parameters and Hugging Face's tensors.

Both store kernels `[in, out]`, so nothing is transposed. What differs: Hugging Face has a tensor per layer where we
have a stack, no padding rows in the token table, and queries, keys and values side by side on one axis of 3D.

Shapes: D width, F = 4D, V vocabulary, P positions, L layers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError
from gpt2_jax.model.gpt2 import padded_vocab_size

# Hugging Face's name, our path, Hugging Face's shape. Those of a layer have its number before their name.
_WHOLE = (
    ("wte.weight", "wte/embedding", ("V", "D")),
    ("wpe.weight", "wpe/embedding", ("P", "D")),
    ("ln_f.weight", "ln_f/scale", ("D",)),
    ("ln_f.bias", "ln_f/bias", ("D",)),
)
_OF_A_LAYER = (
    ("ln_1.weight", "h/ln_1/scale", ("D",)),
    ("ln_1.bias", "h/ln_1/bias", ("D",)),
    ("attn.c_attn.weight", "h/attn/c_attn/kernel", ("D", "3D")),
    ("attn.c_attn.bias", "h/attn/c_attn/bias", ("3D",)),
    ("attn.c_proj.weight", "h/attn/c_proj/kernel", ("D", "D")),
    ("attn.c_proj.bias", "h/attn/c_proj/bias", ("D",)),
    ("ln_2.weight", "h/ln_2/scale", ("D",)),
    ("ln_2.bias", "h/ln_2/bias", ("D",)),
    ("mlp.c_fc.weight", "h/mlp/c_fc/kernel", ("D", "F")),
    ("mlp.c_fc.bias", "h/mlp/c_fc/bias", ("F",)),
    ("mlp.c_proj.weight", "h/mlp/c_proj/kernel", ("F", "D")),
    ("mlp.c_proj.bias", "h/mlp/c_proj/bias", ("D",)),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of Hugging Face's GPT-2.

    Attributes:
      name: without the prefix `transformer.` that newer files have.
      shape: as Hugging Face stores it.
      path: names in our tree.
      layer: its place in our stack, or None for what is not stacked.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None


def tensors(config: ModelConfig) -> list[Tensor]:
    """All tensors of a model; one without biases has none of theirs."""
    D = config.n_embd
    sizes = {"D": D, "3D": 3 * D, "F": 4 * D, "V": config.vocab_size, "P": config.n_positions}

    def tensor(row: tuple[str, str, tuple[str, ...]], layer: int | None) -> Tensor:
        name, path, shape = row
        prefix = "" if layer is None else f"h.{layer}."
        return Tensor(prefix + name, tuple(sizes[letter] for letter in shape), tuple(path.split("/")), layer)

    found = [tensor(row, None) for row in _WHOLE]
    found += [tensor(row, layer) for layer in range(config.n_layer) for row in _OF_A_LAYER]
    return [one for one in found if config.bias or one.path[-1] != "bias"]


def params_from_tensors(config: ModelConfig, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Our tree, in float32 NumPy arrays, from the tensors that `read(name)` gives one at a time."""
    params: dict[str, Any] = {}
    for tensor in tensors(config):
        *folders, last = tensor.path
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        if last not in node:
            node[last] = _zeros(_our_shape(config, tensor))
        slot = node[last] if tensor.layer is None else node[last][tensor.layer]
        value = read(tensor.name)
        if tensor.path == ("wte", "embedding"):
            slot = slot[: config.vocab_size]  # the rows after them are padding
        slot[...] = value.reshape(slot.shape)
    return params


def finite(value: np.ndarray, where: str) -> np.ndarray:
    """`value` in float32. Raises DataError, naming `where`, if a number in it is not finite there."""
    with np.errstate(over="ignore"):  # float64 can hold what float32 cannot
        value = value.astype(np.float32, copy=False)
    if not np.isfinite(value).all():
        raise DataError(f"{where} has values that are not finite; the file is damaged, or training had diverged")
    return value


def tensors_from_params(
    config: ModelConfig, params: Mapping[str, Any], *, always_biases: bool = False
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Each tensor with its values, C-contiguous, from our tree: the inverse of `params_from_tensors`.

    With `always_biases`, those of a model without biases come as zeros, which are the same.
    """
    for tensor in tensors(dataclasses.replace(config, bias=config.bias or always_biases)):
        if tensor.path[-1] == "bias" and not config.bias:
            yield tensor, np.zeros(tensor.shape, np.float32)
            continue
        node: Any = params
        for name in tensor.path:
            node = node[name]
        value = np.asarray(node if tensor.layer is None else node[tensor.layer])
        if tensor.path == ("wte", "embedding"):
            value = value[: config.vocab_size]
        yield tensor, np.ascontiguousarray(value.reshape(tensor.shape))


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that start on a 64-byte boundary: JAX takes such memory over on a CPU, where it would copy other."""
    size = math.prod(shape) * 4
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def _our_shape(config: ModelConfig, tensor: Tensor) -> tuple[int, ...]:
    shape = tensor.shape
    if tensor.path[-2] == "c_attn":  # queries, keys and values on an axis of their own
        shape = (*shape[:-1], 3, config.n_embd)
    if tensor.path[0] == "wte":
        shape = (padded_vocab_size(config.vocab_size), config.n_embd)
    return shape if tensor.layer is None else (config.n_layer, *shape)
