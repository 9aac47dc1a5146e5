"""From a config and a list of topologies to plans: estimated, compiled or searched for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from gpt2_jax.config import RunConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.planning.chips import Machine, make_machine
from gpt2_jax.planning.compile import compile_program
from gpt2_jax.planning.plan import Plan, make_plan, plan_choices
from gpt2_jax.planning.search import SLACK, estimated_best, search
from gpt2_jax.planning.topology import require_libtpu

SHOWN = 3  # plans that a search shows


def find_machines(topologies: str, *, analytic: bool) -> list[Machine]:
    """The machines of a list such as "v5e:4x4,h100:8".

    Raises:
      UsageError: an unknown chip or size, or, unless `analytic`, a TPU where libtpu is missing.
    """
    names = [name.strip() for name in topologies.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--topology={topologies!r}: give at least one, such as v5e:4x4")
    machines = [make_machine(name) for name in names]
    if not analytic and any(machine.chip.platform == "tpu" for machine in machines):
        require_libtpu()
    return machines


def make_plans(
    config: RunConfig,
    machines: Sequence[Machine],
    prices: Mapping[str, float],
    *,
    analytic: bool = False,
    searches: bool = False,
    decode_rows: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """A plan for each machine, or with `searches` the best few.

    Args:
      config: with its vocabulary filled in.
      machines: where it may run.
      prices: dollars per chip-hour.
      analytic: compile nothing. GPUs and CPUs are always only estimated.
      searches: choose mesh, microbatches and remat policy.
      decode_rows: not 0: compile the decode step too, with so many rows per part of the batch.
      tell: called with a line before each wait.

    Raises:
      UsageError: config and machine do not fit each other; told before anything is compiled.
    """
    if not searches:
        # Estimates of all first: what cannot be is told before anything is compiled.
        estimates = [plan_choices(config, machine, prices.get(machine.chip.name)) for machine in machines]
        plans = [_fitting(choices, analytic, tell) for choices in estimates]
        return [_with_decode(plan, decode_rows, tell) for plan in plans]
    plans = []
    for machine in machines:
        price = prices.get(machine.chip.name)
        if analytic or machine.chip.platform != "tpu":
            found = estimated_best(config, machine, price)
        else:
            found = search(config, machine, price, lambda plan: _compiled(plan, analytic, tell), wanted=SHOWN)
        if not found:
            tell(f"{machine.name}: by the estimate nothing fits, whatever the mesh")
        plans += [_with_decode(plan, decode_rows, tell) for plan in found[:SHOWN]]
    return plans


def _fitting(choices: Sequence[Plan], analytic: bool, tell: Callable[[str], None]) -> Plan:
    """The first estimate that also the compiler, where it is asked, lets fit; the last one if none does."""
    *first, last = choices
    for estimate in first:
        if estimate.memory.peak <= SLACK * estimate.memory.limit:
            plan = _compiled(estimate, analytic, tell)
            if plan.fits:
                return plan
    return _compiled(last, analytic, tell)


def _compiled(plan: Plan, analytic: bool, tell: Callable[[str], None]) -> Plan:
    machine = plan.machine
    if analytic or machine.chip.platform != "tpu":
        return plan
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    micro, remat = plan.config.train.microbatches, plan.config.model.remat
    logits = f"in chunks of {plan.loss_chunk}" if plan.loss_chunk else "whole"
    tell(f"compiling for {machine.name}: {mesh}, {micro} microbatches, remat {remat}, logits {logits}")
    return make_plan(plan.config, machine, plan.price, compile_program(plan.config, machine.name))


def _with_decode(plan: Plan, rows: int, tell: Callable[[str], None]) -> Plan:
    if not rows or plan.compiled is None:
        return plan
    tell(f"compiling the decode step for {plan.machine.name}")
    return dataclasses.replace(plan, decode=compile_program(plan.config, plan.machine.name, "decode", rows))
