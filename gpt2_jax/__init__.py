"""GPT-2 in JAX: trained, decoded, measured and exported, from one CPU to a TPU pod."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Looked up at first use, so that importing the package costs nothing.
_PUBLIC = {
    "load": "gpt2_jax.run.load",
    "GPT2": "gpt2_jax.model.gpt2",
    "init_params": "gpt2_jax.model.gpt2",
    "parameter_count": "gpt2_jax.model.gpt2",
    "ModelConfig": "gpt2_jax.config",
    "RunConfig": "gpt2_jax.config",
    "StepSettings": "gpt2_jax.training.steps",
    "train_step": "gpt2_jax.training.steps",
    "eval_step": "gpt2_jax.training.steps",
    "Generator": "gpt2_jax.decoding.generate",
    "Sampling": "gpt2_jax.decoding.settings",
    "Stopping": "gpt2_jax.decoding.settings",
    "make_tokenizer": "gpt2_jax.tokenizer",
    "load_tokenizer": "gpt2_jax.tokenizer",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gpt2_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
