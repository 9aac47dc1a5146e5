"""Meshes of forced CPU devices: refusals, layouts, and the same numbers on each of them."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt2_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.planning.topology import devices, parse_topologies
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.sharding import (
    check_divisible,
    constrain,
    make_mesh,
    mesh_sizes,
    own_rows,
    partition_spec,
    place_batch,
    use_mesh,
)
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.steps import StepSettings, eval_step, train_step
from gpt2_jax.training.train_state import TrainState, abstract_state, sharded_init

STEPS = 10
# A large eps: with a small one, Adam turns the rounding of gradients that are zero into steps.
OPTIMIZER = OptimizerConfig(warmup_steps=2, learning_rate=1e-2, eps=1e-3)
# Settings are equal, and their steps compiled once, only with the same optimizer.
OPTIMIZERS = {name: make_optimizer(dataclasses.replace(OPTIMIZER, name=name), STEPS) for name in ("adamw", "muon")}
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 4, 2)]
HEADS = (12, 25)  # of GPT-2's smallest and largest: eight devices can share out neither evenly


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model; a frugal step accumulates, recomputes and goes through the loss in chunks."""

    heads: int = 4
    frugal: bool = False
    optimizer: str = "adamw"

    @property
    def settings(self) -> StepSettings:
        model = ModelConfig(
            n_layer=2, n_head=self.heads, n_embd=8 * self.heads, n_positions=16, vocab_size=300, remat=self.remat
        )
        schedule = learning_rate_schedule(OPTIMIZER, STEPS)
        parts = {"microbatches": 2, "loss_chunk": 4} if self.frugal else {}
        return StepSettings(GPT2(model), OPTIMIZERS[self.optimizer], schedule, seed=3, ema_decay=0.5, **parts)

    @property
    def remat(self) -> str:
        return "full" if self.frugal else "none"


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, (STEPS, 8, 17)).astype(np.int32)
    weights = rng.random((STEPS, 8, 16)).astype(np.float32)
    return [
        {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": weight}
        for rows, weight in zip(tokens, weights, strict=True)
    ]


def advance(
    state: TrainState, mesh: jax.sharding.Mesh, settings: StepSettings, steps: slice
) -> tuple[TrainState, list[float]]:
    """The state after these steps, and their losses."""
    losses = []
    with use_mesh(mesh):
        for host_batch in batches()[steps]:
            batch = place_batch(host_batch, mesh)
            state, metrics = train_step(state, batch, settings=settings)
            losses.append(float(metrics["loss_sum"]) / float(metrics["weight_sum"]))
        losses.append(float(eval_step(state.params, batch, model=settings.model)["loss_sum"]))
    return state, losses


@functools.cache
def train(mesh_shape: tuple[int, int, int], shape: Shape) -> tuple[TrainState, TrainState, list[float]]:
    """First state, last state and losses of ten steps, and of an evaluation after them."""
    mesh, settings = mesh_of(*mesh_shape), shape.settings
    first = sharded_init(settings.model, settings.optimizer, 0, mesh, ema=True)
    start = jax.device_get(first)
    state, losses = advance(first, mesh, settings, slice(None))
    return start, jax.device_get(state), losses


MUON = Shape(4, optimizer="muon")
QUICK = {((2, 2, 2), Shape(25))}


@pytest.mark.parametrize(
    ("mesh_shape", "shape"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in [
            *((mesh_shape, Shape(heads)) for heads in HEADS for mesh_shape in MESHES),
            *((mesh_shape, Shape(4, frugal=True)) for mesh_shape in ((2, 2, 1), (1, 2, 2))),
            ((1, 2, 4), Shape(25, frugal=True)),
            *((mesh_shape, MUON) for mesh_shape in ((2, 2, 2), (1, 8, 1))),
        ]
    ],
    ids=str,
)
def test_numbers_do_not_depend_on_the_mesh(mesh_shape: tuple[int, int, int], shape: Shape) -> None:
    start, final, losses = train(mesh_shape, shape)
    want_start, want_final, want_losses = train((1, 1, 1), shape)
    jax.tree.map(np.testing.assert_array_equal, start, want_start)
    # Dropout is on: other masks would move all of this by far more.
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(final), jax.tree.leaves(want_final), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("shape", [Shape(25), pytest.param(MUON, marks=pytest.mark.slow)], ids=str)
def test_a_run_goes_on_on_other_devices(tmp_path: pathlib.Path, shape: Shape) -> None:
    """Saved and restored on 8, 2, 1 and 4 devices in turn; two hosts are in test_two_processes.py."""
    settings = shape.settings
    want = train((1, 1, 1), shape)[2]
    stops = [0, 3, 5, 8, 10]
    for number, mesh_shape in enumerate([(2, 2, 2), (1, 2, 1), (1, 1, 1), (2, 1, 2)]):
        mesh, start, stop = mesh_of(*mesh_shape), stops[number], stops[number + 1]
        with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
            if start:
                abstract = abstract_state(settings.model, settings.optimizer, mesh, ema=True)
                state, _ = checkpoints.restore(start, abstract)
            else:
                state = sharded_init(settings.model, settings.optimizer, 0, mesh, ema=True)
            state, losses = advance(state, mesh, settings, slice(start, stop))
            np.testing.assert_allclose(losses[:-1], want[start:stop], rtol=1e-5)
            checkpoints.save(state, {}, None)


def compiled_step(mesh: jax.sharding.Mesh, settings: StepSettings) -> str:
    """The program of a train step, as XLA runs it."""
    state = abstract_state(settings.model, settings.optimizer, mesh, ema=True)
    with use_mesh(mesh):
        return train_step.lower(state, place_batch(batches()[0], mesh), settings=settings).compile().as_text()


COMPILE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import test_sharding
for mesh_shape in [tuple(map(int, text.split(","))) for text in sys.argv[2:]]:
    print("mesh", mesh_shape, file=sys.stderr, flush=True)
    test_sharding.compiled_step(test_sharding.mesh_of(*mesh_shape), test_sharding.Shape(int(sys.argv[1])).settings)
"""


@pytest.mark.parametrize(
    ("heads", "mesh_shapes"),
    [
        (25, [(2, 2, 2)]),
        pytest.param(12, MESHES, marks=pytest.mark.slow),
        pytest.param(25, MESHES, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nothing_is_laid_out_anew_by_way_of_every_device(heads: int, mesh_shapes: list[tuple[int, int, int]]) -> None:
    """XLA's warning of an "involuntary full rematerialization", which it gives where it finds no better way."""
    environment = {
        **os.environ,
        **{"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"},
        "PYTHONPATH": os.pathsep.join(map(str, (pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[1]))),
    }
    shapes = [",".join(map(str, mesh_shape)) for mesh_shape in mesh_shapes]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(heads), *shapes],
        **{"env": environment, "capture_output": True, "text": True, "check": False, "timeout": 600},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("mesh (") == len(mesh_shapes)
    assert "rematerialization" not in done.stderr.lower()


def test_logits_stay_split_over_the_vocabulary() -> None:
    settings = Shape(4).settings
    # 384 rows of the table, 300 ids and padding: no device has logits, or their gradient, of all of them.
    assert not re.search(r"\[[\d,]*,384\]", compiled_step(mesh_of(2, 2, 2), settings))
    assert re.search(r"\[[\d,]*,384\]", compiled_step(mesh_of(4, 2, 1), settings))  # where there is no need to


def test_parameters_and_optimizer_state_are_split() -> None:
    mesh, settings = mesh_of(2, 2, 2), Shape(4).settings
    state = sharded_init(settings.model, settings.optimizer, 0, mesh, ema=True)
    kernel = state.params["h"]["attn"]["c_attn"]["kernel"]
    assert kernel.shape == (2, 32, 3, 32)
    assert kernel.addressable_shards[0].data.shape == (2, 16, 3, 16)
    wte = state.params["wte"]["embedding"]
    assert wte.addressable_shards[0].data.shape == (192, 16)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert len(moments) == 2
    for leaf in [*moments, state.ema["h"]["attn"]["c_attn"]["kernel"]]:
        assert leaf.sharding == kernel.sharding


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_save_is_restored_into_the_arrays_of_the_first_state(name: str) -> None:
    mesh, settings = mesh_of(2, 2, 2), Shape(4, optimizer=name).settings
    first = sharded_init(settings.model, settings.optimizer, 0, mesh, ema=True)
    abstract = abstract_state(settings.model, settings.optimizer, mesh, ema=True)
    assert jax.tree.structure(abstract) == jax.tree.structure(first)
    for leaf, want in zip(jax.tree.leaves(abstract), jax.tree.leaves(first), strict=True):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


def test_constraints_are_in_the_program_only_within_use_mesh() -> None:
    mesh, settings = mesh_of(4, 1, 2), Shape(4).settings
    tokens = np.zeros((8, 16), np.int32)
    params = sharded_init(settings.model, settings.optimizer, 0, mesh).params

    def constraints() -> int:
        def logits(params: dict, tokens: np.ndarray) -> jax.Array:
            return settings.model.apply({"params": params}, tokens)

        text = jax.jit(logits).lower(params, tokens).as_text()
        return text.count("sharding_constraint") + text.count("@Sharding")

    assert constraints() == 0
    with use_mesh(mesh):
        # Tables, embeddings, final states; in the scanned block the weights, q, k, v, and both ways into and out of
        # attention and MLP.
        assert constraints() >= 20


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        (MeshConfig(3, 1, 1), "mesh.data=3"),
        (MeshConfig(-1, 3, 1), "mesh.fsdp=3"),
        (MeshConfig(2, 2, 1), "make 4 devices of 8"),
    ],
)
def test_mesh_that_does_not_fit_the_devices(config: MeshConfig, fragment: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        make_mesh(config)


@pytest.mark.parametrize(
    ("shape", "config", "fragment"),
    [
        ((8, 1, 1), RunConfig(train=TrainConfig(batch_size=12)), "microbatches = 12 .* = 8; .*that can: 8 or 16"),
        ((4, 2, 1), RunConfig(train=TrainConfig(batch_size=32, microbatches=8)), "= 4 cannot be split"),
        ((1, 1, 8), RunConfig(model=ModelConfig(n_embd=60, n_head=6)), "model.n_embd = 60 .* mesh.tensor = 8; .*: 4"),
        ((1, 8, 1), RunConfig(model=ModelConfig(n_embd=60, n_head=6)), "model.n_embd = 60"),
        ((1, 1, 5), RunConfig(model=ModelConfig(n_embd=1600, n_head=25)), "the padded vocabulary = 50304"),
    ],
)
def test_what_cannot_be_split_is_refused_with_numbers(
    shape: tuple[int, int, int], config: RunConfig, fragment: str
) -> None:
    with pytest.raises(UsageError, match=fragment) as caught:
        check_divisible(config, mesh_of(*shape), vocab_rows=50304)
    assert "nearest" in str(caught.value)


def test_table_refuses_unknown_and_colliding_axes() -> None:
    with pytest.raises(ValueError, match="unknown logical axis 'heds'"):
        partition_spec(("batch", "heds"))
    with pytest.raises(ValueError, match="two dimensions on mesh axis"):
        partition_spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="fsdp"):
        partition_spec(("batch", "embed"))


def test_the_sizes_of_a_mesh_count_slices_into_data() -> None:
    assert mesh_sizes(MeshConfig(-1, 2, 1, dcn_data=2), 8) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(UsageError, match="mesh.dcn_data=3 make 6 devices of 8"):
        mesh_sizes(MeshConfig(1, 2, 1, dcn_data=3), 8)


@pytest.mark.tpu
def test_only_the_outer_part_of_data_crosses_slices() -> None:
    (topology,) = parse_topologies("v5e:2x2*2")
    found = make_mesh(MeshConfig(data=2, fsdp=2, tensor=1, dcn_data=2), devices(topology)).devices
    slices = [[[device.slice_index for device in row] for row in part] for part in found]
    assert slices == [[[0], [0]], [[0], [0]], [[1], [1]], [[1], [1]]]
    with pytest.raises(UsageError, match="the devices are in 2 slices"):
        make_mesh(MeshConfig(data=8), devices(topology))


def test_rows_of_a_batch_are_those_of_the_devices_here() -> None:
    assert own_rows(mesh_of(2, 2, 2), 8) == [*range(8)]


def test_constrain_is_identity_without_a_mesh() -> None:
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", None) is x
