"""Compiles the real programs for a topology, each in a process of its own (compile_worker.py)."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any

from gpt2_jax.config import RunConfig
from gpt2_jax.errors import Gpt2JaxError, UsageError
from gpt2_jax.planning.topology import require_libtpu
from gpt2_jax.planning.traffic import Traffic

WORKER = ("-m", "gpt2_jax.planning.compile_worker")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of a program.

    Attributes:
      program: train or decode.
      mesh: devices along each axis.
      lower_seconds: from Python to the compiler's input.
      compile_seconds: the compiler's own time.
      peak: bytes on one device: the compiler's `peak_memory`; of a program that does not fit, what it would need at
        least (the compiler gives up at the first array that is too large).
      temporaries: the compiler's `temp_size`.
      arguments: the compiler's `argument_size`: state and batch, with the padding of their layout.
      code: bytes of the program.
      out_of_memory: the compiler's message if the program does not fit; empty if it does.
      limit: bytes that a program may have, where the compiler says it; else 0.
      traffic: its collectives.
    """

    program: str
    mesh: dict[str, int]
    lower_seconds: float
    compile_seconds: float
    peak: int
    temporaries: int = 0
    arguments: int = 0
    code: int = 0
    out_of_memory: str = ""
    limit: int = 0
    traffic: list[Traffic] = dataclasses.field(default_factory=list)


def compile_program(config: RunConfig, topology: str, program: str = "train", rows: int = 1) -> Compiled:
    """Compiles `program` of a config, whose vocabulary is filled in, for "v5e:4x4" and the like.

    Args:
      config: of the run.
      topology: where.
      program: train or decode.
      rows: of decode, per part of the batch.

    Raises:
      UsageError: libtpu is missing, the compiler does not know the topology, or mesh and config do not fit it.
      Gpt2JaxError: the compiler failed.
    """
    require_libtpu()
    request = {"config": dataclasses.asdict(config), "topology": topology, "program": program, "rows": rows}
    reply = _ask(request)
    if "error" in reply:
        raise (UsageError if reply["exit_code"] == UsageError.exit_code else Gpt2JaxError)(reply["error"])
    traffic = [Traffic(**item) for item in reply.pop("traffic", [])]
    return Compiled(program=program, traffic=traffic, **reply)


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        reply = pathlib.Path(folder) / "reply.json"
        command = [sys.executable, *WORKER, str(reply)]
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, env=_environment(), check=False
        )
        if reply.is_file():
            return json.loads(reply.read_text("utf-8"))
    said = [line for line in done.stderr.splitlines() if line.strip()]
    ended = f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"code {done.returncode}"
    last = f": {said[-1].strip()[:300]}" if said else ""
    raise Gpt2JaxError(f"the compiler for {request['topology']} ended with {ended}{last}")


def _environment() -> dict[str, str]:
    """JAX itself on the CPU, and this package in the path, wherever it is."""
    package = str(pathlib.Path(__file__).resolve().parents[2])
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
