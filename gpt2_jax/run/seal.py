"""The seal of a saved step: what it was made with and the checksum of each array, in a file with a hash of its own.

The checksums are summed up on the devices while training goes on; the file is written in the background, before Orbax
gives the step its name.
"""

import dataclasses
import hashlib
import json
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from gpt2_jax.errors import DamagedError
from gpt2_jax.fault_points import reach
from gpt2_jax.run.checksums import named

_FILE = "seal.json"


@dataclasses.dataclass(frozen=True)
class Seal:
    """What is in the file: facts about the run, the held-out loss if measured, checksums by the arrays' names."""

    meta: dict[str, Any]
    held_out_loss: float | None
    checksums: dict[str, str]


class SealHandler(ocp.AsyncCheckpointHandler):
    """Lets Orbax write the seal as an item of a step."""

    async def async_save(self, directory: epath.Path, args: "SealSave") -> list[ocp.future.Future]:
        """Returns what will have written the file."""
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(directory, args), name="seal")]

    async def _write(self, directory: epath.Path, args: "SealSave") -> None:
        seal = Seal(args.meta, args.held_out_loss, named(args.checksums))
        if ocp.utils.is_primary_host(0):
            reach("save.seal")
            (directory / _FILE).write_text(_encoded(seal))
            reach("save.sealed")

    def save(self, directory: epath.Path, args: "SealSave") -> None:
        """Not used: steps are saved in the background."""
        raise NotImplementedError

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        """Not used: see `read_seal`."""
        raise NotImplementedError


@ocp.args.register_with_handler(SealHandler, for_save=True)
@dataclasses.dataclass
class SealSave(ocp.args.CheckpointArgs):
    """What to write; `checksums` as `checksums.checksums` gives them."""

    meta: dict[str, Any]
    held_out_loss: float | None
    checksums: Any


@ocp.args.register_with_handler(SealHandler, for_restore=True)
@dataclasses.dataclass
class SealRestore(ocp.args.CheckpointArgs):
    """Orbax wants it to be there."""


def read_seal(folder: epath.Path) -> Seal:
    """The seal in `folder`. Raises DamagedError where there is none, or not the one that was written."""
    file = folder / _FILE
    try:
        content = json.loads(file.read_text())
        seal = Seal(content["meta"], content["held_out_loss"], content["checksums"])
        whole = content["sha256"] == _digest(seal)
    except FileNotFoundError:
        raise DamagedError(f"{file} is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{file} is damaged")
    return seal


def _encoded(seal: Seal) -> str:
    return json.dumps({**dataclasses.asdict(seal), "sha256": _digest(seal)}, indent=1)


def _digest(seal: Seal) -> str:
    return hashlib.sha256(json.dumps(dataclasses.asdict(seal), sort_keys=True).encode()).hexdigest()
