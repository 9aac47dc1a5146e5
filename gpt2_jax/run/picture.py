"""The loss curve of a run as a picture."""

import pathlib

from gpt2_jax.run.metrics import read_reports


def draw_losses(metrics: pathlib.Path, picture: pathlib.Path) -> None:
    """Draws training and held-out loss over steps from `metrics.jsonl` into a PNG."""
    # Imported here: it takes half a second, once, at the end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reports = read_reports(metrics)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(report["step"], report[name]) for report in reports if report.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    temporary = picture.with_suffix(".partial.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(picture)
