"""A tiny run whose batches are noted as they go to the devices, before anything is computed with them."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tiny_run import Finished, Workshop, finish

_RECORDING = """
import json, sys
from gpt2_jax.cli.train import main
from gpt2_jax.run import loop

notes, place = open(sys.argv[1], "w"), loop.place_batch


def placed(batch, mesh):
    notes.write(json.dumps({name: array.tolist() for name, array in batch.items()}) + "\\n")
    notes.flush()
    return place(batch, mesh)


loop.place_batch = placed
sys.exit(main(sys.argv[2:]))
"""

RecordedBatch = dict[str, list[list[Any]]]


def recorded_run(
    tiny: Workshop, folder: pathlib.Path, settings: Mapping[str, Any]
) -> tuple[list[RecordedBatch], Finished]:
    """Trains in `folder`; the tokens, targets and weights of step 1, 2, ..., and what the command said."""
    notes = folder.with_name(f"{folder.name}.batches.jsonl")
    command = [sys.executable, "-c", _RECORDING, str(notes), *tiny.arguments(folder, settings)]
    done = finish(
        subprocess.Popen(command, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    )
    assert done.code == 0, done.err
    return [json.loads(line) for line in notes.read_text().splitlines()], done
