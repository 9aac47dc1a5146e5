"""Flags of `train.py`: config file and overrides -> RunConfig -> `gpt2_jax.run.run`."""

import argparse
import difflib
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from gpt2_jax.cli.compile_cache_flag import add_compile_cache_flag, compile_cache_folder
from gpt2_jax.cli.guard import guarded
from gpt2_jax.cli.quiet_logs import quiet_logs
from gpt2_jax.config_file import describe, load_config
from gpt2_jax.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code: 0 done, 2 config, 3 data or checkpoint, 4 diverged, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(
        "train.py", lambda: _train(arguments), "interrupted; the same command resumes from the last saved step"
    )


def _train(argv: list[str]) -> int:
    flags, overrides = _parse(argv)
    if not flags.config and not flags.print_config:
        raise UsageError("--config=FILE is needed, such as --config=configs/quickstart.py; see --help")
    config = load_config(flags.config, overrides)
    if flags.print_config:
        print(describe(config))
        return 0
    quiet_logs()
    # Only now, when the flags are known to be right: it takes seconds.
    from gpt2_jax.run.run import RunOptions, run

    options = RunOptions(
        workdir=flags.workdir or str(pathlib.Path("runs") / pathlib.Path(flags.config).stem),
        config_flags=(
            f"--config={flags.config}",
            *(f"--config.{key}={value}" for key, value in overrides.items()),
        ),
        tensorboard=flags.tensorboard,
        wandb=flags.wandb,
        profile=_profile_steps(flags.profile),
        compile_cache=compile_cache_folder(flags),
    )
    run(config, options)
    return 0


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = _Parser(
        prog="train.py",
        description="Trains GPT-2, or resumes the run in --workdir.",
        epilog="Any key of the config is overridden by --config.SECTION.KEY=VALUE; --print_config shows them all.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="", metavar="FILE", help="Python file with get_config()")
    parser.add_argument("--workdir", default="", help="run folder (default: runs/NAME of the config file)")
    parser.add_argument("--print_config", action="store_true", help="show the resolved config and exit")
    parser.add_argument("--tensorboard", action="store_true", help="mirror the metrics for TensorBoard")
    parser.add_argument("--wandb", default="", metavar="PROJECT", help="mirror the metrics to Weights & Biases")
    parser.add_argument("--profile", default="", metavar="FIRST:LAST", help="profiler trace of these steps")
    add_compile_cache_flag(parser)
    flags, rest = parser.parse_known_args(argv)
    return flags, _overrides(rest, sorted(parser._option_string_actions))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def _overrides(rest: list[str], known: list[str]) -> dict[str, str]:
    overrides = {}
    words = iter(rest)
    for word in words:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--config."):
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}, --config.SECTION.KEY"
            raise UsageError(f"unknown argument {word!r}; {hint}")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UsageError(f"{flag} has no value: write {flag}=VALUE")
        overrides[flag.removeprefix("--config.")] = value
    return overrides


def _profile_steps(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(f"--profile={text}: give the first and last step, as in --profile=10:12")
    return int(first), int(last)
