"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), exactly.

The parameters are a nested dict under GPT-2's names, kernels `[in, out]`, layers stacked on a leading axis:

    wte/embedding [V', D]   wpe/embedding [P, D]   ln_f/{scale, bias} [D]
    h/ln_1, h/ln_2 {scale, bias} [L, D]
    h/attn/c_attn {kernel [L, D, 3, D], bias [L, 3, D]}   (queries, keys, values on the axis of 3)
    h/attn/c_proj {kernel [L, D, D], bias [L, D]}
    h/mlp/c_fc {kernel [L, D, F], bias [L, F]}   h/mlp/c_proj {kernel [L, F, D], bias [L, D]}

Two options are not GPT-2's, for models that were trained so elsewhere: GELU by erf, and no biases (`ModelConfig`).

Shapes: B batch, T length, D width, F = 4D, V vocabulary, V' vocabulary padded to a multiple of 128, P positions,
L layers.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.attention_kernels import attention_saveable
from gpt2_jax.model.block import Block
from gpt2_jax.model.layers import LayerNorm, as_rows, dropout, parameter
from gpt2_jax.sharding import constrain, relayout, sequence_axis

Params = dict[str, Any]

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, attention_saveable
    ),
    "full": None,
}


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the token table: a multiple of 128, whatever the mesh, so that tensor parallelism can split them."""
    return -(-vocab_size // 128) * 128


def logits_from_hidden(x: jax.Array, wte_VD: jax.Array, vocab_size: int, *, rounded: bool = False) -> jax.Array:
    """Scores `[..., V']` of the tied output head, in float32 or wider; those of padding rows are -inf.

    Args:
      x: final hidden states `[..., D]`, in the type of the matrix product.
      wte_VD: token table with its padding rows.
      vocab_size: rows that are tokens.
      rounded: leave them in the type of `x`. Of 16 bits, they and their gradient take half the memory and its time.
    """
    dtype = x.dtype if rounded else jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum("...d,vd->...v", x, wte_VD.astype(x.dtype), preferred_element_type=dtype)
    if vocab_size == len(wte_VD):
        return logits
    real_V = jnp.arange(len(wte_VD)) < vocab_size
    return jnp.where(jnp.expand_dims(real_V, range(x.ndim - 1)), logits, -jnp.inf)


class _Table(nn.Module):
    """A lookup table whose rows from `used` on are padding, zero at the start."""

    rows: int
    used: int
    width: int
    std: float
    axes: tuple[str, str]

    def setup(self) -> None:
        def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
            drawn = self.std * jax.random.normal(key, (self.used, self.width), dtype)
            return jnp.pad(drawn, ((0, self.rows - self.used), (0, 0)))

        self.embedding = parameter(self, "embedding", init, self.axes, (self.rows, self.width))


class GPT2(nn.Module):
    """Decoder-only transformer with learned positions, pre-LayerNorm blocks and an output head tied to `wte`.

    Attributes:
      config: shape and arithmetic; `vocab_size` must be set (not 0).
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        rows = padded_vocab_size(config.vocab_size)
        self.wte = _Table(rows, config.vocab_size, config.n_embd, config.initializer_range, ("vocab", "embed"))
        # Half the spread of the tokens, as OpenAI's code has it.
        wpe_std = config.initializer_range / 2
        self.wpe = _Table(config.n_positions, config.n_positions, config.n_embd, wpe_std, ("positions", "embed"))
        self.h = nn.scan(
            self._block(scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=0,
            length=config.n_layer,
            unroll=min(max(1, config.scan_unroll), config.n_layer),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.ln_f = LayerNorm(config.layer_norm_epsilon, jnp.dtype(config.dtype), config.bias)

    def embed(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, token_rows_BTD: jax.Array | None = None
    ) -> jax.Array:
        """The residual stream before the first layer, `[B, T, D]`; B of the positions may be 1.

        `token_rows_BTD` are the tokens' rows of the table, where they have been looked up already.
        """
        dtype = jnp.dtype(self.config.dtype)
        if token_rows_BTD is None:
            # Along whole rows: XLA handles a table that is split along its width badly.
            token_rows_BTD = constrain(self.wte.embedding, "vocab", None)[tokens_BT]
        wpe_PD = relayout(self.wpe.embedding, (None, None), ("positions", "embed"))
        split, whole = ("batch", sequence_axis(tokens_BT.shape[1]), None), ("batch", "length", None)
        # Each device looks up the ids that it has; the sum over devices is then split along the context.
        x_BTD = relayout(constrain(token_rows_BTD.astype(dtype), *whole), split, whole)
        return x_BTD + constrain(wpe_PD[positions_BT].astype(dtype), None, split[1], None)

    def normalize(self, x_BTD: jax.Array) -> jax.Array:
        """The final hidden states of the residual stream after the last layer."""
        split = ("batch", sequence_axis(x_BTD.shape[1]), None)
        return relayout(self.ln_f(x_BTD), ("batch", "length", None), split)

    def hidden_states(
        self, tokens_BT: jax.Array, token_rows_BTD: jax.Array | None = None, *, deterministic: bool = True
    ) -> jax.Array:
        """Final hidden states `[B, T, D]` of token ids; `deterministic=False` wants a "dropout" key. See `embed`."""
        x_BTD = self.embed(tokens_BT, jnp.arange(tokens_BT.shape[1])[None], token_rows_BTD)
        first_key, keys_L = None, None
        if not deterministic:
            first_key, *rest = jax.random.split(self.make_rng("dropout"), 1 + self.config.n_layer)
            keys_L = jnp.stack(rest)
        x_BTD = dropout(x_BTD, self.config.embd_pdrop, first_key)
        return self.normalize(self._through_layers(x_BTD, keys_L))

    def _block(self, *, scanned: bool) -> type[Block]:
        config = self.config
        if config.remat not in _REMAT_POLICIES:
            return Block
        # In a scan, passes are programs of their own; else XLA would merge what is recomputed with what it repeats.
        return nn.remat(Block, policy=_REMAT_POLICIES[config.remat], prevent_cse=not scanned)

    def _through_layers(self, x_BTD: jax.Array, keys_L: jax.Array | None) -> jax.Array:
        L = self.config.n_layer
        if self.is_initializing() or self.config.scan_unroll < L:
            x_BTD, _ = self.h(x_BTD, keys_L)
            return x_BTD
        # One after another, each with arrays of its own: `split`, unlike a slice, is cheap to differentiate.
        leaves, structure = jax.tree.flatten(self.variables["params"]["h"])
        block = self._block(scanned=False)(self.config, parent=None)
        for layer, parts in enumerate(zip(*(jax.lax.split(leaf, (1,) * L) for leaf in leaves), strict=True)):
            params = jax.tree.unflatten(structure, [part[0] for part in parts])
            x_BTD, _ = block.apply({"params": params}, x_BTD, None if keys_L is None else keys_L[layer])
        return x_BTD

    def __call__(self, tokens_BT: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits `[B, T, V]` in float32 (float64 if that is the dtype) of the token that follows each position.

        Args:
          tokens_BT: ids from 0 to vocab_size - 1, at most n_positions per row.
          deterministic: no dropout; False wants `rngs={"dropout": key}`.
        """
        x_BTD = self.hidden_states(tokens_BT, deterministic=deterministic)
        V = self.config.vocab_size
        logits = logits_from_hidden(as_rows(x_BTD), self.wte.embedding, V)
        return logits[..., :V].reshape(*tokens_BT.shape, V)


def boxed_init(model: GPT2, key: jax.Array) -> Params:
    """Random parameters that still carry their logical axes (Flax boxes), as `sharding.tree_shardings` wants them."""
    return dict(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def init_params(model: GPT2, key: jax.Array) -> Params:
    """Random parameters as a nested dict of arrays: normal(0.02), residual projections / sqrt(2 n_layer)."""
    return nn.unbox(boxed_init(model, key))


@functools.lru_cache(maxsize=16)
def parameter_count(config: ModelConfig) -> int:
    """Parameters of the published model (padding rows not counted), from shapes alone."""
    shapes = jax.eval_shape(lambda: init_params(GPT2(config), jax.random.key(0)))
    stored = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return stored - (padded_vocab_size(config.vocab_size) - config.vocab_size) * config.n_embd
