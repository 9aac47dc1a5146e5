"""What the loop does besides training."""

import dataclasses
import io
import math
import pathlib

import jax
import pytest

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig, TrainConfig
from gpt2_jax.model.gpt2 import GPT2, init_params
from gpt2_jax.run.actions import Sample
from gpt2_jax.run.progress import Progress
from gpt2_jax.sharding import make_mesh, use_mesh
from gpt2_jax.tokenizer import make_tokenizer
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import TrainState, sharded_state

CONFIG = RunConfig(
    model=ModelConfig(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=257),
    tokenizer=TokenizerConfig(name="bytes"),
    train=TrainConfig(steps=200),
)
MODEL = GPT2(CONFIG.model)


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"data": 1}, marks=pytest.mark.slow),
        pytest.param({"data": 4}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
)
def test_samples_come_from_the_averaged_parameters(tmp_path: pathlib.Path, axes: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])
    optimizer = make_optimizer(OptimizerConfig(), 200)
    tokenizer = make_tokenizer("bytes")

    def plain(seed: int) -> TrainState:
        # Widened, so that the parameters decide the text and not the noise alone.
        params = jax.tree.map(lambda leaf: 20 * leaf, init_params(MODEL, jax.random.key(seed)))
        return sharded_state(MODEL, optimizer, params, mesh)

    def text(name: str, of: TrainState) -> str:
        (tmp_path / name).mkdir()
        progress = Progress(0, 200, io.StringIO())
        sample = Sample(CONFIG, MODEL, mesh, tokenizer, 256, tmp_path / name, progress)
        with use_mesh(mesh):
            sample(7, of)
        return (tmp_path / name / "samples" / "step_0000007.txt").read_text(encoding="utf-8")

    averaged = text("averaged", dataclasses.replace(plain(0), ema=plain(1).params))
    assert averaged == text("average", plain(1))
    assert averaged != text("raw", plain(0))
