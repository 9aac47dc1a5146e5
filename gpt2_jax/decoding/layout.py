"""A model laid out for decoding: weights unstacked once, in the type that suits the device, over a mesh or not."""

import contextlib
import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from gpt2_jax.config import MeshConfig, ModelConfig
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import GPT2, Params, boxed_init, padded_vocab_size
from gpt2_jax.model.unrolled import unstack
from gpt2_jax.sharding import check_model_divisible, make_mesh, tree_shardings, use_mesh

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Make one with `make_decoder`.

    Attributes:
      model: the module, in the type that decoding computes in.
      weights: from `unrolled.unstack`.
      vocab_size: ids that may be drawn.
      mesh: devices, or None for one.
    """

    model: GPT2
    weights: Params
    vocab_size: int
    mesh: Mesh | None

    @property
    def row_shards(self) -> int:
        """Devices among which the rows of a batch are split; their number must be a multiple of it."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def on_mesh(self) -> contextlib.AbstractContextManager[None]:
        """Around each call of a compiled function."""
        return _on(self.mesh)


def make_decoder(
    config: ModelConfig, params: Params, vocab_size: int, *, mesh: Mesh | None = None, dtype: str = ""
) -> Decoder:
    """Brings the parameters into the layout and type of decoding; what is so already is shared, the rest copied.

    Args:
      config: the model's.
      params: its parameters, wherever they are; not to be donated while the decoder is in use.
      vocab_size: ids that may be drawn: the tokenizer's, since those beyond have no text.
      mesh: devices; default: the one that holds the parameters.
      dtype: of the arithmetic and the cache; default: float32 on a CPU, where products of one token are ten times
        slower in bfloat16, elsewhere `config.dtype`.

    Raises:
      UsageError: an unknown type, or a mesh that cannot split the model evenly.
    """
    if dtype not in ("", *DTYPES):
        raise UsageError(f"dtype={dtype}; allowed: {', '.join(DTYPES)}")
    device = jax.tree.leaves(params)[0].devices().pop() if mesh is None else mesh.devices.flat[0]
    config = dataclasses.replace(
        config, dtype=dtype or ("float32" if device.platform == "cpu" else config.dtype), remat="none"
    )
    if mesh is not None:
        check_model_divisible(config, mesh, padded_vocab_size(config.vocab_size))
        boxed = jax.eval_shape(lambda: boxed_init(GPT2(config), jax.random.key(0)))
        params = jax.device_put(params, tree_shardings(boxed, mesh))
    flat = mesh is None or mesh.shape["tensor"] == 1
    with _on(mesh):
        weights = unstack(params, config, flat=flat)
    return Decoder(GPT2(config), weights, min(vocab_size, config.vocab_size), mesh)


def decoding_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over the first of `devices`, as many as `config` asks for. Raises UsageError when there are fewer."""
    wanted = config.data * config.fsdp * config.tensor
    if wanted > len(devices):
        raise UsageError(f"{wanted} devices asked for; {len(devices)} here ({devices[0].platform})")
    return make_mesh(config, devices[:wanted])


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if mesh is None else use_mesh(mesh)
