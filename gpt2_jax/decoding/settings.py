"""What a user asks of decoding: plain numbers, checked. Nothing here needs JAX."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpt2_jax.errors import UsageError

_LARGEST = 1e38  # that float32 holds
BEYOND_CONTEXT = ("stop", "slide")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises UsageError for values out of range.

    Attributes:
      temperature: the logits are divided by it; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 for all.
      top_p: only the most likely tokens that together reach this probability, in (0, 1]; 1 for all.
      min_p: only tokens at least this fraction as likely as the most likely one, in [0, 1); 0 for all.
      repetition_penalty: above 1, tokens of prompt and text become less likely; 1 for none.
      presence_penalty: subtracted from the logits of tokens that the text has.
      frequency_penalty: subtracted as often as the text has the token.
      logit_bias: added to the logits of these ids; -inf bans one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda x: x >= 0, "numbers from 0 (0 takes the most likely token)")
        _check(
            "top_k",
            self.top_k,
            lambda x: type(x) is int and 0 <= x < 2**31,
            "integers from 0 to 2147483647 (0 for all tokens)",
        )
        _check("top_p", self.top_p, lambda x: 0 < x <= 1, "numbers above 0, up to 1 (1 for all tokens)")
        _check("min_p", self.min_p, lambda x: 0 <= x < 1, "numbers from 0 to below 1 (0 for all tokens)")
        _check("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "numbers above 0 (1 for none)")
        _check("presence_penalty", self.presence_penalty, lambda x: True, "numbers (0 for none)")
        _check("frequency_penalty", self.frequency_penalty, lambda x: True, "numbers (0 for none)")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or not _is_number(bias) or not (abs(bias) <= _LARGEST or bias == -math.inf):
                raise UsageError(f"logit_bias {token!r}={bias!r}; allowed: an id and a number, or -inf to ban the id")

    @property
    def penalizes(self) -> bool:
        """Whether `choose` needs a `History`."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def values(self, vocab_size: int, padded: int) -> dict[str, np.ndarray]:
        """What is switched on, as arrays: programs are compiled per set of names, not per value.

        Args:
          vocab_size: ids that may be drawn.
          padded: V', the width of the logits.

        Raises:
          UsageError: an id of `logit_bias` is outside the vocabulary, or all ids are banned.
        """
        off = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
        off |= {"frequency_penalty": 0, "temperature": 0}
        values: dict[str, Any] = {
            name: np.asarray(getattr(self, name), np.int32 if name == "top_k" else np.float32)
            for name, neutral in off.items()
            if getattr(self, name) != neutral
        }
        if self.logit_bias:
            bias_V = np.zeros(padded, np.float32)
            for token, bias in self.logit_bias.items():
                if not 0 <= token < vocab_size:
                    raise UsageError(
                        f"logit_bias of id {token}, outside the vocabulary; allowed: 0 to {vocab_size - 1}"
                    )
                bias_V[token] = bias
            if np.isneginf(bias_V[:vocab_size]).all():
                raise UsageError("logit_bias bans all tokens; allowed: bans that leave at least one")
            values["logit_bias"] = bias_V
        return values


@dataclasses.dataclass(frozen=True)
class Stopping:
    """When a text ends, whichever comes first.

    Attributes:
      max_new_tokens: tokens per text, 1 or more.
      end_of_text: at the tokenizer's end-of-text, if it has one.
      ids: at one of these token ids.
      strings: before the first of these strings to be complete, also where it begins and ends within tokens.
      beyond_context: what happens when prompt and text have filled the model's positions: "stop", or "slide": go on
        from the last half of them, read anew.
    """

    max_new_tokens: int = 128
    end_of_text: bool = True
    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()
    beyond_context: str = "stop"

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens!r}; allowed: integers from 1")
        if self.beyond_context not in BEYOND_CONTEXT:
            raise UsageError(f"beyond_context={self.beyond_context!r}; allowed: {', '.join(BEYOND_CONTEXT)}")
        if isinstance(self.strings, str) or not all(self.strings):
            raise UsageError(f"stop strings {self.strings!r}; allowed: a sequence of strings that are not empty")


def _check(name: str, value: Any, allowed: Callable[[Any], bool], words: str) -> None:
    if not _is_number(value) or not abs(value) <= _LARGEST or not allowed(value):
        raise UsageError(f"{name}={value!r}; allowed: {words}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
