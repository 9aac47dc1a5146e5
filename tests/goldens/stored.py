"""Goldens: what transformers computed for the reduced cases, in a file small enough to keep.

Of each parameter's gradient it has the norm and the projections on three random directions. The projections of a
difference have the size of the difference, so they tell how large it is: E[(d . r)^2] = |d|^2 for standard normal r.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
from goldens.cases import draw

FILE = pathlib.Path(__file__).parent / "transformers.npz"
_DIRECTIONS = 3
# Of the logits [B, T, V]: first, middle and last positions, ids from both ends of the vocabulary.
_PLACES = np.ix_([0, 1], [0, 1, 11, 23], [0, 1, 2, 50, 100, 150, 255, 256])


@dataclasses.dataclass(frozen=True)
class Golden:
    """Of one case.

    Attributes:
      logits: of the first batch, at `_PLACES`.
      losses: of each step.
      gradients: norm and projections of each of the first step's, by Hugging Face's name.
    """

    logits: np.ndarray
    losses: np.ndarray
    gradients: dict[str, np.ndarray]


def chosen(logits_BTV: np.ndarray) -> np.ndarray:
    """The logits that are kept."""
    return logits_BTV[_PLACES]


def sketch(name: str, gradient: np.ndarray) -> np.ndarray:
    """Norm and projections of a gradient."""
    flat = gradient.reshape(-1).astype(np.float64)
    directions = draw(name, (_DIRECTIONS, flat.size), seed=1)
    return np.array([np.linalg.norm(flat), *directions @ flat])


def distance(sketched: np.ndarray, golden: np.ndarray) -> float:
    """The norm of the difference of two gradients as their sketches tell it, as a share of the golden one's norm."""
    off = np.abs(sketched - golden)
    return float(max(off[0], np.sqrt(np.mean(off[1:] ** 2))) / golden[0])


def write(goldens: Mapping[str, Golden], file: pathlib.Path = FILE) -> None:
    """All cases into one file."""
    arrays: dict[str, np.ndarray] = {}
    for case, golden in goldens.items():
        arrays[f"{case}/logits"] = golden.logits.astype(np.float32)
        arrays[f"{case}/losses"] = golden.losses
        arrays[f"{case}/names"] = np.array(list(golden.gradients))
        arrays[f"{case}/gradients"] = np.array(list(golden.gradients.values()), np.float32)
    np.savez_compressed(file, **arrays)


def read(case: str) -> Golden:
    """One case from the file."""
    with np.load(FILE) as arrays:
        names, gradients = arrays[f"{case}/names"].tolist(), arrays[f"{case}/gradients"].astype(np.float64)
        return Golden(arrays[f"{case}/logits"], arrays[f"{case}/losses"], dict(zip(names, gradients, strict=True)))
