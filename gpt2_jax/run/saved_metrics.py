"""The held-out losses that Orbax keeps beside the saved steps, made to agree with the seals.

Orbax reads them all when it opens a folder, and one that is damaged would stop a run whose arrays are whole.
"""

import json
import math
import sys

from etils import epath

from gpt2_jax.errors import DamagedError
from gpt2_jax.run.seal import read_seal

METRIC = "held_out_loss"


def mend_metrics(folder: epath.Path) -> None:
    """Rewrites what is not as the seal of its step says. A damaged seal leaves a readable loss, else the worst one."""
    for step in folder.iterdir() if folder.is_dir() else ():
        file = step / "metrics" / "metrics"
        if not step.name.isdecimal() or not file.exists():
            continue
        found = _read(file)
        try:
            expected = read_seal(step / "seal").held_out_loss
        except DamagedError:
            expected = math.inf if found is None else found
        if expected is not None and found != expected:
            file.write_text(json.dumps({METRIC: expected}))  # where it is cut short, it is mended anew
            print(f"warning: {file} was damaged; mended: {METRIC} {expected}", file=sys.stderr)


def _read(file: epath.Path) -> float | None:
    try:
        loss = json.loads(file.read_bytes().decode("utf-8"))[METRIC]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return loss if isinstance(loss, float) else None
