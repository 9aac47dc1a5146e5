"""GPT-2 1558M, also called XL (48 layers, width 1600, 25 heads) on 34 billion tokens of FineWeb.

    python train.py --config=configs/gpt2_1558m.py

Data, once (a third of sample/100BT is enough: 95 GB of parquet, then 70 GB of tokens):

    pip install huggingface_hub
    hf download HuggingFaceFW/fineweb --repo-type dataset --include 'sample/100BT/00[0-4]_*.parquet' --local-dir fineweb
    gpt2-jax prepare --source 'parquet:fineweb/sample/100BT/*.parquet' --tokenizer gpt2 \
        --held_out 0.001 --out tokens/fineweb-100BT

1,048,576 tokens per step, 33.6 billion in all. Parameters and optimizer state are split over all devices; microbatches
of 64 windows suit 8 to 64 devices; mesh.fsdp divides 1600 and the microbatch. With 25 heads, mesh.tensor is 1.

Expected, not measured here: llm.c takes 2.75 s per step on 8 H100, 24 hours in all, for HellaSwag and loss at the level
of OpenAI's weights (karpathy/llm.c discussion 677); those have a loss of 2.54 on OpenWebText (karpathy/nanoGPT).
"""

from gpt2_jax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
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
                n_layer=48,
                n_head=25,
                n_embd=1600,
                remat="full",
                n_positions=1024,
                vocab_size=50257,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
                dtype="bfloat16",
            ),
            tokenizer=TokenizerConfig(name="gpt2"),
            data=DataConfig(source="tokens:tokens/fineweb-100BT", held_out=0.001),
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=700, end_fraction=0.0),
            train=TrainConfig(steps=32_000, batch_size=1024, microbatches=16, eval_windows=2048),
            checkpoint=CheckpointConfig(every=1000),
            mesh=MeshConfig(data=1, fsdp=-1),
        )
    )
