"""Text to token ids and back."""

from gpt2_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "make_tokenizer"]
