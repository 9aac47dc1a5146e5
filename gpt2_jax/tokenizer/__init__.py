"""Text to token ids and back."""

from gpt2_jax.tokenizer.tokenizer import (
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenizer_from_characters,
    tokenizer_from_merges,
)

__all__ = ["Tokenizer", "load_tokenizer", "make_tokenizer", "tokenizer_from_characters", "tokenizer_from_merges"]
