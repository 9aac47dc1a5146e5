"""The console script `gpt2-jax`: finds the subcommand, runs it and turns its errors into one line."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from gpt2_jax.cli.guard import guarded
from gpt2_jax.cli.overrides import parse_overrides
from gpt2_jax.errors import UsageError

# Name: (module, what it does). A module is imported only when its command is run; it has
# add_arguments(parser) and run(arguments) -> exit code.
COMMANDS = {
    "prepare": ("gpt2_jax.cli.prepare", "tokenize a corpus into a folder of token shards"),
    "data": ("gpt2_jax.cli.data", "what a run read: the texts of a training batch"),
    "generate": ("gpt2_jax.cli.generate", "write text with a trained model"),
    "export": ("gpt2_jax.cli.export", "write a model in another program's format"),
    "import": ("gpt2_jax.cli.import_model", "read another program's model into a Hugging Face folder"),
    "plan": ("gpt2_jax.cli.plan", "memory, time and cost of a run on hardware that is not here"),
    "prove-resume": ("gpt2_jax.cli.prove_resume", "show that a run of yours, killed at random, loses nothing"),
}
# Commands that take --config.SECTION.KEY=VALUE, which they find in arguments.overrides.
_WITH_OVERRIDES = ("plan", "prove-resume")


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gpt2-jax` with `argv`, or the process's own arguments, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded("gpt2-jax", lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        name = arguments[0]
        module_name, summary = COMMANDS[name]
        module = importlib.import_module(module_name)
        parser = _Parser(prog=f"gpt2-jax {name}", description=summary, allow_abbrev=False)
        module.add_arguments(parser)
        if name not in _WITH_OVERRIDES:
            return module.run(parser.parse_args(arguments[1:]))
        parsed, rest = parser.parse_known_args(arguments[1:])
        parsed.overrides = parse_overrides(rest, sorted(parser._option_string_actions))
        return module.run(parsed)
    parser = _Parser(
        prog="gpt2-jax",
        usage="gpt2-jax COMMAND [--help] ...",
        description="GPT-2 in JAX: commands besides training.",
        epilog="\n".join(["commands:", *(f"  {name:<13} {summary}" for name, (_, summary) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.parse_args(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
