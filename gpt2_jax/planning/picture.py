"""Plans as a picture: memory against the chip's, and the three roofs of a step."""

import os
import pathlib
from collections.abc import Sequence

from gpt2_jax.planning.chips import GIB
from gpt2_jax.planning.plan import Plan


def draw_plans(plans: Sequence[Plan], picture: pathlib.Path) -> None:
    """Draws the plans into a PNG, one row each."""
    # Imported here: it takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [_label(plan) for plan in plans]
    figure = Figure(figsize=(14, 1.8 + 0.7 * len(plans)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    start = [0.0] * len(plans)
    for part in ("parameters", "optimizer", "batch"):
        widths = [getattr(plan.memory, part) / GIB for plan in plans]
        left.barh(labels, widths, left=start, label=part)
        start = [before + width for before, width in zip(start, widths, strict=True)]
    # What is left of the peak: temporaries share places, and their sum may be more.
    rest = [max(0.0, plan.memory.peak / GIB - before) for plan, before in zip(plans, start, strict=True)]
    left.barh(labels, rest, left=start, label="temporaries, at the peak")
    for row, plan in enumerate(plans):
        limit = plan.memory.limit / GIB
        left.plot([limit, limit], [row - 0.45, row + 0.45], color="black", label="" if row else "the chip's")
    left.set_xlabel("GiB per device")

    height = 0.8 / 3
    for place, part in enumerate(("compute", "memory", "interconnect")):
        rows = [row + (place - 1) * height for row in range(len(plans))]
        right.barh(rows, [getattr(plan.roofline, part) for plan in plans], height=height, label=part)
    right.set_yticks(range(len(plans)), labels)
    right.set_xlabel("seconds per step")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.legend(fontsize="small")
        axes.grid(axis="x", alpha=0.3)
    temporary = picture.with_name(f"{picture.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(picture)
    finally:
        temporary.unlink(missing_ok=True)


def _label(plan: Plan) -> str:
    mesh = "x".join(str(size) for size in plan.mesh.values())
    kind = "estimate" if plan.compiled is None else "compiled"
    return f"{plan.machine.name}  {mesh}\n{plan.config.model.remat}, {plan.config.train.microbatches} micro, {kind}"
