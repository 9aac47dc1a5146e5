"""From logits to tokens: pure functions of a batch of logits and a key per row.

Temperature, penalties and filters act in the order of Hugging Face's `generate`: bias, penalties, temperature, top-k,
top-p, min-p. Filters replace the logits of what they leave out by -inf; tokens that tie at a threshold all stay.

Shapes: B rows, V' padded vocabulary, A alternatives, T prompt length.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UsageError


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
        _check("top_k", self.top_k, lambda x: type(x) is int and x >= 0, "integers from 0 (0 for all tokens)")
        _check("top_p", self.top_p, lambda x: 0 < x <= 1, "numbers above 0, up to 1 (1 for all tokens)")
        _check("min_p", self.min_p, lambda x: 0 <= x < 1, "numbers from 0 to below 1 (0 for all tokens)")
        _check("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "numbers above 0 (1 for none)")
        _check("presence_penalty", self.presence_penalty, lambda x: True, "numbers (0 for none)")
        _check("frequency_penalty", self.frequency_penalty, lambda x: True, "numbers (0 for none)")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or not _is_number(bias) or math.isnan(bias) or bias == math.inf:
                raise UsageError(f"logit_bias {token!r}={bias!r}; allowed: an id and a number, or -inf to ban the id")

    @property
    def penalizes(self) -> bool:
        """Whether `choose` needs a `History`."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def values(self, vocab_size: int, padded: int) -> dict[str, jax.Array | np.ndarray]:
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


class History(flax.struct.PyTreeNode):
    """Which tokens each row has seen.

    Attributes:
      in_prompt_BV: whether the prompt has the token.
      count_BV: how often the text has it, int32.
    """

    in_prompt_BV: jax.Array
    count_BV: jax.Array


@functools.partial(jax.jit, static_argnames=("vocab_rows", "copies"))
def prompt_history(tokens_BT: jax.Array, length_B: jax.Array, vocab_rows: int, copies: int = 1) -> History:
    """The history before the first token: `copies` rows of each prompt, `vocab_rows` is V'."""
    valid_BT = jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    in_prompt_BV = jnp.zeros((len(tokens_BT), vocab_rows), bool).at[rows_B1, tokens_BT].max(valid_BT)
    in_prompt_BV = jnp.repeat(in_prompt_BV, copies, axis=0)
    return History(in_prompt_BV, jnp.zeros(in_prompt_BV.shape, jnp.int32))


def count(history: History, token_B: jax.Array, live_B: jax.Array) -> History:
    """With one more token in the rows that are live."""
    rows_B = jnp.arange(len(token_B))
    return history.replace(count_BV=history.count_BV.at[rows_B, token_B].add(live_B.astype(jnp.int32)))


def choose(
    logits_BV: jax.Array, key_B: jax.Array, values: Mapping[str, jax.Array], history: History | None
) -> jax.Array:
    """The next token of each row, int32.

    Args:
      logits_BV: float32; -inf for what must not be drawn.
      key_B: each row draws with its own key, so that no other row matters.
      values: from `Sampling.values`.
      history: needed where a penalty is on.
    """
    if "logit_bias" in values:
        logits_BV = logits_BV + values["logit_bias"][None]
    if history is not None:
        logits_BV = _penalize(logits_BV, values, history)
    if "temperature" not in values:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / values["temperature"]
    if "top_k" in values:
        logits_BV = keep_top_k(logits_BV, values["top_k"])
    if "top_p" in values:
        logits_BV = keep_top_p(logits_BV, values["top_p"])
    if "min_p" in values:
        logits_BV = keep_min_p(logits_BV, values["min_p"])
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def _penalize(logits_BV: jax.Array, values: Mapping[str, jax.Array], history: History) -> jax.Array:
    if "repetition_penalty" in values:
        seen_BV = history.in_prompt_BV | (history.count_BV > 0)
        logits_BV = penalize_repetition(logits_BV, seen_BV, values["repetition_penalty"])
    if "presence_penalty" in values:
        logits_BV = logits_BV - values["presence_penalty"] * (history.count_BV > 0)
    if "frequency_penalty" in values:
        logits_BV = logits_BV - values["frequency_penalty"] * history.count_BV
    return logits_BV


def penalize_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of seen tokens divided by the penalty where positive, else multiplied (Keskar et al. 2019, CTRL)."""
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: jax.Array) -> jax.Array:
    """Only the k most likely tokens (Fan et al. 2018)."""
    p_BV = jax.nn.softmax(logits_BV, axis=-1)
    least_B = _greatest_threshold(p_BV, lambda kept_BV: kept_BV.sum(axis=-1) >= k)
    return jnp.where(p_BV >= least_B[:, None], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """The smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020, nucleus sampling)."""
    p_BV = jax.nn.softmax(logits_BV, axis=-1)
    least_B = _greatest_threshold(p_BV, lambda kept_BV: jnp.where(kept_BV, p_BV, 0).sum(axis=-1) >= p)
    return jnp.where(p_BV >= least_B[:, None], logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """Only tokens at least p times as likely as the most likely one (Nguyen et al. 2024)."""
    threshold_B1 = logits_BV.max(axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def _greatest_threshold(p_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The greatest value of which the tokens at or above it are enough; 0 if even all are not.

    A bisection over the bits of a float32, exact in 31 passes: numbers from 0 up are ordered like their bits. Sorting
    the vocabulary takes thirty times as long on CPU.
    """

    def try_bit(step: jax.Array, bits_B: jax.Array) -> jax.Array:
        trial_B = bits_B | (jnp.int32(1) << (30 - step))
        threshold_B = jax.lax.bitcast_convert_type(trial_B, jnp.float32)
        # NaN, the largest patterns, keeps nothing.
        return jnp.where(enough(p_BV >= threshold_B[:, None]), trial_B, bits_B)

    bits_B = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(len(p_BV), jnp.int32))
    return jax.lax.bitcast_convert_type(bits_B, jnp.float32)


def log_probs(logits_BV: jax.Array) -> jax.Array:
    """The model's own log-probabilities, in nats, of logits that nothing has changed."""
    return jax.nn.log_softmax(logits_BV, axis=-1)


def _check(name: str, value: Any, allowed: Callable[[Any], bool], words: str) -> None:
    if not _is_number(value) or not math.isfinite(value) or not allowed(value):
        raise UsageError(f"{name}={value!r}; allowed: {words}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
