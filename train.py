"""Trains GPT-2: `python train.py --config=configs/quickstart.py`."""

import sys

from gpt2_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
