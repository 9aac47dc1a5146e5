"""Memory that XLA on CPU takes for each step and gives back, kept by the C library instead of by no one.

Linux would clear it anew each time, page by page, which is up to a third of a step. glibc reads its settings when a
program starts, so a command starts itself once more.
"""

import argparse
import importlib.util
import os
import platform
import sys

VARIABLE, _STARTED = "GLIBC_TUNABLES", "GPT2_JAX_STARTED_ONCE_MORE"
# Freed memory stays in the one heap, in pages of 2 MiB where Linux grants them to those who ask (hugetlb=1).
KEEP = ":".join(
    [
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.arena_max=1",  # XLA allocates in threads, whose own heaps end at 64 MiB
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=1099511627776",
    ]
)


def add_malloc_flag(parser: argparse.ArgumentParser) -> None:
    """`--malloc`."""
    parser.add_argument(
        "--malloc",
        choices=("auto", "keep", "system"),
        default="auto",
        help="keep: freed memory is kept for the next step, in large pages (Linux): on a CPU faster, for more memory; "
        "auto: where there is only a CPU (default: %(default)s)",
    )


def keep_memory(wanted: str) -> str:
    """Starts the process anew with other settings of its allocator where `wanted`, the flag, says so.

    Call it before JAX is imported, in a command of its own, never in a program that imports this package.

    Returns:
      A line for the log, once all is as it should be.
    """
    if wanted == "system" or (wanted == "auto" and _may_have_accelerators()):
        return "system"
    if platform.libc_ver()[0] != "glibc":
        return "system (only glibc can be told to keep memory)"
    found, again = os.environ.get(VARIABLE, ""), os.environ.pop(_STARTED, "") == str(os.getpid())
    if found == KEEP:
        del os.environ[VARIABLE]  # what this process starts has small tasks
        return "keeps freed memory, in large pages; --malloc=system takes less memory and more time"
    if found:
        return f"{VARIABLE}={found} (from the environment)"
    if again:
        return f"system ({VARIABLE} is taken away from programs here)"
    os.environ |= {VARIABLE: KEEP, _STARTED: str(os.getpid())}  # it keeps its number
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        del os.environ[VARIABLE], os.environ[_STARTED]
        return f"system (Python cannot start itself once more: {error})"


def _may_have_accelerators() -> bool:
    """Whether JAX is installed for more than CPUs, and may use it."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return False
    return any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu"))
