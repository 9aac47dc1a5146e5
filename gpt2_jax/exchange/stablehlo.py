"""A GPT-2 as three StableHLO programs, with its weights, its tokenizer and a runner that needs only JAX.

The programs are written out over Hugging Face's tensors: Flax modules ask for the length of a batch, which here is a
symbol.

Shapes: B rows, T tokens, S slots, D width, V vocabulary, H heads, K head dimension, L layers.
"""

import dataclasses
import importlib.resources
import importlib.util
import json
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.huggingface_write import as_stored
from gpt2_jax.exchange.names import tensors_from_params
from gpt2_jax.model.attention import attention_weights
from gpt2_jax.model.layers import LayerNorm
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer.byte_pair_encoding import merges_to_text

PLATFORMS = ("cpu", "cuda", "tpu")
DTYPES = ("float32", "float16")

_FORMAT = 1
_CONVENTION = {
    "types": "token ids and lengths int32, logits float32, cache in the dtype of the weights",
    "weights": "the arrays of weights.npz as one tuple, in the order of `weights`",
    "shapes": "b rows, t tokens, s slots (t and s at most `context`), V vocab_size; keys and values "
    "[n_layer, b, n_head, s, n_embd / n_head]",
    "forward": "(weights, tokens[b, t]) -> logits[b, t, V] of the token after each",
    "prefill": "(weights, tokens[b, t], lengths[b]) -> logits[b, V] of the token after each prompt, keys, values with "
    "s = t. Prompts stand at the start of their rows; what stands after them has no effect",
    "decode": "(weights, token[b], lengths[b], keys, values) -> logits[b, V], keys, values with the token in slot "
    "lengths[b], its position, which must be below s: pad the cache of prefill along s, and add 1 to lengths each time",
}


def write_stablehlo(folder: pathlib.Path, bundle: Bundle, dtype: str = "float32") -> None:
    """Writes the programs, `weights.npz`, `model.json`, the tokenizer and `run.py`.

    Args:
      folder: an empty one.
      bundle: the model.
      dtype: float32 or float16, of the weights and the matrix products.

    Raises:
      UsageError: another dtype, a weight that is too large for float16, or flatbuffers is not installed.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype}: not for StableHLO, whose weights are NumPy's; allowed: {', '.join(DTYPES)}")
    if importlib.util.find_spec("flatbuffers") is None:
        raise UsageError("StableHLO needs the package flatbuffers: pip install 'gpt2-jax[stablehlo]'")
    config = dataclasses.replace(bundle.config, dtype=dtype)
    weights: dict[str, Any] = {
        tensor.name: as_stored(tensor.name, value, dtype)
        for tensor, value in tensors_from_params(config, bundle.params)
    }
    for name, program in _programs(config, weights).items():
        (folder / f"{name}.stablehlo").write_bytes(program.serialize())
    np.savez(folder / "weights.npz", **weights)
    tokenizer = bundle.tokenizer
    if tokenizer.merges:  # for other programs; the runner has the order of merges from the ids
        (folder / "merges.txt").write_text(merges_to_text(tokenizer.merges), encoding="utf-8", newline="\n")
    _write_json(folder / "tokens.json", tokenizer_content(tokenizer))
    runner = importlib.resources.files("gpt2_jax.exchange").joinpath("stablehlo_runner.py")
    (folder / "run.py").write_bytes(runner.read_bytes())
    shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "layer_norm_epsilon", "activation", "bias")
    content = {
        "format": _FORMAT,
        **{name: getattr(config, name) for name in shape},
        "context": config.n_positions,
        "tokenizer_vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "dtype": dtype,
        "jax": jax.__version__,
        "platforms": PLATFORMS,
        "programs": [f"{name}.stablehlo" for name in ("forward", "prefill", "decode")],
        "calling_convention": _CONVENTION,
        "weights": list(weights),
        "facts": dict(bundle.facts),
    }
    _write_json(folder / "model.json", content)


def read_stablehlo(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """The forward program of a written folder with its weights: tokens `[B, T]` to logits `[B, T, V]`.

    Raises DataError for a file that is missing or damaged.
    """
    try:
        program = export.deserialize(bytearray((folder / "forward.stablehlo").read_bytes()))
        names = json.loads((folder / "model.json").read_text(encoding="utf-8"))["weights"]
        with np.load(folder / "weights.npz", allow_pickle=False) as stored:
            weights = tuple(jnp.asarray(stored[name]) for name in names)
    except (OSError, KeyError, ValueError, struct.error) as error:
        raise DataError(f"{folder}: no complete export to StableHLO ({error}); export again") from None
    call = jax.jit(program.call)
    return lambda tokens_BT: np.asarray(call(weights, np.asarray(tokens_BT, np.int32)))


def read_tokens(folder: pathlib.Path) -> Any:
    """What `tokenizer_content` gave, from a written folder."""
    return json.loads((folder / "tokens.json").read_text(encoding="utf-8"))


def tokenizer_content(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the runner needs: each token's bytes in hexadecimal by id. Merges come in the order of their tokens."""
    kind = tokenizer.name.partition(":")[0]
    return {
        "kind": kind if kind in ("bytes", "chars") else "bpe",
        "normalization": tokenizer.normalization,
        "lowercase": tokenizer.lowercase,
        "end_of_text": tokenizer.end_of_text,
        "tokens": [tokenizer.decode_bytes([number]).hex() for number in range(tokenizer.vocab_size)],
    }


def _programs(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> dict[str, export.Exported]:
    names = tuple(weights)

    def named(weights: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        return dict(zip(names, weights, strict=True))

    def forward(weights: tuple[jax.Array, ...], tokens_BT: jax.Array) -> jax.Array:
        x_BTD, _, _ = _read_prompt(config, named(weights), tokens_BT)
        return _logits(x_BTD, named(weights))

    def prefill(
        weights: tuple[jax.Array, ...], tokens_BT: jax.Array, length_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x_BTD, keys, values = _read_prompt(config, named(weights), tokens_BT)
        x_B1D = jnp.take_along_axis(x_BTD, length_B[:, None, None] - 1, axis=1)
        return _logits(x_B1D, named(weights))[:, 0], keys, values

    def decode(
        weights: tuple[jax.Array, ...],
        token_B: jax.Array,
        length_B: jax.Array,
        keys_LBHSK: jax.Array,
        values_LBHSK: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows_B = jnp.arange(token_B.shape[0])

        def remember(layer: int, cache_LBHSK: jax.Array, new_B1HK: jax.Array) -> jax.Array:
            return cache_LBHSK[layer].at[rows_B, :, length_B].set(new_B1HK[:, 0]).swapaxes(1, 2)

        x_B1D, keys, values = _read(
            config,
            named(weights),
            token_B[:, None],
            length_B[:, None],
            visible_BTS=jnp.arange(keys_LBHSK.shape[3])[None, None] <= length_B[:, None, None],
            remember=lambda layer, k, v: (remember(layer, keys_LBHSK, k), remember(layer, values_LBHSK, v)),
        )
        return _logits(x_B1D, named(weights))[:, 0], keys, values

    tensors = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in weights.values())

    def symbols(names: str) -> tuple[Any, ...]:
        # For one program each: it may not know of a symbol that its arguments do not have.
        limited = names.partition(",")[2]
        return tuple(export.symbolic_shape(names, constraints=(f"{limited}<={config.n_positions}",)))

    b, t = symbols("b,t")
    tokens, length = jax.ShapeDtypeStruct((b, t), jnp.int32), jax.ShapeDtypeStruct((b,), jnp.int32)
    rows, s = symbols("b,s")
    token = jax.ShapeDtypeStruct((rows,), jnp.int32)
    cache_shape = (config.n_layer, rows, config.n_head, s, config.n_embd // config.n_head)
    cache = jax.ShapeDtypeStruct(cache_shape, jnp.dtype(config.dtype))

    def exported(function: Callable[..., Any], *arguments: Any) -> export.Exported:
        return export.export(jax.jit(function), platforms=PLATFORMS)(tensors, *arguments)

    return {
        "forward": exported(forward, tokens),
        "prefill": exported(prefill, tokens, length),
        "decode": exported(decode, token, token, cache, cache),
    }


def _read_prompt(
    config: ModelConfig, weights: Mapping[str, jax.Array], tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    positions_T = jnp.arange(tokens_BT.shape[1])
    visible_BTS = (positions_T[None] <= positions_T[:, None])[None]
    return _read(config, weights, tokens_BT, positions_T[None], visible_BTS, lambda layer, k, v: (k, v))


def _read(
    config: ModelConfig,
    weights: Mapping[str, jax.Array],
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    visible_BTS: jax.Array,
    remember: Callable[[int, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Final hidden states `[B, T, D]`, keys and values `[L, B, H, S, K]`.

    `remember(layer, k_BTHK, v_BTHK)` gives all that the tokens may attend to, `[B, S, H, K]`; B of positions and mask
    may be 1.
    """
    B, T = tokens_BT.shape
    D, H = config.n_embd, config.n_head
    dtype = jnp.dtype(config.dtype)

    def norm(name: str, x_BTD: jax.Array) -> jax.Array:
        params = {"scale": weights[f"{name}.weight"]} | ({"bias": weights[f"{name}.bias"]} if config.bias else {})
        y_BTD: Any = LayerNorm(config.layer_norm_epsilon, dtype, config.bias).apply({"params": params}, x_BTD)
        return y_BTD

    def project(name: str, x_BTD: jax.Array) -> jax.Array:
        y_BTF = jnp.tensordot(x_BTD, weights[f"{name}.weight"], axes=1)
        return y_BTF + weights[f"{name}.bias"][None, None] if config.bias else y_BTF

    x_BTD = weights["wte.weight"][tokens_BT] + weights["wpe.weight"][positions_BT]
    keys, values = [], []
    for layer in range(config.n_layer):
        h = f"h.{layer}"
        qkv_BT3D = project(f"{h}.attn.c_attn", norm(f"{h}.ln_1", x_BTD))
        q_BTHK, k_BTHK, v_BTHK = (part.reshape(B, T, H, D // H) for part in jnp.split(qkv_BT3D, 3, axis=-1))
        k_BSHK, v_BSHK = remember(layer, k_BTHK, v_BTHK)
        keys.append(k_BSHK.swapaxes(1, 2))
        values.append(v_BSHK.swapaxes(1, 2))
        weights_BHTS = attention_weights(q_BTHK, k_BSHK, visible_BTS).astype(dtype)
        out_BTHK = jnp.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK)
        x_BTD += project(f"{h}.attn.c_proj", out_BTHK.reshape(B, T, D))
        y_BTF = project(f"{h}.mlp.c_fc", norm(f"{h}.ln_2", x_BTD))
        y_BTF = nn.gelu(y_BTF, approximate=config.activation == "gelu_tanh")
        x_BTD += project(f"{h}.mlp.c_proj", y_BTF)
    return norm("ln_f", x_BTD), jnp.stack(keys), jnp.stack(values)


def _logits(x_BTD: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.einsum("btd,vd->btv", x_BTD, weights["wte.weight"], preferred_element_type=jnp.float32)


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
