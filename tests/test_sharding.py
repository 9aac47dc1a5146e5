"""Meshes of forced CPU devices: refusals, layouts, and the same numbers on each of them."""

import dataclasses

import jax
import numpy as np
import pytest

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.sharding import check_divisible, constrain, make_mesh, partition_spec, place_batch, use_mesh
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.steps import StepSettings, eval_step, train_step
from gpt2_jax.training.train_state import TrainState, sharded_init

MODEL = ModelConfig(
    n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=70, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1
)
# A large eps: with a small one, Adam turns the rounding of gradients that are zero into steps.
OPTIMIZER = OptimizerConfig(warmup_steps=2, learning_rate=1e-2, eps=1e-3)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2), (4, 1, 2), (1, 4, 2)]


def settings(*, frugal: bool = False) -> StepSettings:
    """A step; a frugal one accumulates, recomputes and goes through the loss in chunks."""
    schedule = learning_rate_schedule(OPTIMIZER, 10)
    model = GPT2(dataclasses.replace(MODEL, remat="full") if frugal else MODEL)
    parts = {"microbatches": 2, "loss_chunk": 4} if frugal else {}
    return StepSettings(model, _OPTIMIZER, schedule, seed=3, ema_decay=0.5, **parts)


_OPTIMIZER = make_optimizer(OPTIMIZER, 10)


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def train(mesh: jax.sharding.Mesh, chosen: StepSettings) -> tuple[TrainState, TrainState, list[float]]:
    """First state, last state and losses of six steps."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (6, 8, 17)).astype(np.int32)
    weights = rng.random((6, 8, 16)).astype(np.float32)
    first = sharded_init(chosen.model, chosen.optimizer, 0, mesh, ema=True)
    start = jax.device_get(first)
    state, losses = first, []
    with use_mesh(mesh):
        for rows, weight in zip(tokens, weights, strict=True):
            batch = place_batch({"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": weight}, mesh)
            state, metrics = train_step(state, batch, settings=chosen)
            losses.append(float(metrics["loss_sum"]) / float(metrics["weight_sum"]))
        losses.append(float(eval_step(state.params, batch, model=chosen.model)["loss_sum"]))
    return start, jax.device_get(state), losses


@pytest.fixture(scope="module")
def one_device() -> dict[bool, tuple[TrainState, TrainState, list[float]]]:
    return {frugal: train(mesh_of(1, 1, 1), settings(frugal=frugal)) for frugal in (False, True)}


QUICK = {((8, 1, 1), False), ((2, 2, 2), False), ((2, 2, 1), True)}


@pytest.mark.parametrize(
    ("shape", "frugal"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in [*((shape, False) for shape in MESHES), ((2, 2, 1), True), ((1, 2, 2), True)]
    ],
    ids=str,
)
def test_numbers_do_not_depend_on_the_mesh(shape: tuple[int, int, int], frugal: bool, one_device: dict) -> None:
    start, final, losses = train(mesh_of(*shape), settings(frugal=frugal))
    want_start, want_final, want_losses = one_device[frugal]
    jax.tree.map(np.testing.assert_array_equal, start, want_start)
    # Dropout is on: other masks would move all of this by far more.
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(final), jax.tree.leaves(want_final), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)


def test_parameters_and_optimizer_state_are_split() -> None:
    mesh = mesh_of(2, 2, 2)
    chosen = settings()
    state = sharded_init(chosen.model, chosen.optimizer, 0, mesh, ema=True)
    kernel = state.params["h"]["attn"]["c_attn"]["kernel"]
    assert kernel.shape == (2, 32, 3, 32)
    assert kernel.addressable_shards[0].data.shape == (2, 16, 3, 16)
    wte = state.params["wte"]["embedding"]
    assert wte.addressable_shards[0].data.shape == (64, 16)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert len(moments) == 2
    for leaf in [*moments, state.ema["h"]["attn"]["c_attn"]["kernel"]]:
        assert leaf.sharding == kernel.sharding


def test_constraints_are_in_the_program_only_within_use_mesh() -> None:
    mesh = mesh_of(4, 1, 2)
    chosen = settings()
    tokens = np.zeros((8, 16), np.int32)
    params = sharded_init(chosen.model, chosen.optimizer, 0, mesh).params

    def constraints() -> int:
        def logits(params: dict, tokens: np.ndarray) -> jax.Array:
            return chosen.model.apply({"params": params}, tokens)

        text = jax.jit(logits).lower(params, tokens).as_text()
        return text.count("sharding_constraint") + text.count("@Sharding")

    assert constraints() == 0
    with use_mesh(mesh):
        # table, embeddings; in the scanned block q, k, v, the MLP and its output
        assert constraints() >= 7


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
        ((1, 1, 8), RunConfig(), "model.n_head = 12 .* = 8; of 8 devices, the nearest that can: 4"),
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


def test_constrain_is_identity_without_a_mesh() -> None:
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", None) is x
