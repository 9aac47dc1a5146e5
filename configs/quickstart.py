"""Quick start: a small GPT-2 on the Python sources of the running interpreter's own library.

    python train.py --config=configs/quickstart.py

2,048 tokens per step, 1.6 million in all (0.4 epochs), by 2,048 merges learned from the text.
Measured on two cores of a Xeon, tokenizing and compiling included: 3.5 minutes, held-out loss 3.4 (docs/numbers.md).
"""

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
                n_layer=4, n_head=4, n_embd=128, n_positions=128, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
            ),
            tokenizer=TokenizerConfig(name="bpe:2048"),
            data=DataConfig(source="stdlib", held_out=0.05),
            optimizer=OptimizerConfig(name="muon", learning_rate=4e-3, warmup_steps=100),
            train=TrainConfig(
                steps=800, batch_size=16, log_every=20, eval_every=200, eval_windows=256, sample_every=400
            ),
            checkpoint=CheckpointConfig(every=200),
        )
    )
