"""GPT-2 124M, fine-tuned on your text from weights that are there already.

    pip install huggingface_hub && hf download openai-community/gpt2 --local-dir gpt2
    python train.py --config=configs/finetune_124m.py --config.init_from=gpt2 --config.data.source='text:my/*.txt'

`init_from` is a folder with a GPT-2 as transformers saves it, or a run folder; other formats come in by `gpt2-jax
import`. Another size needs its shape: `--config.model.n_layer=6` for DistilGPT2, say; what differs is named.

The rate is a twentieth of pre-training's, and windows are of 256 tokens, a quarter of the context: a step then takes
less than a quarter of the time and memory. The position table keeps its 1,024 rows. Rows from 256 on get no gradient
and, as there is no weight decay here, stay what they were, bit for bit; the model still takes 1,024 tokens, but beyond
256 it is tuned only in the weights that all positions share. `--config.train.context_length=1024` tunes them all.

2,048 tokens per step, 410 thousand in all. The held-out loss before the first step is not measured: stop by the curve.
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
            init_from="gpt2",
            model=ModelConfig(n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257),
            tokenizer=TokenizerConfig(name="gpt2"),
            data=DataConfig(source="text:input.txt", held_out=0.1),
            optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=20, weight_decay=0.0, end_fraction=0.0),
            train=TrainConfig(steps=200, batch_size=8, context_length=256, eval_every=50, log_every=10),
            checkpoint=CheckpointConfig(every=50),
        )
    )
