"""Paths as users write them, and where things are kept that can be made again."""

import os
import pathlib

from gpt2_jax.errors import UsageError


def expand_user(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path with ~ and ~NAME replaced; UsageError for an address, or where there is no such home folder."""
    if "://" in os.fspath(path):
        raise UsageError(
            f"{path}: a path on this machine is needed here; gs://BUCKET/PATH can be a --workdir, a model to load, "
            "init_from and data.source=tokens:gs://BUCKET/PATH; other addresses cannot be used"
        )
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: there is no such home folder; write the whole path") from None


def cache_folder(name: str) -> pathlib.Path:
    """The folder `gpt2_jax/NAME` in XDG_CACHE_HOME, or in ~/.cache where that is not set."""
    return expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gpt2_jax" / name
