"""The compiler settings that matter, set in one place, and what the user has set, which always wins.

Few, because few change anything here. For TPUs nothing is set: the flags that are handed on for them (async collective
fusion, compute that overlaps collectives, async all-gathers, the all-reduces of data parallelism over slices) are what
libtpu does by default now; `tests/run/test_xla_flags.py` compiles with them and without. One GPU has no collectives to
hide, and XLA's defaults are the fastest known on it.
"""

import os
from collections.abc import Sequence

import jax

# What steers the compiler or the runtime from outside.
_VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_OPTIMIZATION_LEVEL",
    "JAX_ENABLE_PGLE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_DEVICE_MAX_CONNECTIONS",  # 1 helps Hopper and is advised against on Blackwell, so it is not set here
)


def set_compiler_flags(devices: Sequence[jax.Device]) -> list[str]:
    """Sets what suits these devices, before anything is compiled; returns `NAME=value (why)` lines for the log.

    Several GPUs get JAX's optimization level O1: collectives are started early and finished late, so that they overlap
    with compute (latency-hiding scheduler, pipelined collectives). A level of the user's, or a word of theirs on that
    scheduler in XLA_FLAGS, is left alone.
    """
    lines = [f"{name}={os.environ[name]} (from the environment)" for name in _VARIABLES if os.environ.get(name)]
    several_gpus = len(devices) > 1 and devices[0].platform == "gpu"
    undecided = jax.config.values["jax_optimization_level"] == "UNKNOWN"
    if several_gpus and undecided and "latency_hiding_scheduler" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_optimization_level", "O1")
        lines.append("jax_optimization_level=O1 (collectives overlap with compute)")
    return lines
