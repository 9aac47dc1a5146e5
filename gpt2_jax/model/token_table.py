"""The token table where the batch is shared out: one for each device that has rows of its own.

Look-up and head then add up the table's gradient without a word to other devices, over the chunks of the loss too, and
it is summed over devices once, in float32, in which the gradient of a frequent token can be summed.

Shapes: S devices that share the batch, B rows, T length, D width, V' padded vocabulary.
"""

import jax
import jax.numpy as jnp

from gpt2_jax.sharding import axis_size, constrain, relayout


def table_per_share(wte_VD: jax.Array) -> jax.Array:
    """The table, gathered over fsdp, as `[S, V', D]`: each device has one."""
    wte_VD = relayout(wte_VD, ("vocab", None), ("vocab", "embed"))
    wte_SVD = jnp.broadcast_to(wte_VD, (axis_size("batch"), *wte_VD.shape))
    # In the end each device of fsdp gets its part of the width from the others and sums it.
    wte_SVD = relayout(wte_SVD, ("batch", "vocab", None), ("replicas", "vocab", "embed"))
    return constrain(wte_SVD, "batch", "vocab", None)  # and so its gradient, until it is complete


def look_up(wte_SVD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of the ids, `[B, T, D]`."""
    S, _, D = wte_SVD.shape
    rows = jax.vmap(lambda wte_VD, tokens_N: wte_VD[tokens_N])(wte_SVD, tokens_BT.reshape(S, -1))
    return rows.reshape(*tokens_BT.shape, D)
