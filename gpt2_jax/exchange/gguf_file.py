"""A model with its tokenizer as one GGUF file, which llama.cpp and what is built on it run.

The names of tensors and of metadata are those of the `gguf` library. GGUF stores matrices `[out, in]`, where we and
Hugging Face have `[in, out]`. Nothing is left to the reader of the file: what the format cannot say is refused.
"""

import dataclasses
import os
import pathlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.names import Tensor, params_from_tensors, tensors, tensors_from_params
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer.byte_pair_encoding import BYTE_OF_SYMBOL, END_OF_TEXT

GGUF_TYPES = ("float32", "float16", "q8_0")

# Of each type, the gguf library's names of a tensor's type and of a file's.
_GGML_TYPE = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
_FILE_TYPE = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
_Q8_BLOCK = 32  # values of a row that share a scale
# The largest value each can hold; the scale of a q8_0 block is a float16 that is multiplied by up to 127.
_LARGEST = {"float32": np.inf, "float16": 65504.0, "q8_0": 127 * 65504.0}


def write_gguf(file: pathlib.Path, bundle: Bundle, dtype: str = "float16") -> None:
    """Write `bundle` as the GGUF file `file`, whose name is also the model's; what was there is replaced.

    Args:
      dtype: one of `GGUF_TYPES`, the type of the matrices and the token table. Biases, norms and the position table
        are float32 always, as llama.cpp's own converter has them.

    Raises:
      UsageError: GGUF cannot express the model or its tokenizer in this type, `gguf` is not installed, or the file
        cannot be written.
      DataError: the tokenizer has ids that the model does not have.
    """
    _refuse_what_gguf_cannot_express(bundle, dtype)
    gguf = _library()
    config = dataclasses.replace(bundle.config, bias=True)  # GGUF's GPT-2 has biases: zeros stand for none
    names = _names(gguf, config)
    types_of = {tensor.name: gguf.GGMLQuantizationType[_GGML_TYPE[_type(tensor, dtype)]] for tensor in tensors(config)}

    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    _add_model(gguf, writer, config, file.stem, dtype)
    _add_tokenizer(gguf, writer, bundle.tokenizer, config.vocab_size)
    for tensor in tensors(config):  # sizes first, so that only one tensor at a time is in memory
        ggml_type = types_of[tensor.name]
        shape = _stored_shape(tensor)
        block, bytes_of_block = gguf.GGML_QUANT_SIZES[ggml_type]
        size = int(np.prod(shape)) // block * bytes_of_block
        writer.add_tensor_info(names[tensor.name], shape, np.dtype(np.float32), size, raw_dtype=ggml_type)
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor, value in tensors_from_params(bundle.config, bundle.params, always_biases=True):
                _refuse_overflow(tensor, value, dtype)
                value = np.ascontiguousarray(value.T) if _is_transposed(tensor) else value
                writer.write_tensor_data(gguf.quants.quantize(value, types_of[tensor.name]))
        finally:
            writer.close()
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error}); name another file or make room") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_gguf(file: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model in a GGUF file that `write_gguf` wrote.

    Returns:
      Its config, and its parameters as a tree of float32 NumPy arrays in our shapes.

    Raises:
      DataError: the file is missing, cut short, or holds something else; names the file.
      UsageError: `gguf` is not installed.
    """
    gguf = _library()
    try:
        reader = gguf.GGUFReader(file)
        config = _config(gguf, reader, file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"{file}: not a whole GGUF file ({error}); write it again") from None
    return config, params_from_tensors(config, _checked_reader(gguf, reader, config, file))


def read_merges(file: pathlib.Path) -> list[str]:
    """The merges of the tokenizer in a GGUF file that `write_gguf` wrote."""
    gguf = _library()
    merges: list[str] = gguf.GGUFReader(file).get_field(gguf.Keys.Tokenizer.MERGES).contents()
    return merges


def _library() -> types.ModuleType:
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF files need the package gguf: pip install 'gpt2-jax[gguf]'") from None
    return gguf


def _refuse_what_gguf_cannot_express(bundle: Bundle, dtype: str) -> None:
    config, tokenizer = bundle.config, bundle.tokenizer
    if dtype not in GGUF_TYPES:
        raise UsageError(f"GGUF type {dtype!r} is not one of {', '.join(GGUF_TYPES)}")
    if not tokenizer.merges:
        raise UsageError(
            f"tokenizer {tokenizer.name} cannot be written as GGUF, which has byte-level BPE only; "
            "export another format, or train with --config.tokenizer.name=gpt2 or bpe:N"
        )
    if tokenizer.normalization != "none":
        raise UsageError(
            f"tokenizer.normalization={tokenizer.normalization} cannot be written as GGUF, whose readers do not "
            "normalize for GPT-2; export another format, or train with --config.tokenizer.normalization=none"
        )
    if tokenizer.lowercase:
        raise UsageError(
            "tokenizer.lowercase=True cannot be written as GGUF, whose readers do not lowercase for GPT-2; "
            "export another format, or train with --config.tokenizer.lowercase=False"
        )
    if config.activation != "gelu_tanh":
        raise UsageError(
            f"model.activation={config.activation} cannot be written as GGUF, whose GPT-2 has gelu_tanh only; "
            "export another format, or train with --config.model.activation=gelu_tanh"
        )
    if dtype == "q8_0" and config.n_embd % _Q8_BLOCK:
        raise UsageError(
            f"model.n_embd={config.n_embd} is not divisible by {_Q8_BLOCK}, the values in a block of q8_0; "
            "write float16 or float32"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only {config.vocab_size}; "
            "they do not belong together"
        )


def _refuse_overflow(tensor: Tensor, value: np.ndarray, dtype: str) -> None:
    of_tensor = _type(tensor, dtype)
    largest = float(np.abs(value).max())
    if largest > _LARGEST[of_tensor]:
        raise UsageError(f"{tensor.name} has a value of size {largest:g}, too large for {of_tensor}; write float32")


def _names(gguf: types.ModuleType, config: ModelConfig) -> dict[str, str]:
    """GGUF's name of each tensor, by Hugging Face's."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    return {tensor.name: table.get_name(tensor.name, try_suffixes=(".weight", ".bias")) for tensor in tensors(config)}


def _is_transposed(tensor: Tensor) -> bool:
    return tensor.path[-1] == "kernel"


def _stored_shape(tensor: Tensor) -> tuple[int, ...]:
    return tensor.shape[::-1] if _is_transposed(tensor) else tensor.shape


def _type(tensor: Tensor, dtype: str) -> str:
    """The type of `GGUF_TYPES` in which a file of type `dtype` has this tensor."""
    return dtype if _is_transposed(tensor) or tensor.path[0] == "wte" else "float32"


def _add_model(gguf: types.ModuleType, writer: Any, config: ModelConfig, name: str, dtype: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPE[dtype]])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_tokenizer(gguf: types.ModuleType, writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    tokens = [*BYTE_OF_SYMBOL, *(merge.replace(" ", "") for merge in tokenizer.merges), END_OF_TEXT]
    token_types = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    for unused in range(len(tokens), vocab_size):  # readers want a token for each row of the table
        tokens.append(f"[PAD{unused}]")
        token_types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(token_types)
    writer.add_token_merges(list(tokenizer.merges))
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)


def _config(gguf: types.ModuleType, reader: Any, file: pathlib.Path) -> ModelConfig:
    def value(key: str, kind: type) -> Any:
        field = reader.get_field(key.format(arch=architecture))
        found = None if field is None else field.contents()
        if type(found) is not kind:
            raise DataError(f"{file}: {key.format(arch=architecture)} is {found!r}; expected {kind.__name__}")
        return found

    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2]
    keys = gguf.Keys
    found = value(keys.General.ARCHITECTURE, str)
    if found != architecture:
        raise DataError(f"{file}: the architecture is {found!r}; only {architecture} can be read")
    epsilon = value(keys.Attention.LAYERNORM_EPS, float)
    try:
        return ModelConfig(
            n_layer=value(keys.LLM.BLOCK_COUNT, int),
            n_head=value(keys.Attention.HEAD_COUNT, int),
            n_embd=value(keys.LLM.EMBEDDING_LENGTH, int),
            n_positions=value(keys.LLM.CONTEXT_LENGTH, int),
            vocab_size=value(keys.LLM.VOCAB_SIZE, int),
            layer_norm_epsilon=float(str(np.float32(epsilon))),  # 1e-5, not the digits of its float32
        )
    except UsageError as error:
        raise DataError(f"{file}: {error}") from None


def _checked_reader(
    gguf: types.ModuleType, reader: Any, config: ModelConfig, file: pathlib.Path
) -> Callable[[str], np.ndarray]:
    """Reads tensors by Hugging Face's names, once all have been found with the shapes that they should have."""
    names = _names(gguf, config)
    stored = {found.name: found for found in reader.tensors}
    for tensor in tensors(config):
        name, shape = names[tensor.name], _stored_shape(tensor)
        if name not in stored:
            raise DataError(f"{file}: {name} is missing")
        found = tuple(int(size) for size in stored[name].shape[::-1])  # GGUF has the fastest axis first
        if found != shape:
            raise DataError(f"{file}: {name} has shape {found}, by the metadata it should be {shape}")
    for name in stored.keys() - names.values():
        raise DataError(f"{file}: {name} is in the file, which our GPT-2 does not have")
    transposed = {tensor.name for tensor in tensors(config) if _is_transposed(tensor)}

    def read(name: str) -> np.ndarray:
        found = stored[names[name]]
        try:
            value = gguf.quants.dequantize(found.data, found.tensor_type)
        except NotImplementedError:
            allowed = ", ".join(_GGML_TYPE.values())
            raise DataError(f"{file}: {found.name} has type {found.tensor_type.name}; allowed: {allowed}") from None
        return value.T if name in transposed else value

    return read
