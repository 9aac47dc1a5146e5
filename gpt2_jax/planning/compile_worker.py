"""The process that compiles for a TPU which is not here: `python -m gpt2_jax.planning.compile_worker REPLY < REQUEST`.

Request and reply are JSON (see compile.py). A process of its own, since libtpu reads its settings once, keeps memory,
and ends the process where it fails.
"""

import json
import pathlib
import re
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import run_config
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.planning.collectives import Total, axes_of, read_collectives, totals
from gpt2_jax.planning.decode_program import lower_decode
from gpt2_jax.planning.topology import devices, parse_topologies
from gpt2_jax.run.fit_memory import lower_train_step
from gpt2_jax.run.step_settings import for_device
from gpt2_jax.sharding import check_divisible, make_mesh

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The two ways in which the compiler says by how much a program does not fit.
_USED_OF = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_ALLOCATION = re.compile(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)")


def main(reply: str) -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    try:
        answer = _answer(request)
    except Gpt2JaxError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    write_text_atomically(pathlib.Path(reply), json.dumps(answer))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    config = run_config(request["config"])
    (topology,) = parse_topologies(request["topology"])
    mesh = make_mesh(config.mesh, devices(topology))
    start = time.perf_counter()
    decodes = request["program"] == "decode"
    lowered = lower_decode(config, mesh, request["rows"]) if decodes else lower_train(config, mesh)
    lower_seconds = time.perf_counter() - start
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        answer = out_of_memory(str(error))
    else:
        answer = {**_memory(compiled.memory_analysis()), "traffic": _traffic(compiled.as_text() or "", mesh)}
    seconds = {"lower_seconds": lower_seconds, "compile_seconds": time.perf_counter() - start}
    return {**answer, **seconds, "mesh": dict(mesh.shape)}


def lower_train(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The real train step over `mesh`, lowered from shapes alone. Raises UsageError where the mesh cannot split it."""
    check_divisible(config, mesh, padded_vocab_size(config.model.vocab_size))
    config, _ = for_device(config, mesh.devices.flat[0])
    return lower_train_step(config, mesh)


def _memory(analysis: Any) -> dict[str, int]:
    return {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "peak": analysis.peak_memory_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


def out_of_memory(message: str) -> dict[str, Any]:
    """The compiler's message as figures; where it gives none, as its first line."""
    if found := _USED_OF.search(message):
        needed, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    elif found := _ALLOCATION.search(message):
        needed, limit = float(found[1]), float(found[2])
    else:
        needed = limit = 0.0
    return {"out_of_memory": message.splitlines()[0], "peak": round(needed), "limit": round(limit)}


def _traffic(hlo_text: str, mesh: Mesh) -> list[dict[str, Any]]:
    collectives = read_collectives(hlo_text)
    by: dict[Any, Total] = totals(collectives, lambda one: (one.kind, "+".join(axes_of(one, mesh)), one.group_size))
    return [
        {
            "kind": kind,
            "axes": axes,
            "group": group,
            "count": total.count,
            "payload": total.payload_bytes,
            "wire": total.wire_bytes,
            "overlapped": total.overlapped,
        }
        for (kind, axes, group), total in by.items()
    ]


if __name__ == "__main__":
    main(sys.argv[1])
