"""What the compiler for TPUs says of the real programs; a minute each, so that most wait for `-m slow`."""

import dataclasses
import json
import os
import signal

import jax
import pytest

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.errors import Gpt2JaxError, UsageError
from gpt2_jax.planning import compile as planning_compile
from gpt2_jax.planning.chips import GIB, make_machine
from gpt2_jax.planning.compile import compile_program
from gpt2_jax.planning.compile_worker import out_of_memory
from gpt2_jax.planning.plan import make_plan

MODEL = ModelConfig(
    n_layer=2,
    n_head=4,
    n_embd=256,
    n_positions=256,
    vocab_size=1000,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    dtype="bfloat16",
    remat="full",
)
RUN = RunConfig(
    model=MODEL,
    optimizer=OptimizerConfig(warmup_steps=1),
    train=TrainConfig(batch_size=16),
    mesh=MeshConfig(data=1, fsdp=-1),
)


def test_messages_of_the_compiler_become_figures() -> None:
    said = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage >= 20.75G:"
    )
    figures = out_of_memory(said)
    assert (figures["peak"], figures["limit"]) == (20.5 * GIB, 15.75 * GIB)
    assert "\n" not in figures["out_of_memory"]
    said = "RESOURCE_EXHAUSTED: Allocation (size=274877906944) would exceed memory (size=17179869184) :: %s0 = ..."
    figures = out_of_memory(said)
    assert (figures["peak"], figures["limit"]) == (256 * GIB, 16 * GIB)


def test_a_compiler_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_compile, "require_libtpu", lambda: None)
    monkeypatch.setattr(planning_compile, "WORKER", ("-c", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"))
    with pytest.raises(Gpt2JaxError, match="the compiler for v5e:2x2 ended with signal SIGSEGV"):
        compile_program(RUN, "v5e:2x2")
    assert "JAX_PLATFORMS" in os.environ


@pytest.mark.tpu
def test_train_step_over_a_slice() -> None:
    machine = make_machine("v5e:2x2")
    compiled = compile_program(RUN, machine.name)
    plan = make_plan(RUN, machine, 1.0, compiled)
    assert plan.fits and plan.memory.source == "compiler"
    assert compiled.mesh == {"data": 1, "fsdp": 4, "tensor": 1}
    # What the compiler counts as arguments is the state and the batch that the shapes give, but for layout padding.
    counted = plan.memory.parameters + plan.memory.optimizer + plan.memory.batch
    assert counted <= compiled.arguments < 1.3 * counted
    assert compiled.peak >= compiled.arguments
    kinds = {item.kind for item in compiled.traffic}
    assert {"all-gather", "reduce-scatter"} <= kinds
    assert all(item.group == 4 and item.axes == "fsdp" for item in compiled.traffic)
    json.dumps(dataclasses.asdict(compiled))


@pytest.mark.tpu
def test_what_does_not_fit_is_a_finding() -> None:
    # Not by activations: the compiler looks for minutes for ways to keep fewer of them.
    model = dataclasses.replace(MODEL, n_layer=1, vocab_size=2**24)
    run = dataclasses.replace(RUN, model=model, mesh=MeshConfig(data=-1))
    compiled = compile_program(run, "v5e:2x2")
    assert "RESOURCE_EXHAUSTED" in compiled.out_of_memory
    plan = make_plan(run, make_machine("v5e:2x2"), 1.0, compiled)
    assert not plan.fits
    assert plan.memory.peak > plan.memory.limit > 15 * GIB


@pytest.mark.tpu
@pytest.mark.parametrize("tensor", [1, 2])
def test_decode_step_over_a_slice(tensor: int) -> None:
    model = dataclasses.replace(MODEL, n_head=5, n_embd=320)  # heads that two devices cannot share out evenly
    run = dataclasses.replace(RUN, model=model, mesh=MeshConfig(data=-1, tensor=tensor))
    compiled = compile_program(run, "v5e:2x2", "decode", rows=2)
    assert not compiled.out_of_memory
    assert compiled.peak > 0
    assert jax.devices()[0].platform == "cpu"


@pytest.mark.tpu
def test_a_mesh_that_the_torus_cannot_hold_is_refused() -> None:
    run = dataclasses.replace(RUN, mesh=MeshConfig(data=3, fsdp=1))
    with pytest.raises(UsageError, match="make 3 devices of 4"):
        compile_program(run, "v5e:2x2")
