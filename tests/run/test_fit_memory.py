"""What is recomputed, and in how many parts the loss is computed, by the compiled step's memory."""

import dataclasses

import jax
import numpy as np
import pytest

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.run.fit_memory import lower_train_step, memory_limit, with_memory_fitted
from gpt2_jax.run.step_settings import for_device, make_settings
from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
from gpt2_jax.training.steps import train_step
from gpt2_jax.training.train_state import sharded_init

RATES = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIG = RunConfig(
    model=ModelConfig(n_layer=4, n_head=2, n_embd=32, n_positions=128, vocab_size=300, scan_unroll=1, **RATES),
    optimizer=OptimizerConfig(warmup_steps=0),
    train=TrainConfig(batch_size=4),
    mesh=MeshConfig(data=1),
)
MESH = make_mesh(CONFIG.mesh, jax.devices()[:1])


def with_remat(remat: str, config: RunConfig = CONFIG) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def peak(config: RunConfig) -> int:
    analysis = lower_train_step(config, MESH).compile().memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes


def test_as_little_is_recomputed_as_fits() -> None:
    peaks = {remat: peak(with_remat(remat)) for remat in ("none", "dots", "full")}
    assert peaks["none"] > peaks["dots"] > peaks["full"]
    for limit, remat in (
        (peaks["none"], "none"),
        (peaks["none"] - 1, "dots"),
        (peaks["full"] - 1, "full"),  # nothing fits, the smallest is tried
    ):
        config, told = with_memory_fitted(CONFIG, MESH, limit)
        assert config == with_remat(remat)
        assert told == f"remat {remat}, logits whole"


def test_a_step_that_was_compiled_to_see_its_memory_is_not_compiled_again(caplog: pytest.LogCaptureFixture) -> None:
    model = dataclasses.replace(CONFIG.model, n_embd=24)  # as no other test has it
    with jax.log_compiles():
        config, _ = with_memory_fitted(dataclasses.replace(CONFIG, model=model), MESH, 10**11)
    assert "Compiling jit(train_step)" in caplog.text
    settings = make_settings(config, MESH)
    zeros_BT = np.zeros((4, 128), np.int32)
    with use_mesh(MESH):
        state = sharded_init(settings.model, settings.optimizer, 0, MESH)
        batch = place_batch({"tokens": zeros_BT, "targets": zeros_BT, "weights": np.ones((4, 128), np.float32)}, MESH)
        caplog.clear()
        with jax.log_compiles():
            train_step(state, batch, settings=settings)
    assert "Compiling" not in caplog.text


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_is_configured_stays(remat: str) -> None:
    assert with_memory_fitted(with_remat(remat), MESH, 1)[0] == with_remat(remat)


def test_without_a_limit_nothing_is_recomputed() -> None:
    config, _ = with_memory_fitted(CONFIG, MESH, 0)
    assert config == with_remat("none")
    assert memory_limit(jax.devices("cpu")[0]) == 0


def test_logits_are_whole_where_they_fit_and_in_chunks_where_not() -> None:
    """Those of 4,096 positions and 40,000 ids in float32 are 655 MB, more than without a limit."""
    model = dataclasses.replace(CONFIG.model, n_layer=1, n_positions=1024, vocab_size=40_000, remat="none")
    config = dataclasses.replace(CONFIG, model=model)
    chunk = make_settings(config, MESH).loss_chunk
    assert 0 < chunk < 1024
    whole, told = with_memory_fitted(config, MESH, 10**11)
    assert whole.train.loss_chunk == 1024
    assert told == "remat none, logits whole"
    assert peak(config) < peak(whole)
    chunked, told = with_memory_fitted(config, MESH, peak(whole) - 1)
    assert chunked == config
    assert told == f"remat none, logits in chunks of {chunk} positions"


@pytest.mark.parametrize(("layers", "configured", "unroll"), [(4, 0, 4), (24, 0, 1), (24, 24, 24), (4, 2, 2)])
def test_layers_on_a_cpu_are_scanned_from_24_on(layers: int, configured: int, unroll: int) -> None:
    model = dataclasses.replace(CONFIG.model, n_layer=layers, scan_unroll=configured)
    config, told = for_device(dataclasses.replace(CONFIG, model=model), jax.devices("cpu")[0])
    assert config.model.scan_unroll == unroll
    assert told.endswith("layers one after another" if unroll >= layers else f"layers scanned by {unroll}")
