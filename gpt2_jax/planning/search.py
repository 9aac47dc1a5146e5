"""Looks for the mesh, the microbatches and the remat policy with which a run is fastest on a machine."""

import dataclasses
from collections.abc import Callable, Iterator

from gpt2_jax.config import MeshConfig, RunConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.planning.chips import Machine
from gpt2_jax.planning.plan import Plan, make_plan
from gpt2_jax.run.fit_memory import REMAT

# Tensor parallelism beyond this leaves products too narrow for the matrix unit in all sizes of GPT-2.
MOST_TENSOR = 16
# A candidate is worth compiling even if the estimate is this much over the memory: it is good to about a third.
SLACK = 1.4


def candidates(config: RunConfig, machine: Machine) -> Iterator[RunConfig]:
    """The config with each mesh, number of microbatches and remat policy that divides evenly.

    The batch of a step stays as it is: it decides what is learned. `mesh.dcn_data` stays too.
    """
    slices = config.mesh.dcn_data
    within = machine.devices // slices
    for tensor in _powers_of_two(min(within, MOST_TENSOR)):
        for fsdp in _powers_of_two(within // tensor):
            if within % (tensor * fsdp):
                continue
            mesh = MeshConfig(data=within // tensor // fsdp, fsdp=fsdp, tensor=tensor, dcn_data=slices)
            rows = config.train.batch_size // (within // tensor * slices)
            for microbatches in _powers_of_two(rows):
                for remat in REMAT:
                    if config.train.batch_size % microbatches == 0:
                        yield dataclasses.replace(
                            config,
                            mesh=mesh,
                            model=dataclasses.replace(config.model, remat=remat),
                            train=dataclasses.replace(config.train, microbatches=microbatches),
                        )


def estimated_best(config: RunConfig, machine: Machine, price: float | None, slack: float = 1.0) -> list[Plan]:
    """Estimates of all candidates up to `slack` times the memory: those that fit first, and the fastest of these.

    Raises:
      UsageError: no mesh over the machine can split batch and model evenly.
    """
    plans = []
    refused = ""
    for candidate in candidates(config, machine):
        try:
            plans.append(make_plan(candidate, machine, price))
        except UsageError as error:
            refused = str(error)
    if not plans:
        raise UsageError(
            f"--search: no mesh of {machine.name} divides train.batch_size={config.train.batch_size} and the model"
            + (f"; the last one: {refused}" if refused else "")
        )
    return sorted((plan for plan in plans if plan.memory.peak <= slack * plan.memory.limit), key=_rank)


def search(
    config: RunConfig,
    machine: Machine,
    price: float | None,
    compile_plan: Callable[[Plan], Plan],
    *,
    wanted: int = 3,
    most_compiles: int = 8,
) -> list[Plan]:
    """Compiles the estimates in order until `wanted` fit; returns all compiled, those that fit and are fastest first.

    Args:
      config: whose mesh, microbatches and remat policy are to be chosen.
      machine: what it is to run on.
      price: dollars per chip-hour.
      compile_plan: from an estimate to what the compiler says of it; may raise UsageError.
      wanted: plans that fit.
      most_compiles: give up after so many.
    """
    compiled: list[Plan] = []
    for plan in estimated_best(config, machine, price, SLACK)[:most_compiles]:
        try:
            compiled.append(compile_plan(plan))
        except UsageError:  # a mesh that cannot be laid over this torus
            continue
        if sum(one.fits for one in compiled) == wanted:
            break
    return sorted(compiled, key=_rank)


def _rank(plan: Plan) -> tuple[bool, float, int, int]:
    # To 1 %; of what is closer, the one with fewer and larger products.
    step = float(f"{plan.roofline.step:.3g}")
    return not plan.fits, step, plan.config.train.microbatches, plan.memory.peak


def _powers_of_two(most: int) -> Iterator[int]:
    number = 1
    while number <= most:
        yield number
        number *= 2
