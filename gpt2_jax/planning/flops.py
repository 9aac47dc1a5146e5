"""Arithmetic of a training step, counted from the config: every matrix product that a chip does.

The compiler's own count sees the body of a scan over layers once, and nothing of a kernel, so it is not used.

Shapes: B rows of a microbatch on a chip, T context length, N = B*T, D width, H heads and K their dimension, V' rows of
the padded token table; H and V', and 4D, are those of a chip where tensor parallelism splits them.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from gpt2_jax.config import ModelConfig, RunConfig
from gpt2_jax.model.attention_kernels import KERNELS
from gpt2_jax.model.gpt2 import padded_vocab_size

PASSES = ("forward", "backward", "recompute")
PARTS = ("projections", "attention", "head")


@dataclasses.dataclass(frozen=True)
class Product:
    """`times` products of an m x k with a k x n matrix, on one chip and in one step.

    Attributes:
      step_pass: forward, backward or recompute.
      part: projections (c_attn, c_proj, c_fc, c_proj), attention (scores and values) or head (logits).
      share: of the product that is computed: a kernel leaves out blocks that the causal mask hides.
    """

    step_pass: str
    part: str
    times: int
    m: int
    k: int
    n: int
    share: float = 1.0

    @property
    def flops(self) -> float:
        """A multiplication and an addition are two."""
        return 2.0 * self.times * self.share * self.m * self.k * self.n

    def padded_flops(self, tile: int) -> float:
        """What a matrix unit of `tile` x `tile` is busy for: the inner dimension and one other fill whole tiles."""
        m, k, n = (-(-size // tile) * tile for size in (self.m, self.k, self.n))
        return 2.0 * self.times * self.share * k * min(m * self.n, self.m * n)


def step_products(config: RunConfig, mesh_shape: Mapping[str, int], loss_chunk: int = 0) -> tuple[Product, ...]:
    """All products of one training step on one chip.

    Args:
      config: with `model.vocab_size` filled in; `model.remat` and `model.attention` decide what is computed again.
      mesh_shape: devices along data, fsdp and tensor; see `sharding.make_mesh`.
      loss_chunk: not 0 if the loss goes through the logits in chunks, which computes them again backwards.
    """
    model, microbatches = config.model, config.train.microbatches
    T = config.context_length
    B = config.train.batch_size // microbatches // (mesh_shape["data"] * mesh_shape["fsdp"])
    layer = _layer(model, B, T, mesh_shape["tensor"])
    rows = padded_vocab_size(model.vocab_size) // mesh_shape["tensor"]
    head = Product("forward", "head", 1, B * T, model.n_embd, rows)
    again = _recomputed(layer, model)
    layers = [*layer, *_backward(layer), *again]
    logits = [head, *_backward([head]), *([_of_pass(head, "recompute")] if loss_chunk not in (0, T) else [])]
    return tuple(
        dataclasses.replace(product, times=product.times * number * microbatches)
        for products, number in ((layers, model.n_layer), (logits, 1))
        for product in products
    )


def is_fused(model: ModelConfig) -> bool:
    """Whether attention is a kernel, which writes no scores to memory."""
    return model.attention in KERNELS


def visible_share(model: ModelConfig, T: int) -> float:
    """The share of the scores that is computed: all without a kernel, else the blocks on and below the diagonal."""
    if not is_fused(model):
        return 1.0
    most = 1024 if model.attention == "splash" else 128
    blocks = T // math.gcd(T, most)
    return (blocks + 1) / (2 * blocks)


def flops_table(products: Iterable[Product], devices: int) -> dict[str, dict[str, float]]:
    """FLOPs of all devices by pass and part."""
    table = {step_pass: dict.fromkeys(PARTS, 0.0) for step_pass in PASSES}
    for product in products:
        table[product.step_pass][product.part] += product.flops * devices
    return table


def _layer(model: ModelConfig, B: int, T: int, tensor: int) -> list[Product]:
    D, K = model.n_embd, model.n_embd // model.n_head
    H = -(-model.n_head // tensor)  # zero heads fill up what does not divide, see model/heads.py
    F, share = 4 * D // tensor, visible_share(model, T)
    return [
        Product("forward", "projections", 1, B * T, D, 3 * H * K),
        Product("forward", "attention", B * H, T, K, T, share),
        Product("forward", "attention", B * H, T, T, K, share),
        Product("forward", "projections", 1, B * T, H * K, D),
        Product("forward", "projections", 1, B * T, D, F),
        Product("forward", "projections", 1, B * T, F, D),
    ]


def _backward(products: Iterable[Product]) -> list[Product]:
    """Of C = A B, with A m x k: the gradient of A is that of C times B^T, that of B is A^T times that of C."""
    return [
        dataclasses.replace(product, step_pass="backward", m=m, k=k, n=n)
        for product in products
        for m, k, n in ((product.m, product.n, product.k), (product.k, product.m, product.n))
    ]


def _recomputed(layer: list[Product], model: ModelConfig) -> list[Product]:
    scores, values = (product for product in layer if product.part == "attention")
    again = [scores] if is_fused(model) else []  # a kernel keeps no scores: its backward pass computes them
    if model.remat == "dots" and not is_fused(model):
        again = [scores, values]  # which are no projections
    if model.remat == "full":
        again += layer[:-1]  # the last product only the next block needs
    return [_of_pass(product, "recompute") for product in again]


def _of_pass(product: Product, step_pass: str) -> Product:
    return dataclasses.replace(product, step_pass=step_pass)
