"""`gpt2-jax plan`: what a run would need and take, on TPU slices that are not here."""

import argparse
import os
import pathlib
import sys

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.cli.quiet_logs import quiet_logs
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import load_config
from gpt2_jax.errors import UsageError
from gpt2_jax.user_paths import expand_user


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.epilog = "Any key of the config is overridden by --config.SECTION.KEY=VALUE; mesh.* is the mesh."
    parser.add_argument("--config", default="", metavar="FILE", help="Python file with get_config()")
    parser.add_argument(
        "--topology",
        default="",
        metavar="LIST",
        help="such as v5e:4x4,v6e:16x16,v5p:8x8x8 (compiled), h100:8 or cpu (estimated)",
    )
    parser.add_argument("--analytic", action="store_true", help="estimate, and compile nothing (needs no libtpu)")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, microbatches and remat policies; show the best that fit"
    )
    parser.add_argument(
        "--decode", default=0, type=int, metavar="ROWS", help="compile the decode step too, with so many rows per shard"
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write all figures as JSON; - for the screen")
    parser.add_argument("--picture", default="", metavar="FILE.png", help="draw memory and roofline")
    parser.add_argument("--prices", default="", metavar="FILE.toml", help="dollars per chip-hour, instead of ours")
    parser.add_argument("--print_prices", action="store_true", help="show our prices as such a file, and exit")


def run(arguments: argparse.Namespace) -> int:
    """Checks everything first, then compiles one topology after another."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed; an accelerator that is here stays free
    quiet_logs()
    if arguments.print_prices:
        from gpt2_jax.planning.prices import prices_as_toml

        print(prices_as_toml(), end="")
        return 0
    for flag in ("config", "topology"):
        if not getattr(arguments, flag):
            example = {"config": "configs/gpt2_1558m.py", "topology": "v5e:4x4"}[flag]
            raise UsageError(f"--{flag} is needed, such as --{flag}={example}; see --help")
    if arguments.decode < 0:
        raise UsageError(f"--decode={arguments.decode}: give rows per shard, from 1")
    picture = _place(arguments.picture, "--picture", ".png") if arguments.picture else None
    file = _place(arguments.json, "--json") if arguments.json not in ("", "-") else None
    config = load_config(arguments.config, arguments.overrides)
    _plan(config, arguments, file, picture)
    return 0


def _plan(
    config: RunConfig, arguments: argparse.Namespace, file: pathlib.Path | None, picture: pathlib.Path | None
) -> None:
    # Only now, when the flags are known to be right: it takes seconds.
    from gpt2_jax.planning.make_plans import find_machines, make_plans
    from gpt2_jax.planning.picture import draw_plans
    from gpt2_jax.planning.plan import with_known_vocabulary
    from gpt2_jax.planning.prices import read_prices
    from gpt2_jax.planning.report import as_json, as_text

    config = with_known_vocabulary(config)
    prices, source = read_prices(arguments.prices)
    machines = find_machines(arguments.topology, analytic=arguments.analytic)
    plans = make_plans(
        config,
        machines,
        prices,
        analytic=arguments.analytic,
        searches=arguments.search,
        decode_rows=arguments.decode,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = as_json(plans, source)
    if file is not None:
        write_text_atomically(file, text)
    if picture is not None:
        draw_plans(plans, picture)
    print(text if arguments.json == "-" else as_text(plans, source))


def _place(path: str, flag: str, suffix: str = "") -> pathlib.Path:
    """Where a file is to be written, checked before minutes are spent on what goes into it."""
    place = expand_user(path)
    if suffix and place.suffix != suffix:
        raise UsageError(f"{flag}={path}: give a file that ends in {suffix}")
    if not place.parent.is_dir() or place.is_dir():
        raise UsageError(f"{flag}={path}: there is no such folder, or it is one; make {place.parent} first")
    return place
