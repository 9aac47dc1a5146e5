"""Leaves the screen to a command's own lines."""

import importlib.util
import logging
import os
import sys
import warnings


def quiet_logs() -> None:
    """To be called before JAX is imported: silences what the libraries log besides what they raise."""
    # What Orbax and Grain log as errors they also raise.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # XLA on CPU reports every program that comes from the compile cache as an error, since it takes its own tuning
    # hints for processor features that are missing. Where only the CPU is there, its log is silenced.
    if not any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu")):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # When one file of a checkpoint fails (a full disk, damage), Orbax leaves the work on the others to an event loop
    # that it has closed, and each complains from a thread of its own. The failure itself is raised and told.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook
    sys.unraisablehook = lambda lost: report(lost) if str(lost.exc_value) != "Event loop is closed" else None
