"""The loss, whole and in chunks, against NumPy float64.

Shape letters: B batch, T positions, D width, V vocabulary rows.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt2

from gpt2_jax.training.loss import cross_entropy_sums

B, T, D, V, PADDED = 3, 16, 32, 70, 128
CHUNKS = [0, 1, 2, 4, 8, 16]


def arrays(seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Hidden states, table with padded rows that are not zero, targets, uneven weights."""
    rng = np.random.default_rng(seed)
    weights_BT = rng.uniform(0.1, 2.0, (B, T))
    weights_BT[1, 5:] = 0.0
    return (
        rng.standard_normal((B, T, D)).astype(np.float32),
        (0.5 * rng.standard_normal((PADDED, D))).astype(np.float32),
        rng.integers(0, V, (B, T)),
        weights_BT.astype(np.float32),
    )


@functools.partial(jax.jit, static_argnames="chunk")
def sums_and_gradients(x_BTD: Any, table_VD: Any, targets_BT: Any, weights_BT: Any, *, chunk: int) -> Any:
    def loss_sum(x_BTD: Any, table_VD: Any) -> Any:
        return cross_entropy_sums(x_BTD, table_VD[None], targets_BT, weights_BT, vocab_size=V, chunk=chunk)

    return jax.value_and_grad(loss_sum, argnums=(0, 1), has_aux=True)(x_BTD, table_VD)


@functools.cache
def expected() -> tuple[float, float, Any, Any]:
    """Loss sum, weight sum and the gradients of the former, by hand."""
    x_BTD, table_VD, targets_BT, weights_BT = arrays()
    x, table, weights = (a.astype(np.float64) for a in (x_BTD, table_VD[:V], weights_BT))
    log_p = numpy_gpt2.log_softmax(x @ table.T)
    one_hot = np.eye(V)[targets_BT]
    d_logits = weights[..., None] * (np.exp(log_p) - one_hot)
    d_table = np.zeros((PADDED, D))
    d_table[:V] = np.einsum("btv,btd->vd", d_logits, x)
    loss_sum = -(weights * (log_p * one_hot).sum(-1)).sum()
    return float(loss_sum), float(weights.sum()), d_logits @ table, d_table


def relative(actual: Any, wanted: Any) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted))


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", CHUNKS)
def test_sums_and_gradients(chunk: int) -> None:
    (loss_sum, weight_sum), (dx_BTD, d_table_VD) = sums_and_gradients(*arrays(), chunk=chunk)
    wanted_loss, wanted_weight, wanted_dx, wanted_d_table = expected()
    assert loss_sum.dtype == weight_sum.dtype == jnp.float32
    assert loss_sum.shape == weight_sum.shape == ()
    assert float(loss_sum) == pytest.approx(wanted_loss, rel=2e-6)
    assert float(weight_sum) == pytest.approx(wanted_weight, rel=1e-6)
    assert relative(dx_BTD, wanted_dx) < 2e-6
    assert relative(d_table_VD, wanted_d_table) < 2e-6
    assert np.all(np.asarray(d_table_VD)[V:] == 0)


@pytest.mark.parametrize("chunk", [0, 4])
def test_logits_that_are_left_in_16_bits(chunk: int) -> None:
    """As training in 16 bits has them: rounded once, summed up in float32."""
    x_BTD, table_VD, targets_BT, weights_BT = arrays()
    x_BTD, rounded_VD = (array.astype(jnp.bfloat16) for array in (x_BTD, table_VD))
    loss_sum, weight_sum = cross_entropy_sums(
        jnp.asarray(x_BTD), table_VD[None], targets_BT, weights_BT, vocab_size=V, chunk=chunk, rounded=True
    )
    exact_BTV = x_BTD.astype(np.float64) @ rounded_VD[:V].astype(np.float64).T
    target_BTV = np.eye(V)[targets_BT] * weights_BT[..., None]

    def loss(logits_BTV: Any) -> float:
        return -float((target_BTV * numpy_gpt2.log_softmax(logits_BTV)).sum())

    wanted = loss(exact_BTV.astype(jnp.bfloat16).astype(np.float64))
    assert loss_sum.dtype == jnp.float32
    assert float(loss_sum) == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted / loss(exact_BTV) - 1) > 5e-5  # that they were rounded shows
    assert float(weight_sum) == pytest.approx(weights_BT.sum(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_weights_that_are_all_zero(chunk: int) -> None:
    x_BTD, table_VD, targets_BT, weights_BT = arrays()
    (loss_sum, weight_sum), grads = sums_and_gradients(
        x_BTD, table_VD, targets_BT, np.zeros_like(weights_BT), chunk=chunk
    )
    assert float(loss_sum) == 0
    assert float(weight_sum) == 0
    assert all(np.all(np.asarray(grad) == 0) for grad in grads)


@pytest.mark.parametrize("chunk", [0, 4])
def test_logits_in_the_thousands_stay_finite(chunk: int) -> None:
    x_BTD, table_VD, targets_BT, weights_BT = arrays()
    (loss_sum, _), grads = sums_and_gradients(300 * x_BTD, table_VD, targets_BT, weights_BT, chunk=chunk)
    losses_BT = numpy_gpt2.token_losses(
        300.0 * x_BTD.astype(np.float64) @ table_VD[:V].T.astype(np.float64), targets_BT
    )
    assert float(loss_sum) == pytest.approx(float((weights_BT * losses_BT).sum()), rel=1e-5)
    assert all(np.all(np.isfinite(grad)) for grad in grads)


def array_sizes(chunk: int) -> set[int]:
    """Element counts of all arrays in the program for forward and backward pass."""
    text = sums_and_gradients.lower(*arrays(), chunk=chunk).as_text()
    shapes = re.findall(r"tensor<([\dx]+)x[a-z]", text)
    return {math.prod(map(int, shape.split("x"))) for shape in shapes}


def test_chunks_hold_only_their_share_of_the_logits() -> None:
    assert B * T * PADDED in array_sizes(chunk=0)
    in_chunks = array_sizes(chunk=8)
    assert B * 8 * PADDED in in_chunks
    assert not in_chunks & {B * T * PADDED, B * T * V}
