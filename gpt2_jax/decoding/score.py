"""Log-likelihoods of a given text, in one pass.

Shapes: T length, C positions whose logits exist at a time, D width, V' padded vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.decoding.buckets import bucket
from gpt2_jax.decoding.layout import Decoder
from gpt2_jax.decoding.sampling import log_probs
from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.model.kv_cache import empty_cache
from gpt2_jax.model.unrolled import extend, next_token_logits

_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a text is.

    Attributes:
      ids: the tokens that were scored.
      log_probs: log p(token | those before it) of each, in nats.
      is_greedy: whether each is the most likely token at its place.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    is_greedy: tuple[bool, ...]

    @property
    def total(self) -> float:
        """Log-likelihood of the text, in nats."""
        return sum(self.log_probs)


def score(decoder: Decoder, ids: list[int]) -> Score:
    """Scores `ids[1:]`, each given those before it; `len(ids) - 1` is at most n_positions."""
    read, asked = ids[:-1], ids[1:]
    if not asked:
        return Score((), (), ())
    length = _CHUNK * bucket(-(-len(read) // _CHUNK))
    tokens_T, next_T = np.zeros(length, np.int32), np.zeros(length, np.int32)
    tokens_T[: len(read)], next_T[: len(asked)] = read, asked
    with decoder.on_mesh():
        log_prob_T, greedy_T = _score(
            decoder.weights, tokens_T, next_T, model=decoder.model, vocab_size=decoder.vocab_size
        )
    return Score(
        ids=tuple(asked),
        log_probs=tuple(np.asarray(log_prob_T)[: len(asked)].tolist()),
        is_greedy=tuple((np.asarray(greedy_T)[: len(asked)] == asked).tolist()),
    )


@functools.partial(jax.jit, static_argnames=("model", "vocab_size"))
def _score(
    weights: Params, tokens_T: jax.Array, next_T: jax.Array, *, model: GPT2, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of `next_T` after each token, and the most likely id there."""
    length = len(tokens_T)
    valid_1T = jnp.ones((1, length), bool)  # what stands after a text does not change what stands before
    x_1TD, _ = extend(model, weights, tokens_T[None], valid_1T, empty_cache(model.config, 1, length))

    def chunk(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_CD, next_C = part
        log_probs_CV = log_probs(next_token_logits(x_CD, weights["wte"]["embedding"], vocab_size))
        return jnp.take_along_axis(log_probs_CV, next_C[:, None], axis=1)[:, 0], log_probs_CV.argmax(axis=1)

    parts = x_1TD.reshape(-1, _CHUNK, x_1TD.shape[-1]), next_T.reshape(-1, _CHUNK)
    log_prob_NC, greedy_NC = jax.lax.map(chunk, parts)
    return log_prob_NC.reshape(-1), greedy_NC.reshape(-1)
