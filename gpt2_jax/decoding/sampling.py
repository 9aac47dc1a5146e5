"""From logits to tokens: pure functions of a batch of logits and a key per row.

Temperature, penalties and filters act in the order of Hugging Face's `generate`: bias, penalties, temperature, top-k,
top-p, min-p. Filters replace the logits of what they leave out by -inf; tokens that tie at a threshold all stay.

Shapes: B rows, V' padded vocabulary, A alternatives, T prompt length.
"""

import functools
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp


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
        return most_likely(logits_BV)
    # Less than the highest, so that the division by something small overflows where it does not matter.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / jnp.maximum(values["temperature"], 1e-6)
    if "top_k" in values:
        logits_BV = keep_top_k(logits_BV, values["top_k"])
    if "top_p" in values:
        logits_BV = keep_top_p(logits_BV, values["top_p"])
    if "min_p" in values:
        logits_BV = keep_min_p(logits_BV, values["min_p"])
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def most_likely(logits_BV: jax.Array) -> jax.Array:
    """The id of the highest logit, int32; of ties the lowest id. Like argmax, and four times as fast on CPU."""
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    highest_B1 = logits_BV.max(axis=1, keepdims=True)
    return jnp.where(logits_BV < highest_B1, ids_V[-1], ids_V).min(axis=1)


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
    """The smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020, nucleus sampling).

    Always one or more. The sum is rounded as float32: sets whose probability is within about 1e-6 of p may be either.
    """
    p_BV = jax.nn.softmax(logits_BV, axis=-1)
    p = jnp.maximum(p, jnp.finfo(jnp.float32).tiny)  # else the probability 0 of no tokens would reach it
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


def top_log_probs(logits_BV: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Ids and `log_probs` of the most likely tokens, `[B, number]` each, in order; of ties the lower id first."""
    log_probs_BA, ids_BA = jax.lax.top_k(log_probs(logits_BV), number)
    return ids_BA, log_probs_BA
