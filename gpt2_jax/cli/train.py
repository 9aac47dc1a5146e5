"""Flags of `train.py`: config file and overrides -> RunConfig -> `gpt2_jax.run.run`."""

import argparse
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gpt2_jax.cli.compile_cache_flag import add_compile_cache_flag, compile_cache_folder
from gpt2_jax.cli.guard import guarded
from gpt2_jax.cli.malloc import add_malloc_flag, keep_memory
from gpt2_jax.cli.overrides import parse_overrides
from gpt2_jax.cli.quiet_logs import quiet_logs
from gpt2_jax.config_file import describe, load_config
from gpt2_jax.errors import UsageError
from gpt2_jax.run.changes import allowed_names

_INTERRUPTED = "interrupted; the same command resumes from the last saved step"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code: 0 done, 2 config, 3 data, 4 diverged, 75 preempted, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded("train.py", lambda: _train(arguments, in_own_process=argv is None), _INTERRUPTED)


def _train(argv: list[str], *, in_own_process: bool) -> int:
    flags, overrides = _parse(argv)
    if not flags.config and not flags.print_config:
        raise UsageError("--config=FILE is needed, such as --config=configs/quickstart.py; see --help")
    config = load_config(flags.config, overrides)
    if flags.print_config:
        print(describe(config))
        return 0
    allow_change = allowed_names(flags.allow_change)
    # Before JAX is there; a program that calls this keeps its allocator.
    malloc = keep_memory(flags.malloc) if in_own_process else "system"
    quiet_logs()
    # Only now, when the flags are known to be right: it takes seconds.
    from gpt2_jax.run.hosts import HostOptions, end_process
    from gpt2_jax.run.rewind import Rewind
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
        watchdog=flags.watchdog,
        checkpoints=flags.checkpoints,
        steal_lock=flags.steal_lock,
        hosts=HostOptions(
            coordinator_address=flags.coordinator_address,
            num_processes=flags.num_processes,
            process_id=flags.process_id,
            initialization_timeout=flags.initialization_timeout,
            heartbeat_timeout=flags.heartbeat_timeout,
            distributed=not flags.no_distributed,
        ),
        allow_change=allow_change,
        malloc=malloc,
        rewind=None if flags.rewind_to is None else Rewind(flags.rewind_to, flags.skip_batches),
    )

    def trained() -> int:
        run(config, options)
        return 0

    code = 1
    try:
        code = guarded("train.py", trained, _INTERRUPTED)
    except Exception:  # a bug, told as Python tells it, but here: the end of the process may be waiting for other hosts
        traceback.print_exc()
    end_process(code)
    return code


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = _Parser(
        prog="train.py",
        description="Trains GPT-2, or resumes the run in --workdir.",
        epilog="Any key of the config is overridden by --config.SECTION.KEY=VALUE; --print_config shows them all.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="", metavar="FILE", help="Python file with get_config()")
    parser.add_argument("--workdir", default="", help="run folder (default: runs/NAME of the config file)")
    parser.add_argument(
        "--steal_lock", action="store_true", help="take the run folder from the job that holds it, dead or alive"
    )
    parser.add_argument("--print_config", action="store_true", help="show the resolved config and exit")
    parser.add_argument("--tensorboard", action="store_true", help="mirror the metrics for TensorBoard")
    parser.add_argument("--wandb", default="", metavar="PROJECT", help="mirror the metrics to Weights & Biases")
    parser.add_argument("--profile", default="", metavar="FIRST:LAST", help="profiler trace of these steps")
    parser.add_argument(
        "--allow_change",
        action="append",
        default=[],
        metavar="KEY[,KEY...]",
        help="resume although these keys of the config, or data, or tokenizer, have changed; recorded in run.json",
    )
    parser.add_argument(
        "--rewind_to", type=_at_least(0), metavar="STEP", help="go back to this saved step, once; recorded in run.json"
    )
    parser.add_argument(
        "--skip_batches", type=_at_least(1), metavar="N", help="and leave out the N batches that came next"
    )
    add_compile_cache_flag(parser)
    add_malloc_flag(parser)
    _add_host_flags(parser)
    flags, rest = parser.parse_known_args(argv)
    _check_host_flags(flags)
    if (flags.rewind_to is None) != (flags.skip_batches is None):
        raise UsageError("--rewind_to=STEP and --skip_batches=N go together: give both, or none")
    return flags, parse_overrides(rest, sorted(parser._option_string_actions))


def _add_host_flags(parser: argparse.ArgumentParser) -> None:
    hosts = parser.add_argument_group("several hosts", "detected on TPU, SLURM, Kubernetes and MPI")
    hosts.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="where process 0 listens; with the next two, for all"
    )
    hosts.add_argument("--num_processes", type=_at_least(1), metavar="N", help="processes in all")
    hosts.add_argument("--process_id", type=_at_least(0), metavar="I", help="number of this one, from 0")
    seconds: dict[str, Any] = {"type": _at_least(1), "metavar": "SECONDS"}
    hosts.add_argument(
        "--initialization_timeout", default=300, help="for all to come (default: %(default)s)", **seconds
    )
    hosts.add_argument(
        "--heartbeat_timeout",
        default=100,
        help="until a silent one counts as dead (default: %(default)s)",
        **seconds,
    )
    hosts.add_argument(
        "--watchdog",
        type=_at_least(0),
        default=600,
        metavar="SECONDS",
        help="end the process, and show the stacks of its threads, when a step takes longer, or when a compile, an "
        "evaluation, a save or a sample takes ten times as long; 0: never (default: %(default)s)",
    )
    hosts.add_argument("--no_distributed", action="store_true", help="this process alone, without a coordinator")
    hosts.add_argument(
        "--checkpoints",
        default="",
        metavar="DIR",
        help="where all hosts see the checkpoints; only host 0 needs --workdir then",
    )


def _at_least(low: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: give an integer from {low}")
        return int(text)

    return integer


def _check_host_flags(flags: argparse.Namespace) -> None:
    triple = {name: getattr(flags, name) for name in ("coordinator_address", "num_processes", "process_id")}
    missing = [f"--{name}" for name, value in triple.items() if value is None]
    if missing and len(missing) < len(triple):
        raise UsageError(f"{', '.join(missing)} missing: give all of --{', --'.join(triple)}, or none of them")
    if not missing and flags.no_distributed:
        raise UsageError(f"--no_distributed is for a process alone; leave it out, or --{', --'.join(triple)}")
    if not missing and flags.process_id >= flags.num_processes:
        raise UsageError(
            f"--process_id={flags.process_id}: with --num_processes={flags.num_processes}, allowed are 0 to "
            f"{flags.num_processes - 1}"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def _profile_steps(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(f"--profile={text}: give the first and last step, as in --profile=10:12")
    return int(first), int(last)


if __name__ == "__main__":
    sys.exit(main())
