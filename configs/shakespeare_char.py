"""Tiny Shakespeare by characters, in nanoGPT's GPU setting: 6 layers, width 384, context 256, 65 characters.

    curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python train.py --config=configs/shakespeare_char.py --config.data.source=text:input.txt

16,384 tokens per step, 82 million in all (82 epochs; the best checkpoint, not the last, is the one to keep).

Expected, not measured here: nanoGPT publishes a best held-out loss of 1.4697 after 3 minutes on an A100
(karpathy/nanoGPT). On two CPU cores it takes hours: use shakespeare_char_cpu.py there.
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
                n_layer=6, n_head=6, n_embd=384, n_positions=256, embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2
            ),
            tokenizer=TokenizerConfig(name="chars"),
            data=DataConfig(source="text:input.txt", held_out=0.1),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, b2=0.99),
            train=TrainConfig(steps=5000, batch_size=64, log_every=50, eval_every=250),
            checkpoint=CheckpointConfig(every=250),
        )
    )
