"""A device without room: one line with what takes it and what makes it smaller."""

import contextlib
import re
from collections.abc import Iterator

import jax

from gpt2_jax.config import RunConfig
from gpt2_jax.errors import Gpt2JaxError


@contextlib.contextmanager
def out_of_memory_told(config: RunConfig) -> Iterator[None]:
    """A block in which the devices work for the run, its choices made.

    Raises:
      Gpt2JaxError: for XLA's error that memory is exhausted.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        train = config.train
        smaller = "" if config.model.remat == "full" else "or give --config.model.remat=full, "
        asked = re.search(r"allocat\w* (?:of )?([0-9.]+ ?\w*)", str(error))
        raise Gpt2JaxError(
            f"out of memory on the devices{f' ({asked[1]} asked for at once)' if asked else ''}: "
            f"train.batch_size={train.batch_size} windows of {config.context_length} tokens, "
            f"train.microbatches={train.microbatches}, model.remat={config.model.remat}; raise train.microbatches, "
            f"{smaller}or share the model out by mesh.fsdp; gpt2-jax plan --analytic estimates "
            "what it takes"
        ) from error
