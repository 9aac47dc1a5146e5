"""How much memory does the loss over chunks take, for a large vocabulary over a small one?

    python -m benchmarks.memory

The train step of 8 rows of 1,024 tokens (12 layers of width 768) is compiled for the CPU with `train.loss_chunk` as a
run chooses it; counted are the compiler's temporary bytes less the gradient of the token table, which every loss needs.
Nothing is run. Prints a table and a JSON line. (The peak of a whole step beside torch's: `benchmarks.train`, side
gpt2_jax-system-malloc.)
"""

import argparse
from typing import Any

import jax

from benchmarks.report import print_json
from gpt2_jax.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.run.fit_memory import lower_train_step
from gpt2_jax.run.step_settings import make_settings
from gpt2_jax.sharding import make_mesh


def temporary_bytes(vocab_size: int, layers: int) -> tuple[int, int]:
    """Of the compiled step, less the table's gradient; and the chunk."""
    model = ModelConfig(n_layer=layers, vocab_size=vocab_size, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    config = RunConfig(
        model=model, optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"), train=TrainConfig(batch_size=8)
    )
    mesh = make_mesh(config.mesh)
    analysis: Any = lower_train_step(config, mesh).compile().memory_analysis()
    table = padded_vocab_size(vocab_size) * model.n_embd * 4
    return analysis.temp_size_in_bytes - table, make_settings(config, mesh).loss_chunk


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    small, _ = temporary_bytes(1024, flags.layers)
    large, chunk = temporary_bytes(50304, flags.layers)
    print(f"1,024 ids    {small / 1e6:,.0f} MB")
    print(f"50,304 ids   {large / 1e6:,.0f} MB, chunks of {chunk} positions")
    print(f"ratio        {large / small:.2f}")
    print_json("memory", small=small, large=large, chunk=chunk, ratio=large / small)


if __name__ == "__main__":
    main()
