"""What is exported: a model with its tokenizer, and what is known of its training."""

import dataclasses
from collections.abc import Mapping

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model that can be used.

    Attributes:
      config: its shape; `vocab_size` filled in.
      params: its parameters, float32.
      tokenizer: its tokenizer.
      facts: what a reader should know of its training, as name and value, in order; for the model card.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
