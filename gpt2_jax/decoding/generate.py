"""Text in, text out.

config, params, tokenizer = gpt2_jax.load("runs/quickstart")
generator = gpt2_jax.Generator(config.model, params, tokenizer)
print(generator.generate(["import os"], sampling=gpt2_jax.Sampling(temperature=0.8))[0].text)
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from gpt2_jax.config import ModelConfig
from gpt2_jax.decoding.batch import Batch, Limits, Token
from gpt2_jax.decoding.decoder import Ended
from gpt2_jax.decoding.layout import make_decoder
from gpt2_jax.decoding.score import Score, score
from gpt2_jax.decoding.settings import Sampling, Stopping
from gpt2_jax.decoding.text_stream import TextStream
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import Params
from gpt2_jax.tokenizer import Tokenizer

_PLAIN = Sampling()
_DEFAULT_STOPPING = Stopping()


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated text.

    Attributes:
      prompt: number of its prompt, from 0.
      sample: number of the text among those of its prompt, from 0.
      prompt_ids: what the model read first.
      text: what it wrote, without what stopped it.
      ids: the tokens that were drawn, a last one that stopped it included.
      log_probs: of each of them, in nats: the model's own, before temperature, filters and penalties.
      alternatives: at the place of each, the most likely (id, log-probability), best first; as many as were asked for.
      finish_reason: "end_of_text", "stop_id", "stop_string", "length" (max_new_tokens) or "context" (the model has no
        more positions).
      stopped_by: the stop id or stop string, where one of them is the reason.
    """

    prompt: int
    sample: int
    prompt_ids: tuple[int, ...]
    text: str
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: str
    stopped_by: int | str | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token adds to a text.

    Attributes:
      prompt: number of the prompt.
      sample: number of the text among those of its prompt.
      token: the token.
      text: text that is certain now; empty while a character or a stop string may still be incomplete.
      completion: with the last token of a text, all of it.
    """

    prompt: int
    sample: int
    token: Token
    text: str
    completion: Completion | None


class Generator:
    """A model that writes. Compiled programs are kept between calls and shared by prompts of similar length."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh | None = None,
        dtype: str = "",
        batch_size: int = 8,
        chunk: int = 16,
    ) -> None:
        """Brings the parameters into the layout of decoding.

        Args:
          config: the model's.
          params: its parameters. They may be dropped afterwards, but not donated: the token table is not copied.
          tokenizer: its tokenizer.
          mesh: devices; default: the one that holds the parameters.
          dtype: float32, bfloat16 or float16; default: float32 on a CPU, elsewhere `config.dtype`.
          batch_size: texts that are written at a time.
          chunk: tokens per text and call of the compiled loop; a stream comes in pieces of so many.
        """
        for name, value in {"batch_size": batch_size, "chunk": chunk}.items():
            if value < 1:
                raise UsageError(f"{name}={value}; allowed: integers from 1")
        self.tokenizer = tokenizer
        self._decoder = make_decoder(config, params, tokenizer.vocab_size, mesh=mesh, dtype=dtype)
        self._batch_size, self._chunk = batch_size, chunk

    @property
    def context_length(self) -> int:
        """Positions of the model: the longest prompt, in tokens."""
        return self._decoder.model.config.n_positions

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids that the model reads for a prompt, which is text or already ids; for an empty one end-of-text.

        Raises UsageError for an empty prompt where the tokenizer has no end-of-text, one that is longer than the
        context, and ids outside the vocabulary; DataError for text that the tokenizer cannot encode.
        """
        ids = self._ids(prompt, "prompt")
        if not ids:
            if self.tokenizer.end_of_text is None:
                raise UsageError(
                    f"the prompt is empty, and the tokenizer {self.tokenizer.name} has no end-of-text to start from; "
                    "give at least one character"
                )
            return [self.tokenizer.end_of_text]
        self._check_length("prompt", len(ids), self.context_length)
        return ids

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        sampling: Sampling = _PLAIN,
        stopping: Stopping = _DEFAULT_STOPPING,
        num_samples: int = 1,
        seed: int = 0,
        alternatives: int = 0,
    ) -> list[Completion]:
        """`num_samples` texts per prompt, in the order of the prompts. Arguments and errors are those of `stream`."""
        found: dict[tuple[int, int], Completion] = {}
        for piece in self.stream(
            prompts,
            sampling=sampling,
            stopping=stopping,
            num_samples=num_samples,
            seed=seed,
            alternatives=alternatives,
        ):
            if piece.completion is not None:
                found[piece.prompt, piece.sample] = piece.completion
        return [found[key] for key in sorted(found)]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        sampling: Sampling = _PLAIN,
        stopping: Stopping = _DEFAULT_STOPPING,
        num_samples: int = 1,
        seed: int = 0,
        alternatives: int = 0,
    ) -> Iterator[Piece]:
        """The texts token by token, as they are drawn; texts of a batch take turns.

        Args:
          prompts: texts, or sequences of ids; see `prompt_ids`.
          sampling: how tokens are drawn.
          stopping: when a text ends.
          num_samples: texts per prompt.
          seed: a text depends on it, its prompt and the number of the sample, not on the other prompts.
          alternatives: most likely tokens told with each token.

        Raises:
          UsageError: before anything is drawn, for a prompt or setting that cannot be used.
        """
        if num_samples < 1:
            raise UsageError(f"num_samples={num_samples}; allowed: integers from 1")
        if not 0 <= alternatives <= self._decoder.vocab_size:
            raise UsageError(f"alternatives={alternatives}; allowed: 0 to {self._decoder.vocab_size}, the vocabulary")
        if not 0 <= seed < 2**31:
            raise UsageError(f"seed={seed}; allowed: 0 to {2**31 - 1}")
        self._check_ids(stopping.ids, "stop id")
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        sampling.values(self._decoder.vocab_size, self._decoder.vocab_size)  # refuses what does not fit the vocabulary
        return self._stream(ids, sampling, stopping, num_samples, seed, alternatives)

    def text_ids(self, text: str | Sequence[int]) -> list[int]:
        """The ids of a text, or ids, to be scored. Raises like `prompt_ids`, but for an empty text."""
        ids = self._ids(text, "text")
        # The last token is scored and not read.
        self._check_length("text", len(ids), self.context_length + (self.tokenizer.end_of_text is None))
        return ids

    def score(self, text: str | Sequence[int]) -> Score:
        """Log-likelihoods of a text, each token given those before it; raises like `text_ids`.

        The first token is given end-of-text; without one it is not scored.
        """
        start, ids = self.tokenizer.end_of_text, self.text_ids(text)
        return score(self._decoder, ids if start is None else [start, *ids])

    def _ids(self, text: str | Sequence[int], what: str) -> list[int]:
        ids = (self.tokenizer.encode(text) if isinstance(text, str) else np.asarray(text)).tolist()
        self._check_ids(ids, f"{what} id")
        return ids

    def _check_length(self, what: str, length: int, longest: int) -> None:
        if length > longest:
            raise UsageError(f"the {what} has {length} tokens; allowed: {longest}, by the model's context; shorten it")

    def _check_ids(self, ids: Iterable[int], what: str) -> None:
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self._decoder.vocab_size:
                raise UsageError(
                    f"{what} {token} is outside the vocabulary; allowed: 0 to {self._decoder.vocab_size - 1}"
                )

    def _stream(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        stopping: Stopping,
        num_samples: int,
        seed: int,
        alternatives: int,
    ) -> Iterator[Piece]:
        end_of_text = self.tokenizer.end_of_text if stopping.end_of_text else None
        stop_ids = stopping.ids if end_of_text is None else (*stopping.ids, end_of_text)
        limits = Limits(stopping.max_new_tokens, stop_ids, slide=stopping.beyond_context == "slide")
        for numbers, samples in self._batches(len(prompts), num_samples):
            batch = Batch(
                self._decoder,
                [prompts[number] for number in numbers],
                sampling=sampling,
                limits=limits,
                samples=samples,
                seed=seed,
                alternatives=alternatives,
                chunk=self._chunk,
            )
            texts = [
                _Text(number, sample, prompts[number], TextStream(self.tokenizer, stopping.strings), end_of_text)
                for number in numbers
                for sample in samples
            ]
            for token in batch:
                piece = texts[token.row].add(token)
                if piece.completion is not None:
                    batch.end(token.row)
                yield piece

    def _batches(self, num_prompts: int, num_samples: int) -> Iterator[tuple[range, range]]:
        """Numbers of prompts and samples that are decoded together, at most `batch_size` texts."""
        if num_samples <= self._batch_size:
            size = self._batch_size // num_samples
            for first in range(0, num_prompts, size):
                yield range(first, min(first + size, num_prompts)), range(num_samples)
            return
        for prompt in range(num_prompts):
            for first in range(0, num_samples, self._batch_size):
                yield range(prompt, prompt + 1), range(first, min(first + self._batch_size, num_samples))


class _Text:
    """A text that is being written."""

    def __init__(
        self, prompt: int, sample: int, prompt_ids: list[int], stream: TextStream, end_of_text: int | None
    ) -> None:
        self._prompt, self._sample, self._prompt_ids = prompt, sample, tuple(prompt_ids)
        self._stream, self._end_of_text = stream, end_of_text
        self._tokens: list[Token] = []

    def add(self, token: Token) -> Piece:
        self._tokens.append(token)
        text = "" if token.ended == Ended.STOP_ID else self._stream.push(token.id)
        reason, stopped_by = self._ending(token)
        if reason and reason != "stop_string":
            text += self._stream.finish()
        completion = None
        if reason:
            completion = Completion(
                prompt=self._prompt,
                sample=self._sample,
                prompt_ids=self._prompt_ids,
                text=self._stream.text,
                ids=tuple(token.id for token in self._tokens),
                log_probs=tuple(token.log_prob for token in self._tokens),
                alternatives=tuple(token.alternatives for token in self._tokens),
                finish_reason=reason,
                stopped_by=stopped_by,
            )
        return Piece(self._prompt, self._sample, token, text, completion)

    def _ending(self, token: Token) -> tuple[str, int | str | None]:
        if self._stream.stopped_by is not None:
            return "stop_string", self._stream.stopped_by
        if token.ended == Ended.STOP_ID:
            return ("end_of_text", None) if token.id == self._end_of_text else ("stop_id", token.id)
        return {Ended.LENGTH: "length", Ended.CONTEXT: "context"}.get(token.ended, ""), None
