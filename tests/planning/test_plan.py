"""Plans without a compiler: memory, roofline and cost by hand, and the search."""

import dataclasses
import math

import jax
import pytest

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import GPT2, init_params
from gpt2_jax.planning.chips import CHIPS, Machine, make_machine
from gpt2_jax.planning.flops import Product
from gpt2_jax.planning.make_plans import make_plans
from gpt2_jax.planning.plan import Plan, make_plan, plan_choices, with_known_vocabulary
from gpt2_jax.planning.roofline import REACHED_ARITHMETIC, REACHED_INTERCONNECT, REACHED_MEMORY, make_roofline
from gpt2_jax.planning.search import candidates, estimated_best, search
from gpt2_jax.planning.traffic import MemoryTraffic, Traffic, expected_traffic, memory_traffic

MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=64, n_positions=32, vocab_size=1000, dtype="bfloat16", remat="none")
RUN = RunConfig(
    model=MODEL,
    optimizer=OptimizerConfig(warmup_steps=1),
    train=TrainConfig(steps=100, batch_size=64),
    mesh=MeshConfig(data=2, fsdp=-1, tensor=2),
)


def test_state_is_counted_exactly() -> None:
    plan = make_plan(RUN, make_machine("v5e:4x4"), 1.0)
    assert plan.mesh == {"data": 2, "fsdp": 4, "tensor": 2}
    params = jax.eval_shape(lambda: init_params(GPT2(MODEL), jax.random.key(0)))
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    # Nearly all is split eight ways; norms and biases are not.
    assert numbers * 4 / 8 < plan.memory.parameters < 1.1 * numbers * 4 / 8
    assert 2 * plan.memory.parameters < plan.memory.optimizer < 2 * plan.memory.parameters + 100
    assert plan.memory.batch == 64 // 8 * 32 * 12
    assert plan.memory.peak == sum(
        getattr(plan.memory, part) for part in ("parameters", "optimizer", "batch", "temporaries")
    )


def test_roofline_by_hand() -> None:
    machine = make_machine("v5e:16x16")
    products = [Product("forward", "projections", 10, 1024, 1024, 1024)]
    traffic = [
        Traffic("all-gather", "fsdp", 16, 1, 8e9, 7.5e9, overlapped=1.0),
        Traffic("all-reduce", "data", 256, 1, 4e9, 1e9, overlapped=0.25),
    ]
    roofline = make_roofline(machine, products, MemoryTraffic(beside=600e9, alone=219e9), traffic)
    assert roofline.compute == pytest.approx(2e1 * 1024**3 / 197e12 / REACHED_ARITHMETIC)
    assert roofline.memory == pytest.approx(1 / REACHED_MEMORY)
    # One closed ring of 16: two links of 50 GB/s; 256 devices: both dimensions, four links.
    gather, reduce = 7.5e9 / 100e9 / REACHED_INTERCONNECT, 1e9 / 200e9 / REACHED_INTERCONNECT
    assert roofline.interconnect == pytest.approx(gather + reduce)
    assert roofline.exposed == pytest.approx(0.75 * reduce)
    assert roofline.alone == pytest.approx(219 / 819 / REACHED_MEMORY)
    assert roofline.step == pytest.approx(roofline.memory + 0.75 * reduce)  # products wait for memory here
    assert roofline.bound == "memory"


@pytest.mark.parametrize(
    ("machine", "group", "slices", "expected"),
    [
        ("v5e:4x4", 4, 1, 50e9),  # an open row: one direction
        ("v5e:4x4", 16, 1, 2 * 50e9),
        ("v5p:8x8x8", 64, 1, 4 * 100e9),  # two closed dimensions
        ("v5e:4x4*2", 32, 2, min(16 * 3.125e9, 2 * 50e9)),
        ("h100:64", 8, 1, 450e9),
        ("h100:64", 64, 1, 8 * 50e9),
    ],
)
def test_bandwidth_of_a_group(machine: str, group: int, slices: int, expected: float) -> None:
    assert make_machine(machine).bandwidth(group, slices) == expected


def test_collectives_of_theory() -> None:
    # Per layer 12 D^2 weights of two bytes, gathered forwards and backwards, and the float32 table once.
    run = dataclasses.replace(RUN, mesh=MeshConfig(fsdp=4, data=1))
    gather, scatter = expected_traffic(run, {"data": 1, "fsdp": 4, "tensor": 1})
    layer, table = 12 * 64**2 * 2, 1024 * 64 * 4
    assert (gather.kind, gather.payload) == ("all-gather", 2 * 2 * layer + table)
    assert (scatter.kind, scatter.payload) == ("reduce-scatter", 2 * layer + table)
    assert gather.wire == gather.payload * 3 / 4
    (reduce,) = expected_traffic(run, {"data": 4, "fsdp": 1, "tensor": 1})
    assert reduce.wire == 2 * 3 / 4 * (2 * 12 * 64**2 * 4 + table)
    # Four all-reduces' worth per layer: as many gathers and scatters.
    gather, scatter = expected_traffic(run, {"data": 1, "fsdp": 1, "tensor": 4})
    assert gather.wire + scatter.wire == 2 * 4 * (2 * 3 / 4 * 64 * 32 * 64 * 2)


def test_memory_traffic_by_hand() -> None:
    model = dataclasses.replace(MODEL, attention="splash")
    run = dataclasses.replace(RUN, model=model)
    moved = memory_traffic(run, {"data": 1, "fsdp": 8, "tensor": 1}, loss_chunk=0)
    tokens, parameters = 8 * 32, 2 * 12 * 64**2 + 1024 * 64
    stream = 2 * 3 * 64 * 2  # two layers, three passes' worth, widths of two bytes
    assert moved.alone == tokens * (10 * stream + 3 * 4 * 1024) + 28 * parameters / 8
    assert moved.beside == tokens * (20 * stream + 3 * 2 * 1024) + parameters * (3 * 2 + 8)
    plain = memory_traffic(
        dataclasses.replace(run, model=MODEL),
        {"data": 1, "fsdp": 8, "tensor": 1},
        loss_chunk=0,
    )
    assert plain.alone - moved.alone == tokens * 2 * 3 * 4 * 32 * 16  # scores of four heads
    light = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, mu_dtype="bfloat16"))
    saved = moved.alone - memory_traffic(light, {"data": 1, "fsdp": 8, "tensor": 1}, loss_chunk=0).alone
    assert saved == 4 * parameters / 8  # the first moment, read and written


@pytest.mark.parametrize(
    ("n_layer", "rows", "remat", "whole"),
    [(12, 16, "none", True), (1, 512, "none", False), (12, 256, "dots", False), (12, 512, "full", False)],
)
def test_what_is_left_open_is_chosen_by_the_memory(n_layer: int, rows: int, remat: str, whole: bool) -> None:
    """On one GPU of 74.5 GiB; all logits of 512 rows with their gradient are 98 GiB."""
    model = ModelConfig(n_layer=n_layer, vocab_size=50257, dtype="bfloat16", attn_pdrop=0.0)
    run = RunConfig(model=model, train=TrainConfig(batch_size=rows), mesh=MeshConfig(data=1))
    machine = make_machine("h100:1")
    choices = plan_choices(run, machine, None)
    remats = [(choice.config.model.remat, choice.loss_chunk == 0) for choice in choices]
    assert remats == [("none", True), ("none", False), ("dots", False), ("full", False)]
    (plan,) = make_plans(run, [machine], {}, analytic=True)
    assert (plan.config.model.remat, plan.loss_chunk == 0) == (remat, whole)
    (fixed,) = make_plans(plan.config, [machine], {}, analytic=True)
    assert fixed == plan


def test_hours_and_dollars_follow_from_the_step() -> None:
    plan = make_plan(RUN, make_machine("v5e:4x4"), 1.5)
    assert plan.hours == pytest.approx(100 * plan.roofline.step / 3600)
    assert plan.dollars == pytest.approx(plan.hours * 16 * 1.5)
    assert plan.tokens_per_second == pytest.approx(64 * 32 / plan.roofline.step)
    assert plan.mfu == pytest.approx(plan.model_flops / plan.roofline.step / (16 * 197e12))
    assert make_plan(RUN, make_machine("h100:16"), None).dollars is None


def test_what_cannot_be_is_refused_with_numbers() -> None:
    machine = make_machine("v5e:4x4")
    with pytest.raises(UsageError, match=r"mesh.fsdp=5, .* make 10 devices of 16"):
        make_plan(dataclasses.replace(RUN, mesh=MeshConfig(data=2, fsdp=5)), machine, None)
    with pytest.raises(UsageError, match=r"cannot be split over .* the nearest that can: 56 or 64"):
        make_plan(dataclasses.replace(RUN, train=TrainConfig(batch_size=60)), machine, None)
    with pytest.raises(UsageError, match=r"dcn_data=1, but v5e:4x4\*2 has 2 slices"):
        make_plan(RUN, make_machine("v5e:4x4*2"), None)
    with pytest.raises(UsageError, match="unknown chip 'v6x'.*did you mean v6e"):
        make_machine("v6x:4x4")
    with pytest.raises(UsageError, match="'4x4' is no number of chips"):
        make_machine("h100:4x4")
    unknown = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, vocab_size=0))
    assert with_known_vocabulary(unknown).model.vocab_size == 50257


def small_chip(gib: float) -> Machine:
    chip = dataclasses.replace(CHIPS["v5e"], memory=gib * 2**30)
    return dataclasses.replace(make_machine("v5e:4x4"), chip=chip)


def test_search_keeps_to_the_memory_and_prefers_the_fastest() -> None:
    run = dataclasses.replace(RUN, train=TrainConfig(steps=100, batch_size=4096))
    roomy, tight = estimated_best(run, small_chip(16), 1.0), estimated_best(run, small_chip(0.02), 1.0)
    assert 0 < len(tight) < len(roomy)
    assert all(plan.memory.peak <= 0.02 * 2**30 for plan in tight)
    assert roomy[0].roofline.step <= tight[0].roofline.step
    assert all(plan.config.train.batch_size == 4096 for plan in roomy)  # what is learned stays the same
    shapes = {tuple(plan.mesh.values()) for plan in roomy}
    assert {(16, 1, 1), (1, 16, 1), (1, 4, 4), (2, 4, 2)} <= shapes
    assert all(math.prod(shape) == 16 for shape in shapes)


def test_search_asks_the_compiler_in_order_until_enough_fit() -> None:
    asked: list[Plan] = []

    def refuses_the_first(plan: Plan) -> Plan:
        asked.append(plan)
        if len(asked) == 1:
            raise UsageError("this mesh cannot be laid over the torus")
        over = dataclasses.replace(plan.memory, peak=plan.memory.limit + 1)
        return dataclasses.replace(plan, memory=over) if len(asked) == 2 else plan

    found = search(RUN, make_machine("v5e:4x4"), 1.0, refuses_the_first, wanted=2, most_compiles=9)
    assert len(asked) == 4
    assert [plan.fits for plan in found] == [True, True, False]
    assert asked[0].roofline.step <= 1.1 * asked[-1].roofline.step


def test_search_over_odd_numbers_of_chips_and_heads() -> None:
    model = dataclasses.replace(MODEL, n_head=25, n_embd=100)
    run = dataclasses.replace(RUN, model=model, train=TrainConfig(batch_size=12))
    assert {tuple(plan.mesh.values()) for plan in estimated_best(run, make_machine("h100:6"), None)} == {
        (6, 1, 1),
        (3, 2, 1),
        (3, 1, 2),
    }
    assert any(candidate.train.microbatches == 2 for candidate in candidates(run, make_machine("h100:6")))
    with pytest.raises(UsageError, match="no mesh of h100:5 divides"):
        estimated_best(run, make_machine("h100:5"), None)
