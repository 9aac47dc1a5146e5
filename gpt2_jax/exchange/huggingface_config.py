"""config.json of a Hugging Face GPT-2: its fields, and what of them this model can be."""

import pathlib
from typing import Any

from gpt2_jax.config import ModelConfig
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.json_object import read_json, shown

# Fields that change what is computed, and the only values under which it is this GPT-2; absent fields have the first,
# the default of transformers' GPT2Config (5.23, models/gpt2/configuration_gpt2.py).
_ONLY: dict[str, tuple[Any, ...]] = {
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
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_erf"}
# A field of ours, which transformers keeps and does not use: false where all biases are zeros that stand for none.
_BIAS = "gpt2_jax_bias"


def config_fields(config: ModelConfig, end_of_text: int | None, dtype: str) -> dict[str, Any]:
    """The fields of a model whose weights are stored as `dtype`."""
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    fields = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(config, name) for name in _FIELDS},
        "n_ctx": config.n_positions,  # which older readers ask for
        "n_inner": None,
        "activation_function": activation,
        **{name: allowed[0] for name, allowed in _ONLY.items()},
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "use_cache": True,
        "dtype": dtype,
    }
    return fields if config.bias else {**fields, _BIAS: False}


def read_config(file: pathlib.Path) -> ModelConfig:
    """The shape of a model. Raises DataError, naming the field, for what is not this GPT-2."""
    fields = read_json(file)
    if fields.get("model_type") != "gpt2":
        raise DataError(f"{file}: model_type is {shown(fields.get('model_type'))}; only gpt2 can be read")
    for name, allowed in _ONLY.items():
        if fields.get(name, allowed[0]) not in allowed:
            listed = " or ".join(repr(value) for value in allowed)
            raise DataError(f"{file}: {name} is {shown(fields[name])}, GPT-2's is {listed}; this model cannot be read")
    activation = fields.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise DataError(
            f"{file}: activation_function is {shown(activation)}, GPT-2's is 'gelu_new'; "
            f"allowed: {', '.join(_ACTIVATIONS)}"
        )
    bias = fields.get(_BIAS, True)
    if not isinstance(bias, bool):
        raise DataError(f"{file}: {_BIAS} is {shown(bias)}; allowed: true, false")
    values = {name: fields.get(name, default) for name, default in _FIELDS.items()}
    if "n_positions" not in fields and "n_ctx" in fields:  # the name of the first versions
        values["n_positions"] = fields["n_ctx"]
    for name, value in values.items():
        if type(value) not in (int, float):
            raise DataError(f"{file}: {name}={shown(value)}; allowed: a number")
    try:
        for name, default in _FIELDS.items():
            if isinstance(default, float) and type(values[name]) is int:
                values[name] = float(values[name])
        config = ModelConfig(**values, activation=_ACTIVATIONS[activation], bias=bias)
    except UsageError as error:
        raise DataError(f"{file}: {error}") from None
    if config.vocab_size == 0:
        raise DataError(f"{file}: vocab_size is 0; a model has tokens")
    if fields.get("n_inner") not in (None, 4 * config.n_embd):
        raise DataError(f"{file}: n_inner is {shown(fields['n_inner'])}, GPT-2's is 4 * n_embd = {4 * config.n_embd}")
    return config
