"""From a config and a list of topologies to plans: estimated, compiled or searched for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from gpt2_jax.config import RunConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.planning.chips import Machine, make_machine
from gpt2_jax.planning.compile import compile_program
from gpt2_jax.planning.plan import Plan, make_plan, with_each_remat
from gpt2_jax.planning.search import SLACK, estimated_best, search
from gpt2_jax.planning.topology import require_libtpu
from gpt2_jax.run.fit_memory import REMAT

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
        estimates = [make_plan(config, machine, prices.get(machine.chip.name)) for machine in machines]
        return [_fitting(config, plan, analytic, decode_rows, tell) for plan in estimates]
    plans = []
    for machine in machines:
        price = prices.get(machine.chip.name)
        if analytic or machine.chip.platform != "tpu":
            found = estimated_best(config, machine, price)
        else:
            found = search(
                config, machine, price, lambda plan: _compiled(plan, analytic, decode_rows, tell), wanted=SHOWN
            )
        if not found:
            tell(f"{machine.name}: by the estimate nothing fits, whatever the mesh")
        plans += found[:SHOWN]
    return plans


def _fitting(config: RunConfig, estimate: Plan, analytic: bool, decode_rows: int, tell: Callable[[str], None]) -> Plan:
    """The plan as the compiler finds it; where the config leaves the remat policy open, the first that fits."""
    plan, candidates = estimate, with_each_remat(config)
    for candidate in candidates:
        guess = make_plan(candidate, estimate.machine, estimate.price)
        if (
            len(candidates) == 1
            or candidate.model.remat == REMAT[-1]
            or guess.memory.peak <= SLACK * guess.memory.limit
        ):
            plan = _compiled(guess, analytic, decode_rows, tell)
            if plan.fits:
                break
    return plan


def _compiled(plan: Plan, analytic: bool, decode_rows: int, tell: Callable[[str], None]) -> Plan:
    machine = plan.machine
    if analytic or machine.chip.platform != "tpu":
        return plan
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    micro, remat = plan.config.train.microbatches, plan.config.model.remat
    tell(f"compiling for {machine.name}: {mesh}, {micro} microbatches, remat {remat}")
    compiled = make_plan(plan.config, machine, plan.price, compile_program(plan.config, machine.name))
    if not decode_rows:
        return compiled
    tell(f"compiling the decode step for {machine.name}")
    decode = compile_program(plan.config, machine.name, "decode", decode_rows)
    return dataclasses.replace(compiled, decode=decode)
