"""GPT-2 774M (36 layers, width 1280, 20 heads) on 31 billion tokens of FineWeb.

    python train.py --config=configs/gpt2_774m.py

Data, once (a third of sample/100BT is enough: 90 GB of parquet, then 65 GB of tokens):

    pip install huggingface_hub
    hf download HuggingFaceFW/fineweb --repo-type dataset --include 'sample/100BT/00[0-4]_*.parquet' --local-dir fineweb
    gpt2-jax prepare --source 'parquet:fineweb/sample/100BT/*.parquet' --tokenizer gpt2 \
        --held_out 0.001 --out tokens/fineweb-100BT

524,288 tokens per step, 31.5 billion in all. Parameters and optimizer state are split over all devices (mesh.fsdp);
microbatches of 32 windows suit 8 devices.

Expected, not measured here: llm.c takes 1.7 s per step on 8 A100 (scripts/run_gpt2_774M.sh), 28 hours in all. OpenAI's
own weights have a loss of 2.67 on OpenWebText (karpathy/nanoGPT).
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
                n_layer=36,
                n_head=20,
                n_embd=1280,
                remat="dots",
                n_positions=1024,
                vocab_size=50257,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
                dtype="bfloat16",
            ),
            tokenizer=TokenizerConfig(name="gpt2"),
            data=DataConfig(source="tokens:tokens/fineweb-100BT", held_out=0.001),
            optimizer=OptimizerConfig(learning_rate=2.5e-4, warmup_steps=700, end_fraction=0.0),
            train=TrainConfig(steps=60_000, batch_size=512, microbatches=16, eval_windows=2048),
            checkpoint=CheckpointConfig(every=1000),
            mesh=MeshConfig(data=1, fsdp=-1),
        )
    )
