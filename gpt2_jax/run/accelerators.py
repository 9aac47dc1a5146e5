"""Whether a GPU or TPU is there that JAX does not use."""

import pathlib

import jax

from gpt2_jax.errors import UsageError

_GOOGLE = "0x1ae0"  # the maker's number on the PCI bus


def check_accelerator_is_used(root: pathlib.Path = pathlib.Path("/")) -> None:
    """Raises UsageError when JAX computes on the CPU, nobody asked for that, and a GPU or TPU is visible.

    `root` is where the system's files are.
    """
    asked_for = (jax.config.jax_platforms or "").split(",")[0]  # type: ignore[attr-defined]
    if asked_for == "cpu" or jax.default_backend() != "cpu":
        return
    found = visible_accelerator(root)
    if found is not None:
        kind, file, extra = found
        raise UsageError(
            f"JAX sees only the CPU, but a {kind} is here ({file}): pip install 'gpt2-jax[{extra}]', "
            "or set JAX_PLATFORMS=cpu to train on the CPU"
        )


def visible_accelerator(root: pathlib.Path) -> tuple[str, pathlib.Path, str] | None:
    """(what it is, the file that shows it, the extra of this package that uses it), or None."""
    for pattern, kind, extra in (
        ("dev/nvidia[0-9]*", "GPU", "cuda13"),
        ("proc/driver/nvidia/gpus/*", "GPU", "cuda13"),
        ("dev/accel[0-9]*", "TPU", "tpu"),
    ):
        for file in root.glob(pattern):
            return kind, file, extra
    # Newer TPUs are handed to programs through VFIO, as other devices are.
    handed_out = next(root.glob("dev/vfio/[0-9]*"), None)
    if handed_out is not None and any(_is_googles(file) for file in root.glob("sys/bus/pci/devices/*/vendor")):
        return "TPU", handed_out, "tpu"
    return None


def _is_googles(vendor: pathlib.Path) -> bool:
    try:
        return vendor.read_text(encoding="ascii").strip() == _GOOGLE
    except OSError:  # a device that was taken away meanwhile
        return False
