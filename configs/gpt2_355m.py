"""GPT-2 355M (24 layers, width 1024, 16 heads) on 31 billion tokens of FineWeb.

    python train.py --config=configs/gpt2_355m.py

Data, once (a third of sample/100BT is enough: 90 GB of parquet, then 65 GB of tokens):

    pip install huggingface_hub
    hf download HuggingFaceFW/fineweb --repo-type dataset --include 'sample/100BT/00[0-4]_*.parquet' --local-dir fineweb
    gpt2-jax prepare --source 'parquet:fineweb/sample/100BT/*.parquet' --tokenizer gpt2 \
        --held_out 0.001 --out tokens/fineweb-100BT

524,288 tokens per step, 31.5 billion in all. 64 microbatches of 8 windows on one GPU; see gpt2_124m.py for more.

Expected, not measured here: llm.c takes 0.82 s per step on 8 A100 (scripts/run_gpt2_350M.sh), 5.8 hours in all on 8
H100, for a FineWeb validation loss of 2.92 (KellerJordan/modded-nanogpt, track 2).
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
                n_layer=24,
                n_head=16,
                n_embd=1024,
                n_positions=1024,
                vocab_size=50257,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
                dtype="bfloat16",
            ),
            tokenizer=TokenizerConfig(name="gpt2"),
            data=DataConfig(source="tokens:tokens/fineweb-100BT", held_out=0.001),
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=700, end_fraction=0.0),
            train=TrainConfig(steps=60_000, batch_size=512, microbatches=64, eval_windows=2048),
            checkpoint=CheckpointConfig(every=1000),
        )
    )
