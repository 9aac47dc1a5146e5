"""GPT-2 124M (12 layers, width 768, 12 heads) on 10 billion tokens of FineWeb.

    python train.py --config=configs/gpt2_124m.py

Data, once (28 GB of parquet, then 20 GB of tokens):

    pip install huggingface_hub
    hf download HuggingFaceFW/fineweb --repo-type dataset --include 'sample/10BT/*.parquet' --local-dir fineweb
    gpt2-jax prepare --source 'parquet:fineweb/sample/10BT/*.parquet' --tokenizer gpt2 \
        --held_out 0.001 --out tokens/fineweb-10BT

524,288 tokens per step, 9.96 billion in all: one pass. The batch goes through one GPU in 32 microbatches of 16 windows;
on more devices set train.microbatches so that 512 / microbatches is a multiple of mesh.data x mesh.fsdp.

Expected, not measured here: llm.c trains this shape on these tokens to a validation loss of 3.29 in 90 minutes on 8
A100 (0.3 s per step; karpathy/llm.c discussion 481). OpenAI's own weights have 3.29 on FineWeb-Edu
(karpathy/build-nanogpt) and 3.12 on OpenWebText (karpathy/nanoGPT).
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
                n_layer=12,
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
            train=TrainConfig(steps=19_000, batch_size=512, microbatches=32, eval_windows=2048),
            checkpoint=CheckpointConfig(every=1000),
        )
    )
