"""GPT-3 175B (96 layers, width 12288, 96 heads, context 2048), for planning: what would it take?

    gpt2-jax plan --config=configs/gpt3_175b.py --topology=v5p:8x8x8
    python train.py --config=configs/gpt3_175b.py --workdir=gs://BUCKET/runs/gpt3    # on such a slice

Shape, batch, rate and tokens are those of Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1:
3.2 million (here 3,145,728 tokens per step, 1536 windows of 2048), 300 billion in all. GPT-3 alternates dense and
banded attention; here it is dense. The mesh suits 512 devices; on others set mesh.tensor and train.microbatches.
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
                n_layer=96,
                n_head=96,
                n_embd=12288,
                remat="full",
                n_positions=2048,
                vocab_size=50257,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
                dtype="bfloat16",
            ),
            tokenizer=TokenizerConfig(name="gpt2"),
            data=DataConfig(source="tokens:tokens/fineweb", held_out=0.001),
            optimizer=OptimizerConfig(learning_rate=6e-5, warmup_steps=120, end_fraction=0.1),
            train=TrainConfig(steps=95_400, batch_size=1536, microbatches=6, eval_windows=2048),
            checkpoint=CheckpointConfig(every=500),
            mesh=MeshConfig(data=1, fsdp=-1, tensor=8),
        )
    )
