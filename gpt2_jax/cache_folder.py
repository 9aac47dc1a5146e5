"""Where things are kept that can be made again."""

import os
import pathlib


def cache_folder(name: str) -> pathlib.Path:
    """The folder `gpt2_jax/NAME` in XDG_CACHE_HOME, or in ~/.cache where that is not set."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "gpt2_jax" / name
