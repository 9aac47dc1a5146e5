"""Plans as a text and as JSON."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from gpt2_jax.model.gpt2 import parameter_count
from gpt2_jax.planning.chips import GIB
from gpt2_jax.planning.plan import Plan
from gpt2_jax.planning.roofline import ASSUMPTIONS


def as_text(plans: Sequence[Plan], prices: str) -> str:
    """A block of lines per plan, a table of several to compare them, and what was assumed."""
    table = [_table(plans)] if len(plans) > 1 else []
    return "\n\n".join([*(_block(plan) for plan in plans), *table, "\n".join(notes(plans, prices))])


def as_json(plans: Sequence[Plan], prices: str) -> str:
    """All figures: bytes, seconds, FLOPs, dollars."""
    return json.dumps({"plans": [_dict(plan) for plan in plans], "notes": notes(plans, prices)}, indent=2) + "\n"


def notes(plans: Sequence[Plan], prices: str) -> list[str]:
    """What the figures rest on."""
    lines = [ASSUMPTIONS]
    if any(plan.compiled for plan in plans):
        lines.append(
            "memory: the compiler's own memory_analysis: peak is peak_memory_in_bytes, temporaries temp_size_in_bytes; "
            "parameters, optimizer and batch from the shapes of the real state"
        )
    if any(plan.compiled is None for plan in plans):
        lines.append("estimate: nothing was compiled; temporaries and collectives are arithmetic on the config")
    if any(plan.price is not None for plan in plans):
        lines.append(f"prices: {prices}")
    return lines


def _block(plan: Plan) -> str:
    config, memory, roofline = plan.config, plan.memory, plan.roofline
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    train = config.train
    lines = [
        f"{plan.machine.name}: {'estimate, not compiled' if plan.compiled is None else _compile_time(plan)}",
        f"  model         {parameter_count(config.model):,} parameters, context {config.context_length}, "
        f"{config.model.dtype}, attention {config.model.attention}, remat {config.model.remat}",
        f"  mesh          {mesh}; batch {train.batch_size} in {train.microbatches} microbatches"
        + (f", logits in chunks of {plan.loss_chunk}" if plan.loss_chunk else ""),
        f"  per device    parameters {_gib(memory.parameters)}, optimizer {_gib(memory.optimizer)}, "
        f"batch {_gib(memory.batch)}, temporaries {_gib(memory.temporaries)}",
        f"  peak memory   {_gib(memory.peak)} of {_gib(memory.limit)} ({memory.peak / memory.limit:.0%}, by the "
        f"{memory.source}): {_fit(plan)}",
        *_traffic_lines(plan),
        f"  arithmetic    {_flops_line(plan)}",
        f"  step          {_seconds(roofline.step)}: compute {_seconds(roofline.compute)}, memory "
        f"{_seconds(roofline.memory)} ({_seconds(roofline.alone)} alone), interconnect "
        f"{_seconds(roofline.interconnect)} ({_seconds(roofline.exposed)} exposed); {roofline.bound} is the longest",
        f"  expected      MFU {plan.mfu:.1%}, {plan.tokens_per_second:,.0f} tokens/s",
        f"  whole run     {train.steps * plan.tokens_per_step / 1e6:,.0f} million tokens in {plan.hours:,.2f} hours, "
        + _cost(plan),
        *_decode_lines(plan),
    ]
    return "\n".join(lines)


def _fit(plan: Plan) -> str:
    if plan.fits:
        return "fits"
    refused = plan.compiled is not None and plan.compiled.out_of_memory
    return f"does NOT fit, by {_gib(plan.memory.peak - plan.memory.limit)}{' or more' if refused else ''}"


def _compile_time(plan: Plan) -> str:
    assert plan.compiled is not None
    return f"compiled in {plan.compiled.compile_seconds:.1f} s, lowered in {plan.compiled.lower_seconds:.1f} s"


def _traffic_lines(plan: Plan) -> list[str]:
    lines = []
    for item in sorted(plan.traffic, key=lambda item: -item.wire):
        overlap = "" if item.overlapped is None else f", {item.overlapped:.0%} beside compute"
        lines.append(
            f"  collective    {item.kind} over {item.axes} ({item.group} devices): {item.count:,} a step, arrays "
            f"{_gib(item.payload)}, sent per device {_gib(item.wire)}{overlap}"
        )
    return lines or ["  collective    none"]


def _decode_lines(plan: Plan) -> list[str]:
    decode = plan.decode
    if decode is None:
        return []
    if decode.out_of_memory:
        return [f"  decode step   does NOT fit: {decode.out_of_memory}"]
    sent = sum(item.wire for item in decode.traffic)
    return [
        f"  decode step   compiled in {decode.compile_seconds:.1f} s; peak {_gib(decode.peak)} per device, sent per "
        f"device {_gib(sent)} a token"
    ]


def _flops_line(plan: Plan) -> str:
    totals = {step_pass: sum(parts.values()) for step_pass, parts in plan.flops.items()}
    attention = sum(parts["attention"] for parts in plan.flops.values())
    head = sum(parts["head"] for parts in plan.flops.values())
    whole = sum(totals.values())
    return (
        f"{_tera(whole)} a step: forward {_tera(totals['forward'])}, backward {_tera(totals['backward'])}, recompute "
        f"{_tera(totals['recompute'])}; of these attention {attention / whole:.0%}, head {head / whole:.0%}; "
        f"{_tera(plan.model_flops)} count for MFU"
    )


def _cost(plan: Plan) -> str:
    if plan.dollars is None:
        return f"no price for {plan.machine.chip.name} (see --prices)"
    return f"{plan.dollars:,.2f} dollars ({plan.machine.chips} chips at {plan.price:g} an hour)"


def _table(plans: Iterable[Plan]) -> str:
    header = ("topology", "data", "fsdp", "tensor", "micro", "remat", "GiB", "of", "step", "MFU", "tokens/s", "$", "")
    rows = [header, *(_row(plan) for plan in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(cells) for cells in aligned)


def _row(plan: Plan) -> tuple[str, ...]:
    return (
        plan.machine.name,
        *(str(plan.mesh[axis]) for axis in ("data", "fsdp", "tensor")),
        str(plan.config.train.microbatches),
        plan.config.model.remat,
        f"{plan.memory.peak / GIB:.2f}",
        f"{plan.memory.limit / GIB:.2f}",
        _seconds(plan.roofline.step),
        f"{plan.mfu:.1%}",
        f"{plan.tokens_per_second:,.0f}",
        "?" if plan.dollars is None else f"{plan.dollars:,.2f}",
        "fits" if plan.fits else "does NOT fit",
    )


def _dict(plan: Plan) -> dict[str, Any]:
    return {
        "topology": plan.machine.name,
        "devices": plan.machine.devices,
        "chips": plan.machine.chips,
        "source": "estimate" if plan.compiled is None else "compiled",
        "fits": plan.fits,
        "mesh": dict(plan.mesh),
        "config": dataclasses.asdict(plan.config),
        "loss_chunk": plan.loss_chunk,
        "memory_per_device": dataclasses.asdict(plan.memory),
        "compiler": None if plan.compiled is None else {**dataclasses.asdict(plan.compiled), "traffic": None},
        "decode": None if plan.decode is None else dataclasses.asdict(plan.decode),
        "collectives": [dataclasses.asdict(item) for item in plan.traffic],
        "flops_per_step": {step_pass: dict(parts) for step_pass, parts in plan.flops.items()},
        "model_flops_per_step": plan.model_flops,
        "roofline_seconds": {**dataclasses.asdict(plan.roofline), "step": plan.roofline.step},
        "bound": plan.roofline.bound,
        "expected_mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "tokens": plan.config.train.steps * plan.tokens_per_step,
        "hours": plan.hours,
        "dollars_per_chip_hour": plan.price,
        "dollars": plan.dollars,
    }


def _gib(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.2f} MiB"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP" if flops >= 1e15 else f"{flops / 1e12:.4g} TFLOP"


def _seconds(number: float) -> str:
    return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms"
