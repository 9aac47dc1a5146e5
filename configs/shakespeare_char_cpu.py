"""Tiny Shakespeare by characters, small enough for a CPU: nanoGPT's CPU shape, with GPT-2's biases and GELU.

    curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python train.py --config=configs/shakespeare_char_cpu.py --config.data.source=text:input.txt

768 tokens per step, 1.5 million in all (1.5 epochs). Measured on two cores: held-out loss 1.60 on the whole tail of
111,540 characters, 1.91 after 350 steps, at 80 ms a step on a Xeon (docs/numbers.md). nanoGPT publishes 1.88 on
20 random batches of it. Evaluation, samples and exports use the average of the parameters of about the last 30 steps.
Rate, schedule, b1 and initial weights were chosen for Muon. AdamW was measured with a cosine from 8e-3 to 2e-4 after
100 steps, b1 0.9, initializer_range 0.02 and no average: 1.76.
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
                n_layer=4,
                n_head=4,
                n_embd=128,
                n_positions=64,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
                initializer_range=0.05,
            ),
            tokenizer=TokenizerConfig(name="chars"),
            data=DataConfig(source="text:input.txt", held_out=0.1),
            optimizer=OptimizerConfig(
                name="muon",
                learning_rate=1.6e-2,
                schedule="inverse_sqrt",
                warmup_steps=50,
                b1=0.8,
                b2=0.99,
                ema_decay=0.97,
            ),
            train=TrainConfig(steps=2000, batch_size=12, log_every=50, eval_every=500),
            checkpoint=CheckpointConfig(every=500),
        )
    )
