"""train.py, which notes in a file which windows of the text it reads for which step: lines of `step window`.

python tests/noting_train.py FILE [flags of train.py]
"""

import sys
import threading

from gpt2_jax.cli.train import main
from gpt2_jax.run import run_data

place = threading.local()
notes = open(sys.argv[1], "a", buffering=1)  # noqa: SIM115


class Windows(run_data.PackedWindows):
    """Notes what is read for a batch of training."""

    def __getitem__(self, index):
        if getattr(place, "step", None) is not None:
            notes.write(f"{place.step} {index}\n")
        return super().__getitem__(index)


class Batches(run_data.TrainBatches):
    """Lets the windows know of the step."""

    def batch(self, step):
        place.step = step
        try:
            return super().batch(step)
        finally:
            place.step = None


run_data.PackedWindows, run_data.TrainBatches = Windows, Batches
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
