"""The loss curve."""

import json
import pathlib

import matplotlib.image
import numpy as np

from gpt2_jax.run.picture import draw_losses


def draw(folder: pathlib.Path, reports: list[dict]) -> np.ndarray:
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(report) + "\n" for report in reports))
    draw_losses(metrics, folder / "loss.png")
    return matplotlib.image.imread(folder / "loss.png")


def test_curves_show_what_was_reported(tmp_path: pathlib.Path) -> None:
    training = [{"step": step, "loss": 4 / step} for step in range(1, 9)]
    empty = draw(tmp_path, [{"step": 1, "tokens": 3.0}])
    one = draw(tmp_path, training)
    two = draw(tmp_path, [*training, {"step": 8, "held_out_loss": 1.0}])
    assert empty.shape == one.shape == two.shape
    assert (one != empty).any()
    assert (two != one).any()
    assert not list(tmp_path.glob("*partial*"))


def test_losses_that_were_not_finite_are_left_out(tmp_path: pathlib.Path) -> None:
    assert draw(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]).any()
