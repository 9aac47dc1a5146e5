"""A run folder explains itself: resolved config, tokenizer, where the tokens came from, versions.

config.json       the resolved config           metrics.jsonl   one line per report
run.json          data, versions, changes,      samples/        texts written during training
                  skipped batches
tokenizer/        the tokenizer, whole          loss.png        the loss curve
checkpoints/      one folder per saved step     huggingface/    at the end, the best parameters for others
events.jsonl      what happened, if anything did (events.py)
lease.json        while a job works here: who   run.lock        the same, for the processes of one machine

One at gs:// is worked on in a mirror (see remote_folder.py): `pull` at the start, `push` after each save. Only its
`checkpoints/` are written and read where they are.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import from_json, to_json
from gpt2_jax.data.skipped import Skip, skips_from_json, skips_to_json
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.folder_lock import folder_lock
from gpt2_jax.remote_folder import address_of, check_writable, is_remote, make_mirror, move_folder, pull, storage_path
from gpt2_jax.user_paths import expand_user

_MARK = "commit_success.txt"  # Orbax's, of a save that is whole
_VERSIONED = ("gpt2-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tiktoken")


def make_folder(path: str) -> pathlib.Path:
    """The folder, made if need be and proved writable. Raises UsageError before anything else has been done.

    That of an address at gs:// is its mirror, as it was left: `pull` it once no other process works on it.
    """
    if is_remote(path):
        check_writable(path)
        return make_mirror(path, "runs")
    try:
        folder = expand_user(path)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"--workdir={path}: {error.strerror} ({error.filename}); choose a folder that can be made and written to"
        ) from None
    return folder


def folder_to_read(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a run or model; of one at gs://, a copy of what `gpt2_jax.load` reads besides the saves.

    That copy is another than the one on which a run in this place works. Raises UsageError.
    """
    if not is_remote(path):
        return expand_user(path)
    folder = make_mirror(os.fspath(path), "models")
    with folder_lock(folder):
        pull(folder, lambda name: "/" not in name or name.startswith("tokenizer/"))
    return folder


def checkpoints_folder(folder: pathlib.Path) -> epath.Path:
    """Where the saves of a run folder are: in it, or at the address that it mirrors."""
    return storage_path(address_of(folder)) / "checkpoints"


def write_run(
    folder: pathlib.Path,
    config: RunConfig,
    data: dict[str, str],
    changes: Sequence[Mapping[str, Any]] = (),
    skipped: Sequence[Skip] | None = None,
) -> None:
    """Writes `run.json`, then `config.json`: where that is, a run was started.

    Args:
      folder: the run folder.
      config: the resolved config.
      data: folder and fingerprint of the token store.
      changes: all that the run was allowed to change up to now; see `read_changes`.
      skipped: the batches that the run leaves out; None: those that the folder's `run.json` has, if there is one.

    Raises:
      DataError: that file is damaged.
    """
    if skipped is None:
        skipped = read_skipped(folder) if (folder / "run.json").exists() else ()
    versions = {name: _version(name) for name in _VERSIONED}
    about: dict[str, Any] = {"format": 1, "data": data, "versions": {"python": platform.python_version(), **versions}}
    if changes:
        about["changes"] = changes
    if skipped:
        about["skipped"] = skips_to_json(skipped)
    write_text_atomically(folder / "run.json", json.dumps(about, indent=2) + "\n")
    write_text_atomically(folder / "config.json", to_json(config))


def holds_run(folder: pathlib.Path) -> bool:
    """Whether a run was started here and has saved a step; one that has not binds nobody to its settings."""
    return bool(saved_steps(folder))


def saved_steps(folder: pathlib.Path) -> list[int]:
    """The steps that the run in `folder` has saved, oldest first; whether they are whole shows when they are read."""
    checkpoints = checkpoints_folder(folder)
    return sorted(int(step.name) for step in checkpoints.iterdir() if _is_save(step)) if checkpoints.is_dir() else []


def set_aside(checkpoints: epath.Path, step: int, kind: str) -> epath.Path:
    """Moves a saved step to the folder `kind` beside it, under a name that is free, which it returns."""
    target, number = checkpoints / kind / str(step), 0
    while target.exists():
        number += 1
        target = target.with_name(f"{step}.{number}")
    source = checkpoints / str(step)
    if is_remote(source):  # where folders cannot be renamed; what a kill leaves has no mark and is no save
        move_folder(str(source), str(target), _MARK)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return target


def read_config(folder: pathlib.Path) -> RunConfig:
    """The resolved config of a run. Raises DataError when the folder holds none that can be read."""
    file = folder / "config.json"
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{address_of(folder)} is not a run folder: {file.name}: {error.strerror}") from None
    except (UsageError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from None


def read_data(folder: pathlib.Path) -> dict[str, str]:
    """Where the data of a run was, and its fingerprint. Raises DataError when that cannot be read."""
    data = _read_about(folder)["data"]
    return {"folder": str(data["folder"]), "fingerprint": str(data["fingerprint"])}


def read_skipped(folder: pathlib.Path) -> tuple[Skip, ...]:
    """The training batches that the run leaves out. Raises DataError when that cannot be read."""
    return skips_from_json(_read_about(folder).get("skipped", []), f"{folder / 'run.json'}: skipped")


def read_changes(folder: pathlib.Path) -> list[dict[str, Any]]:
    """What a run was allowed to change, in order: {"step": the step gone on after, "key", "before", "after"}.

    Raises DataError when that cannot be read.
    """
    changes = _read_about(folder).get("changes", [])
    if not isinstance(changes, list) or not all(
        isinstance(change, dict) and {"step", "key", "before", "after"} <= set(change) for change in changes
    ):
        raise DataError(f"{folder / 'run.json'} is damaged: its changes are no list of step, key, before and after")
    return changes


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
    """What `run.json` holds, with the data's folder and fingerprint in it."""
    file = folder / "run.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        whole = {"folder", "fingerprint"} <= about["data"].keys()
    except OSError as error:
        raise DataError(f"{address_of(folder)} is not a run folder: {file.name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DataError(f"{file} is damaged: it is not JSON with the data's folder and fingerprint")
    return about


def _is_save(step: epath.Path) -> bool:
    # On a disk a save gets its name when it is whole; in a bucket, where nothing can be renamed, a mark.
    return step.name.isdecimal() and (not is_remote(step) or (step / _MARK).exists())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
