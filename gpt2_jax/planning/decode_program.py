"""The real decode step over a mesh, lowered from shapes alone."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_jax.config import ModelConfig, RunConfig
from gpt2_jax.decoding.decoder import DecodeState, Ended, Plan, Request, advance
from gpt2_jax.decoding.settings import Sampling
from gpt2_jax.model.gpt2 import GPT2, boxed_init, padded_vocab_size
from gpt2_jax.model.kv_cache import empty_cache
from gpt2_jax.model.unrolled import unstack
from gpt2_jax.sharding import check_model_divisible, partition_spec, tree_shardings, use_mesh


def lower_decode(config: RunConfig, mesh: Mesh, rows_per_shard: int = 1) -> jax.stages.Lowered:
    """One token per row, with a cache of the whole context: `decoder.advance` with one step and top-p sampling.

    Args:
      config: of a run; its vocabulary filled in.
      mesh: whose data and fsdp axes split the rows.
      rows_per_shard: rows per part of the batch.

    Raises:
      UsageError: the mesh cannot split the model evenly.
    """
    check_model_divisible(config.model, mesh, padded_vocab_size(config.model.vocab_size))
    model_config = dataclasses.replace(config.model, remat="none")
    rows = rows_per_shard * mesh.shape["data"] * mesh.shape["fsdp"]
    key_type = jax.random.key(0).dtype
    sampling = Sampling(temperature=0.8, top_p=0.95)
    sampled = sampling.values(model_config.vocab_size, padded_vocab_size(model_config.vocab_size))

    def request(keys_B: Any) -> Request:
        return Request(
            key_B=keys_B,
            sampling=jax.tree.map(jnp.asarray, sampled),
            stop_ids_N=jnp.zeros(1, jnp.int32),
            max_tokens_B=jnp.zeros(rows, jnp.int32),
        )

    def state() -> DecodeState:
        return DecodeState(
            cache=empty_cache(model_config, rows, model_config.n_positions),
            token_B=jnp.zeros(rows, jnp.int32),
            count_B=jnp.zeros(rows, jnp.int32),
            ended_B=jnp.full(rows, Ended.NOT_YET, jnp.int32),
            history=None,
        )

    requested = _placed(jax.eval_shape(request, jax.ShapeDtypeStruct((rows,), key_type)), mesh, rows)
    weights = _weights(model_config, mesh)
    plan = Plan(GPT2(model_config), model_config.vocab_size)
    with use_mesh(mesh):  # which decides how many heads the cache has
        states = _placed(jax.eval_shape(state), mesh, rows)
        return advance.lower(weights, states, requested, plan=plan, steps=1)


def _weights(config: ModelConfig, mesh: Mesh) -> Any:
    """As `make_decoder` lays them out: each layer of a stacked parameter as that is, without its first axis."""
    boxed = jax.eval_shape(lambda: boxed_init(GPT2(config), jax.random.key(0)))
    flat = mesh.shape["tensor"] == 1
    shapes: Any = jax.eval_shape(lambda params: unstack(params, config, flat=flat), nn.unbox(boxed))
    stacked = tree_shardings(boxed, mesh)

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        sharding = stacked
        for name in names:
            sharding = sharding[name]
        spec = sharding.spec
        if names[0] == "h":
            spec = PartitionSpec(*spec[1:][: leaf.ndim])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def _placed(tree: Any, mesh: Mesh, rows: int) -> Any:
    """Caches by rows and heads, whatever else has rows by these, the rest on all devices."""
    axes = ("batch", "heads", "length", "head_dim")

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names: tuple[str | None, ...] = (None,) * leaf.ndim
        if leaf.ndim >= 3:
            names = axes[-leaf.ndim :]
        elif leaf.ndim and leaf.shape[0] == rows:
            names = ("batch", *names[1:])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition_spec(names)))

    return jax.tree.map(place, tree)
