"""What `gpt2-jax generate` prints: texts as they come, JSON lines, scores, a conversation."""

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from gpt2_jax.cli.prompts import Prompt
from gpt2_jax.decoding.generate import Completion, Generator
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.tokenizer import Tokenizer


def print_texts(generator: Generator, prompts: Sequence[Prompt], asked: dict[str, Any], *, json_lines: bool) -> None:
    """Generates and prints; one text alone is streamed, several are printed in order, each when it is complete.

    Args:
      generator: the model.
      prompts: what to continue.
      asked: the keyword arguments of `Generator.stream`.
      json_lines: one JSON object per text instead.
    """
    pieces = generator.stream([_content(prompt) for prompt in prompts], **asked)
    for prompt in prompts:
        if not (prompt.text or prompt.ids):
            _note("the prompt is empty: the text starts from end-of-text")
    alone = len(prompts) == asked["num_samples"] == 1 and not json_lines
    if alone:
        _put(_shown(prompts[0], generator.tokenizer))
    waiting: dict[tuple[int, int], Completion] = {}
    order = iter([(prompt, sample) for prompt in range(len(prompts)) for sample in range(asked["num_samples"])])
    following = next(order)
    for piece in pieces:
        if alone:
            _put(piece.text)
        if piece.completion is None:
            continue
        waiting[piece.prompt, piece.sample] = piece.completion
        while following in waiting:
            completion = waiting.pop(following)
            prompt = prompts[completion.prompt]
            if json_lines:
                _put(json.dumps(_json(completion, prompt, generator.tokenizer), ensure_ascii=False) + "\n")
            elif alone:
                _put("\n")
            else:
                head = f"--- prompt {completion.prompt + 1}, sample {completion.sample + 1}"
                _put(f"{head}\n{_shown(prompt, generator.tokenizer)}{completion.text}\n")
            if completion.finish_reason == "context":
                _note(
                    f"prompt {completion.prompt + 1}: the text ended after {len(completion.ids)} tokens, since the "
                    f"context of {generator.context_length} is full; --beyond_context=slide goes on"
                )
            following = next(order, (-1, -1))


def print_scores(generator: Generator, prompts: Sequence[Prompt], *, json_lines: bool) -> None:
    """Prints how likely the prompts are."""
    texts = [generator.text_ids(_content(prompt)) for prompt in prompts]  # all are refused, or none
    for number, (prompt, ids) in enumerate(zip(prompts, texts, strict=True)):
        score = generator.score(ids)
        if json_lines:
            line = {
                "prompt_number": number,
                "prompt": _shown(prompt, generator.tokenizer),
                "ids": score.ids,
                "log_probs": score.log_probs,
                "is_greedy": score.is_greedy,
                "log_likelihood": score.total,
            }
            _put(json.dumps(line, ensure_ascii=False) + "\n")
        else:
            _put(f"prompt {number + 1}: log-likelihood {score.total:.4f} nats over {len(score.ids)} tokens\n")


def converse(generator: Generator, asked: dict[str, Any], *, json_lines: bool) -> None:
    """Reads a prompt per line and answers it, until the input ends; Ctrl-C ends an answer, or a wait for a prompt."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401 (gives input() its line editing)
    while True:
        try:
            prompt = input("> " if on_terminal else "")
        except (EOFError, KeyboardInterrupt):
            if on_terminal:
                _put("\n")
            return
        try:
            print_texts(generator, [Prompt(prompt)], asked, json_lines=json_lines)
        except KeyboardInterrupt:
            _put("\n")
        except Gpt2JaxError as error:
            _note(f"error: {error}")


def _json(completion: Completion, prompt: Prompt, tokenizer: Tokenizer) -> dict[str, Any]:
    alternatives = [
        [[token, log_prob, tokenizer.decode([token])] for token, log_prob in place] for place in completion.alternatives
    ]
    return {
        "prompt_number": completion.prompt,
        "sample": completion.sample,
        "prompt": _shown(prompt, tokenizer),
        "prompt_ids": completion.prompt_ids,
        "text": completion.text,
        "ids": completion.ids,
        "log_probs": completion.log_probs,
        "alternatives": alternatives,
        "finish_reason": completion.finish_reason,
        "stopped_by": completion.stopped_by,
    }


def _content(prompt: Prompt) -> str | tuple[int, ...]:
    return prompt.ids if prompt.text is None else prompt.text


def _shown(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text


def _put(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    print(f"gpt2-jax: {text}", file=sys.stderr)
