"""A batch of rows from prompt to last token: shapes that repeat, chunks, and a new cache where the context slides.

Everything here is ids; text is made in `generate.py`.

Shapes: B rows, P slots of the longest prompt, A alternatives per token.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.decoding.buckets import bucket
from gpt2_jax.decoding.decoder import DecodeState, Drawn, Ended, Plan, Request, advance, begin
from gpt2_jax.decoding.layout import Decoder
from gpt2_jax.decoding.sampling import History, prompt_history
from gpt2_jax.decoding.settings import Sampling
from gpt2_jax.model.gpt2 import padded_vocab_size

_SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Limits:
    """When rows end.

    Attributes:
      max_tokens: tokens drawn per row, 1 or more.
      stop_ids: ids after which a row ends.
      slide: at the end of the context go on with its last half, in a new cache; else the row ends there.
    """

    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    slide: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
    """One drawn token.

    Attributes:
      row: of the batch: those of the first prompt first.
      id: the token.
      log_prob: the model's log-probability of it, in nats, before temperature, filters and penalties.
      alternatives: the most likely ids at its place with their log-probabilities, best first.
      ended: whether and why it is the last one of its row.
    """

    row: int
    id: int
    log_prob: float
    alternatives: tuple[tuple[int, float], ...]
    ended: Ended


class Batch:
    """Rows that are decoded together. Iterate once, for the tokens in the order in which they are drawn."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        limits: Limits,
        samples: Sequence[int] = (0,),
        seed: int = 0,
        alternatives: int = 0,
        chunk: int = 16,
    ) -> None:
        """Nothing is computed yet.

        Args:
          decoder: the model.
          prompts: ids, each prompt with 1 to n_positions of them.
          sampling: how tokens are drawn.
          limits: when rows end.
          samples: a row per prompt for each of these numbers.
          seed: a row's key depends on it, the prompt and the number of the sample, and on nothing else.
          alternatives: most likely tokens told with each token.
          chunk: tokens per row and call of the compiled loop.
        """
        self._vocab_rows = padded_vocab_size(decoder.model.config.vocab_size)
        self._decoder, self._limits, self._copies, self._chunk = decoder, limits, len(samples), chunk
        self._plan = Plan(decoder.model, decoder.vocab_size, alternatives)
        fillers = decoder.row_shards * bucket(-(-len(prompts) // decoder.row_shards)) - len(prompts)
        self._prompts = [*map(list, prompts), *([0] for _ in range(fillers))]
        rows = len(self._prompts) * len(samples)
        self._live = [row < len(prompts) * len(samples) for row in range(rows)]
        self._contexts = [list(prompt) for prompt in self._prompts for _ in samples]
        self._count_B = np.zeros(rows, np.int32)
        self._penalizes = sampling.penalizes
        # Prompts have keys of their own, so that the draws for one say nothing of those for another.
        hashes = [zlib.crc32(np.array(prompt, np.uint32).tobytes()) for prompt in self._prompts for _ in samples]
        numbers = np.array([*samples] * len(self._prompts), np.uint32)
        self._request = Request(
            key_B=_row_keys(seed, np.array(hashes, np.uint32), numbers),
            sampling=sampling.values(decoder.vocab_size, self._vocab_rows),
            stop_ids_N=jnp.array(sorted(set(limits.stop_ids)) or [-1], jnp.int32),
            # Rows that only fill the batch end with their first token.
            max_tokens_B=jnp.array([limits.max_tokens if live else 1 for live in self._live], jnp.int32),
        )

    def end(self, row: int) -> None:
        """No more tokens of this row are wanted."""
        self._live[row] = False

    def __iter__(self) -> Iterator[Token]:
        state, drawn = self._begin(self._prompts, self._copies, None)
        while True:
            slides = False
            for token in self._tokens(drawn):
                if token.ended == Ended.CONTEXT and self._limits.slide:
                    slides, token = True, dataclasses.replace(token, ended=Ended.NOT_YET)
                if token.ended:
                    self.end(token.row)
                yield token
            if not any(self._live):
                return
            state, drawn = self._slide(state) if slides else self._advance(state)

    def _begin(self, prompts: list[list[int]], copies: int, history: History | None) -> tuple[DecodeState, Drawn]:
        length_B = np.array([len(prompt) for prompt in prompts], np.int32)
        positions = self._decoder.model.config.n_positions
        longest = min(bucket(int(length_B.max()), _SMALLEST_BUCKET), positions)
        tokens_BP = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BP[row, : len(prompt)] = prompt
        # The most steps that any row can take after its first token.
        steps = max(
            min(self._limits.max_tokens - int(self._count_B[row]) - 1, positions - len(self._contexts[row]))
            for row, live in enumerate(self._live)
            if live
        )
        slots = longest + (self._chunk * bucket(-(-steps // self._chunk)) if steps > 0 else 0)
        with self._decoder.on_mesh():
            if self._penalizes and history is None:
                history = prompt_history(tokens_BP, length_B, self._vocab_rows, copies)
            return begin(
                self._decoder.weights,
                tokens_BP,
                length_B,
                self._count_B,
                history,
                self._request,
                plan=self._plan,
                slots=slots,
                copies=copies,
            )

    def _advance(self, state: DecodeState) -> tuple[DecodeState, Drawn]:
        with self._decoder.on_mesh():
            return advance(self._decoder.weights, state, self._request, plan=self._plan, steps=self._chunk)

    def _slide(self, state: DecodeState) -> tuple[DecodeState, Drawn]:
        """A new cache: of the last half of the contexts that are full, of the others whole."""
        positions = self._decoder.model.config.n_positions
        for row, live in enumerate(self._live):
            if not live:
                self._contexts[row] = [0]
            elif len(self._contexts[row]) > positions:
                self._contexts[row] = self._contexts[row][-max(1, positions // 2) :]
        return self._begin(self._contexts, 1, state.history)

    def _tokens(self, drawn: Drawn) -> Iterator[Token]:
        drawn = jax.device_get(drawn)
        if drawn.token_B.ndim == 1:  # the token after the prompt
            drawn = jax.tree.map(lambda x: x[None], drawn)
        for step in range(len(drawn.token_B)):
            for row in np.flatnonzero(drawn.live_B[step]):
                if not self._live[row]:
                    continue
                token = int(drawn.token_B[step, row])
                self._contexts[row].append(token)
                self._count_B[row] += 1
                ids, log_probs = drawn.top_ids_BA[step, row].tolist(), drawn.top_log_probs_BA[step, row].tolist()
                yield Token(
                    row=int(row),
                    id=token,
                    log_prob=float(drawn.log_prob_B[step, row]),
                    alternatives=tuple(zip(ids, log_probs, strict=True)),
                    ended=Ended(int(drawn.ended_B[step, row])),
                )


@jax.jit
def _row_keys(seed: jax.Array, prompt_hash_B: jax.Array, sample_B: jax.Array) -> jax.Array:
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold_in(jax.random.key(seed), prompt_hash_B), sample_B)
