"""Heads that tensor parallelism cannot share out evenly, such as the 25 of GPT-2's largest: zero heads fill them up.

The zeros exist inside the step only: the weights are stored as they are, padded where they are used, and the gradient
of the padding is dropped. A zero head attends evenly to values of zero and adds nothing.

Shapes: H heads, H' heads with the zeros, K head dimension.
"""

import jax
import jax.numpy as jnp

from gpt2_jax.sharding import axis_size


def padded_heads(n_head: int) -> int:
    """H': the next multiple of the devices that share the heads of the mesh in use."""
    shares = axis_size("heads")
    return -(-n_head // shares) * shares


def pad_heads(array: jax.Array, axis: int, n_head: int) -> jax.Array:
    """With an axis of H * K numbers, head after head, made H' * K."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    by_head = array.reshape(*before, n_head, -1, *after)
    zeros = [(0, 0)] * by_head.ndim
    zeros[axis] = (0, padded_heads(n_head) - n_head)
    return jnp.pad(by_head, zeros).reshape(*before, -1, *after)
