"""`gpt2-jax generate`: text from a trained model."""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

from gpt2_jax.cli.compile_cache_flag import add_compile_cache_flag, compile_cache_folder
from gpt2_jax.cli.prompts import Prompt, parse_ids, read_prompts, utf8
from gpt2_jax.cli.quiet_logs import quiet_logs
from gpt2_jax.config import MeshConfig
from gpt2_jax.decoding.settings import BEYOND_CONTEXT, Sampling, Stopping
from gpt2_jax.errors import UsageError
from gpt2_jax.run.run_folder import folder_to_read

# Of the fields of `Sampling` that are numbers.
_SAMPLING_HELP = {
    "temperature": "divides the logits; 0 takes the most likely token",
    "top_k": "only the N most likely tokens; 0: all",
    "top_p": "only the most likely tokens that together reach this probability",
    "min_p": "only tokens at least this fraction as likely as the most likely",
    "repetition_penalty": "above 1: tokens of prompt and text become less likely (CTRL)",
    "presence_penalty": "subtracted from the logits of tokens that the text has",
    "frequency_penalty": "subtracted once per occurrence in the text",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, metavar="DIR", help="run folder, or Hugging Face GPT-2 folder")
    parser.add_argument("--step", type=int, metavar="N", help="saved step of a run (default: the best one)")
    prompts = parser.add_argument_group("prompts, one of")
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    prompts.add_argument("--prompts", metavar="FILE", help="file with a prompt per line; - for standard input")
    prompts.add_argument("--prompt_ids", action="append", metavar="ID,ID,...", help="a prompt as token ids")
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts until end of input")
    drawing = parser.add_argument_group("how tokens are drawn")
    for field in dataclasses.fields(Sampling):
        if field.name in _SAMPLING_HELP:
            drawing.add_argument(
                f"--{field.name}",
                type=type(field.default),
                default=field.default,
                metavar="N" if field.name == "top_k" else "X",
                help=f"{_SAMPLING_HELP[field.name]} (%(default)s)",
            )
    drawing.add_argument(
        "--logit_bias", action="append", default=[], metavar="ID=X", help="added to a logit; -inf bans; may be repeated"
    )
    drawing.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (%(default)s)")
    drawing.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts per prompt (%(default)s)")
    ending = parser.add_argument_group("when a text ends")
    ending.add_argument(
        "--max_new_tokens", type=int, default=Stopping.max_new_tokens, metavar="N", help="tokens per text (%(default)s)"
    )
    ending.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a string, as it is (a newline: $'\\n'); repeatable"
    )
    ending.add_argument("--stop_id", action="append", type=int, default=[], metavar="ID", help="a token; repeatable")
    ending.add_argument("--ignore_end_of_text", action="store_true", help="write on after end-of-text")
    ending.add_argument(
        "--beyond_context",
        default=Stopping.beyond_context,
        metavar="|".join(BEYOND_CONTEXT),
        help="when all positions are used: stop, or go on from the last half of them (%(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object per line and text")
    output.add_argument(
        "--alternatives", type=int, default=0, metavar="N", help="most likely tokens per place, in JSON"
    )
    output.add_argument("--score", action="store_true", help="how likely the prompts are, instead of new text")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--dtype",
        default="",
        metavar="TYPE",
        help="float32, bfloat16, float16 (default: float32 on CPU, else the run's)",
    )
    machine.add_argument("--data", type=int, metavar="N", help="devices that split the texts")
    machine.add_argument("--tensor", type=int, metavar="N", help="devices that split heads, MLP and vocabulary")
    machine.add_argument("--batch_size", type=int, default=8, metavar="N", help="texts at a time (%(default)s)")
    machine.add_argument(
        "--chunk", type=int, default=16, metavar="N", help="tokens per call of the compiled loop (%(default)s)"
    )
    add_compile_cache_flag(machine)


def run(arguments: argparse.Namespace) -> int:
    """Write texts, or scores, to stdout and notes to stderr."""
    sampling, stopping = _settings(arguments)
    prompts = _prompts(arguments)
    folder = folder_to_read(arguments.model)
    if not folder.is_dir():
        raise UsageError(f"--model={arguments.model}: no such folder; name a run folder or a Hugging Face GPT-2 folder")
    for stream in (sys.stdout, sys.stderr):
        # Whatever the locale: text is UTF-8.
        stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    quiet_logs()
    # Only now, when the flags are known to be right: it takes seconds.
    from gpt2_jax.cli import texts

    generator = _generator(arguments, folder)
    asked = {
        "sampling": sampling,
        "stopping": stopping,
        "num_samples": arguments.num_samples,
        "seed": arguments.seed,
        "alternatives": arguments.alternatives,
    }
    if arguments.interactive:
        texts.converse(generator, asked, json_lines=arguments.json)
    elif arguments.score:
        texts.print_scores(generator, prompts, json_lines=arguments.json)
    else:
        texts.print_texts(generator, prompts, asked, json_lines=arguments.json)
    return 0


def _settings(arguments: argparse.Namespace) -> tuple[Sampling, Stopping]:
    numbers = {name: getattr(arguments, name) for name in _SAMPLING_HELP}
    sampling = Sampling(**numbers, logit_bias=_logit_bias(arguments.logit_bias))
    stopping = Stopping(
        max_new_tokens=arguments.max_new_tokens,
        end_of_text=not arguments.ignore_end_of_text,
        ids=tuple(arguments.stop_id),
        strings=tuple(utf8("--stop", text) for text in arguments.stop),
        beyond_context=arguments.beyond_context,
    )
    return sampling, stopping


def _logit_bias(given: list[str]) -> dict[int, float]:
    biases = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise UsageError(f"--logit_bias={text}; allowed: ID=NUMBER, such as 50256=-inf") from None
    return biases


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    kinds = {
        "--prompt": arguments.prompt,
        "--prompts": arguments.prompts,
        "--prompt_ids": arguments.prompt_ids,
        "--interactive": arguments.interactive or None,
    }
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) != 1:
        said = " and ".join(given) or "none of them"
        raise UsageError(f"{said} given; allowed: one of {', '.join(kinds)}")
    if arguments.interactive and arguments.score:
        raise UsageError("--interactive and --score given; --score wants --prompt, --prompts or --prompt_ids")
    if arguments.prompt is not None:
        return [Prompt(utf8("--prompt", text)) for text in arguments.prompt]
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    return [Prompt(None, parse_ids(text)) for text in arguments.prompt_ids or []]


def _generator(arguments: argparse.Namespace, folder: pathlib.Path) -> Any:
    import jax

    from gpt2_jax.decoding.generate import Generator
    from gpt2_jax.decoding.layout import decoding_mesh
    from gpt2_jax.run.compile_cache import set_compile_cache
    from gpt2_jax.run.load import load

    set_compile_cache(compile_cache_folder(arguments))
    mesh = None
    if arguments.data is not None or arguments.tensor is not None:
        data, tensor = arguments.data or 1, arguments.tensor or 1
        mesh = decoding_mesh(MeshConfig(data=data, tensor=tensor), jax.devices())
    config, params, tokenizer = load(folder, arguments.step)
    return Generator(
        config.model,
        params,
        tokenizer,
        mesh=mesh,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        chunk=arguments.chunk,
    )
