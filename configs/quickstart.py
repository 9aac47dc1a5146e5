"""Quick start."""

from gpt2_jax.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from gpt2_jax.config_file import config_dict


def get_config():
    return config_dict(
        RunConfig(
            model=ModelConfig(
                n_layer=4, n_head=4, n_embd=256, n_positions=256, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
            ),
            tokenizer=TokenizerConfig(name="bpe:2048"),
            data=DataConfig(source="stdlib", held_out=0.05),
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
            train=TrainConfig(steps=600, batch_size=16, eval_every=200, eval_windows=64),
            checkpoint=CheckpointConfig(every=200),
        )
    )
