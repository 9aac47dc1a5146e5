"""The flag `--compile_cache` of the commands that compile."""

import argparse
import os

from gpt2_jax.user_paths import cache_folder


def add_compile_cache_flag(parser: argparse._ActionsContainer) -> None:
    """Adds the flag."""
    parser.add_argument(
        "--compile_cache",
        default=os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder("xla")),
        metavar="DIR",
        help="folder of compiled programs, or off (default: %(default)s)",
    )


def compile_cache_folder(flags: argparse.Namespace) -> str:
    """The folder that was asked for; empty for none."""
    return "" if flags.compile_cache == "off" else flags.compile_cache
