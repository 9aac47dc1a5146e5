"""Prompts into a cache, and tokens out of it: pure functions, compiled once per shape.

All rows of a batch go in step. A row ends by a token that stops it, by its number of tokens or at the end of the
context; from then on it is carried along without effect, until the caller sees that all have ended.

Shapes: B rows, P slots of the longest prompt, S slots of the cache, D width, V' padded vocabulary, N stopping ids,
A alternatives told per token, C steps of a chunk.
"""

import dataclasses
import enum
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gpt2_jax.decoding.sampling import History, choose, count, log_probs, top_log_probs
from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.model.kv_cache import KVCache, empty_cache, expand, repeat_rows
from gpt2_jax.model.unrolled import extend, next_token_logits
from gpt2_jax.sharding import constrain


class Ended(enum.IntEnum):
    """Why a row draws no more tokens."""

    NOT_YET = 0
    STOP_ID = 1
    LENGTH = 2
    CONTEXT = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiled programs depend on.

    Attributes:
      model: the module; `config.dtype` is the type of the arithmetic and the cache.
      vocab_size: ids from here on are never drawn: those that have no text.
      alternatives: most likely tokens told with each token, besides the one that was drawn.
    """

    model: GPT2
    vocab_size: int
    alternatives: int = 0


class Request(flax.struct.PyTreeNode):
    """What was asked for, as arrays, so that other values need no other program.

    Attributes:
      key_B: each row's own random key.
      sampling: from `settings.Sampling.values`.
      stop_ids_N: ids after which a row ends; -1 for none.
      max_tokens_B: tokens after which a row ends.
    """

    key_B: jax.Array
    sampling: dict[str, Any]
    stop_ids_N: jax.Array
    max_tokens_B: jax.Array


class Drawn(flax.struct.PyTreeNode):
    """One token per row.

    Attributes:
      token_B: its id; of no meaning where `live_B` is false.
      live_B: whether the row had not ended before.
      log_prob_B: the model's log-probability of the token, before temperature, filters and penalties.
      top_ids_BA: the most likely tokens at this place.
      top_log_probs_BA: and their log-probabilities.
      ended_B: an `Ended`.
    """

    token_B: jax.Array
    live_B: jax.Array
    log_prob_B: jax.Array
    top_ids_BA: jax.Array
    top_log_probs_BA: jax.Array
    ended_B: jax.Array


class DecodeState(flax.struct.PyTreeNode):
    """What is carried from token to token.

    Attributes:
      cache: all tokens before the newest.
      token_B: the newest, drawn and not yet read.
      count_B: tokens drawn so far.
      ended_B: an `Ended`.
      history: which tokens there were, where a penalty asks for it.
    """

    cache: KVCache
    token_B: jax.Array
    count_B: jax.Array
    ended_B: jax.Array
    history: History | None


def prefill(
    weights: Params, tokens_BP: jax.Array, length_B: jax.Array, *, plan: Plan, slots: int, copies: int = 1
) -> tuple[jax.Array, KVCache]:
    """Reads prompts of unequal length in one pass.

    Args:
      weights: from `unrolled.unstack`.
      tokens_BP: prompts, each at the start of its row.
      length_B: their lengths, from 1 to n_positions.
      plan: the model.
      slots: S of the cache, P or more.
      copies: rows made of each prompt, one after another.

    Returns:
      Logits `[B * copies, V']` of the token after each prompt, and the cache.
    """
    rows, longest = tokens_BP.shape
    valid_BP = jnp.arange(longest)[None] < length_B[:, None]
    tokens_BP = constrain(tokens_BP, "batch", "length")
    x_BPD, cache = extend(plan.model, weights, tokens_BP, valid_BP, empty_cache(plan.model.config, rows, longest))
    x_BD = jnp.take_along_axis(x_BPD, length_B[:, None, None] - 1, axis=1)[:, 0]
    logits_BV = _logits(weights, x_BD, plan)
    return repeat_rows(logits_BV, copies), expand(cache, slots, copies)


def decode_step(
    weights: Params, token_B: jax.Array, live_B: jax.Array, cache: KVCache, *, plan: Plan
) -> tuple[jax.Array, KVCache]:
    """Reads one more token per row.

    Args:
      weights: from `unrolled.unstack`.
      token_B: the tokens.
      live_B: rows that take theirs; those of the others leave no trace.
      cache: with a free slot.
      plan: the model.

    Returns:
      Logits `[B, V']` of the token after it, and the cache with it.
    """
    x_B1D, cache = extend(plan.model, weights, token_B[:, None], live_B[:, None], cache)
    return _logits(weights, x_B1D[:, 0], plan), cache


@functools.partial(jax.jit, static_argnames=("plan", "slots", "copies"))
def begin(
    weights: Params,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    count_B: jax.Array,
    history: History | None,
    request: Request,
    *,
    plan: Plan,
    slots: int,
    copies: int = 1,
) -> tuple[DecodeState, Drawn]:
    """`prefill`, and the first token drawn.

    Args:
      weights: from `unrolled.unstack`.
      tokens_BP: prompts, each at the start of its row.
      length_B: their lengths.
      count_B: per row (copies included), tokens that were drawn before: not 0 where a text goes on in a new cache.
      history: of each row, or None where no penalty asks for it.
      request: what was asked for.
      plan: the model.
      slots: S of the cache: P and one for each step that will be taken.
      copies: rows made of each prompt.
    """
    logits_BV, cache = prefill(weights, tokens_BP, length_B, plan=plan, slots=slots, copies=copies)
    live_B = jnp.ones(count_B.shape, bool)
    return _draw(logits_BV, cache, live_B, count_B, history, request, plan)


@functools.partial(jax.jit, static_argnames=("plan", "steps"), donate_argnames="state")
def advance(
    weights: Params, state: DecodeState, request: Request, *, plan: Plan, steps: int
) -> tuple[DecodeState, Drawn]:
    """Draws `steps` more tokens per row: C on the first axis of each array of `Drawn`. `state` is given away."""

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Drawn]:
        live_B = state.ended_B == Ended.NOT_YET
        logits_BV, cache = decode_step(weights, state.token_B, live_B, state.cache, plan=plan)
        after, drawn = _draw(logits_BV, cache, live_B, state.count_B, state.history, request, plan)
        return after.replace(ended_B=jnp.where(live_B, after.ended_B, state.ended_B)), drawn

    return jax.lax.scan(step, state, None, length=steps)


def _draw(
    logits_BV: jax.Array,
    cache: KVCache,
    live_B: jax.Array,
    count_B: jax.Array,
    history: History | None,
    request: Request,
    plan: Plan,
) -> tuple[DecodeState, Drawn]:
    # By the number of the token, so that neither chunks nor other rows matter.
    key_B = jax.vmap(jax.random.fold_in)(request.key_B, count_B)
    token_B = choose(logits_BV, key_B, request.sampling, history)
    count_B = count_B + live_B
    ended_B = jnp.select(
        [
            (token_B[:, None] == request.stop_ids_N[None]).any(axis=1),
            count_B >= request.max_tokens_B,
            cache.length_B >= plan.model.config.n_positions,
        ],
        [Ended.STOP_ID, Ended.LENGTH, Ended.CONTEXT],
        Ended.NOT_YET,
    ).astype(jnp.int32)
    top_ids_BA, top_log_probs_BA = top_log_probs(logits_BV, plan.alternatives)
    drawn = Drawn(
        token_B=token_B,
        live_B=live_B,
        log_prob_B=jnp.take_along_axis(log_probs(logits_BV), token_B[:, None], axis=1)[:, 0],
        top_ids_BA=top_ids_BA,
        top_log_probs_BA=top_log_probs_BA,
        ended_B=ended_B,
    )
    if history is not None:
        history = count(history, token_B, live_B)
    return DecodeState(cache=cache, token_B=token_B, count_B=count_B, ended_B=ended_B, history=history), drawn


def _logits(weights: Params, x_BD: jax.Array, plan: Plan) -> jax.Array:
    logits_BV = next_token_logits(x_BD, weights["wte"]["embedding"], plan.vocab_size)
    return constrain(logits_BV, "batch", "vocab")
