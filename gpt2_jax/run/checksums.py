"""Checksums of arrays that do not depend on how these lie on devices, so that a save can be checked on any mesh.

A sum, modulo 2**32, of an array's bits in words, each times an odd factor of its place. A change of one word always
changes it, since odd factors have inverses; any other change goes unnoticed with a chance of 2**-32. It is against
damage, not against forgery.
"""

from typing import Any

import jax
import jax.numpy as jnp

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksums(tree: Any) -> Any:
    """A tree with a uint32 for each array; these lie all on the same devices."""
    sharding = jax.tree.leaves(tree)[0].sharding
    # On the devices of the arrays, whatever mesh is in use: parameters of another run are looked at on one of them.
    mesh = getattr(sharding, "mesh", None) or jax.sharding.Mesh(list(sharding.device_set), ("alone",))
    with jax.set_mesh(mesh):
        return _checksums(tree)


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _weighted_sum(_words(leaf)), tree)


def named(sums: Any) -> dict[str, str]:
    """Checksums as hexadecimal digits by the names of their arrays; waits for the device."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{int(checksum):08x}"
        for path, checksum in jax.tree_util.tree_leaves_with_path(jax.device_get(sums))
    }


def _words(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)


def _weighted_sum(words: jax.Array) -> jax.Array:
    for axis in range(words.ndim):  # the leading one first: on a CPU three times as fast as the last one
        place = jax.lax.iota(jnp.uint32, words.shape[0]) * jnp.uint32(0x9E3779B9) + jnp.uint32(axis)
        factor = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D) | jnp.uint32(1)
        # Of its own, so that it is not worked out anew for each word.
        factor = jnp.expand_dims(jax.lax.optimization_barrier(factor), range(1, words.ndim))
        words = (words * factor).sum(axis=0, dtype=jnp.uint32)
    return words
