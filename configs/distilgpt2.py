"""DistilGPT2's shape (6 layers, width 768, 12 heads; 81,912,576 parameters), trained from the text alone.

    python train.py --config=configs/distilgpt2.py

Data, once (28 GB of parquet, then 20 GB of tokens):

    pip install huggingface_hub
    hf download HuggingFaceFW/fineweb --repo-type dataset --include 'sample/10BT/*.parquet' --local-dir fineweb
    gpt2-jax prepare --source 'parquet:fineweb/sample/10BT/*.parquet' --tokenizer gpt2 \
        --held_out 0.001 --out tokens/fineweb-10BT

524,288 tokens per step, 9.96 billion in all: one pass. 16 microbatches of 32 windows on one GPU; see gpt2_124m.py.

Expected, not measured here: about six tenths of the time of gpt2_124m.py, by its arithmetic. The published DistilGPT2
was distilled from GPT-2 124M, not trained so; its card gives perplexity 21.1 on WikiText-103 against 16.3.
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
                n_layer=6,
                n_head=12,
                n_embd=768,
                n_positions=1024,
                vocab_size=50257,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
                dtype="bfloat16",
            ),
            tokenizer=TokenizerConfig(name="gpt2"),
            data=DataConfig(source="tokens:tokens/fineweb-10BT", held_out=0.001),
            optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700, end_fraction=0.0),
            train=TrainConfig(steps=19_000, batch_size=512, microbatches=16, eval_windows=2048),
            checkpoint=CheckpointConfig(every=1000),
        )
    )
