"""Operations that some jaxlib releases compiled wrongly for CPUs, against NumPy float64.

They use none of the package: when one of them fails, the installed jaxlib is at fault, not the model.

Shape letters: N rows, D width, F MLP width, S keys, V vocabulary, T steps of a scan.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = pytest.mark.smoke

F32_EPSILON = float(np.finfo(np.float32).eps)


def float32(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def assert_sum_close(actual: Any, terms: NDArray[np.float64], axis: int | tuple[int, ...]) -> None:
    """A float32 sum of n terms may be off by about sqrt(n) roundings of the sum of their magnitudes."""
    n = terms.size // np.asarray(actual).size
    bound = 4 * F32_EPSILON * np.sqrt(n) * np.abs(terms).sum(axis)
    error = np.abs(np.asarray(actual, np.float64) - terms.sum(axis))
    assert np.all(error <= bound), f"off by {error.max():.3g}, allowed {bound.max():.3g}"


def assert_product_close(actual: Any, a: NDArray[Any], b: NDArray[Any]) -> None:
    a, b = a.astype(np.float64), b.astype(np.float64)
    bound = 4 * F32_EPSILON * np.sqrt(a.shape[1]) * (np.abs(a) @ np.abs(b))
    error = np.abs(np.asarray(actual, np.float64) - a @ b)
    assert np.all(error <= bound), f"off by {error.max():.3g}, allowed {bound.max():.3g}"


def relative(actual: Any, expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def test_mlp_products_and_the_sums_that_follow_them() -> None:
    rng = np.random.default_rng(0)
    x_ND, up_DF, down_FD = float32(rng, 64, 384), float32(rng, 384, 1536) / 20, float32(rng, 1536, 384) / 40
    bias_F = float32(rng, 1536) / 5

    def mlp(x_ND: Any, up_DF: Any, bias_F: Any, down_FD: Any) -> Any:
        hidden_NF = jnp.tanh(x_ND @ up_DF + bias_F[None])
        y_ND = hidden_NF @ down_FD
        return y_ND, hidden_NF.sum(0), hidden_NF.sum(1), y_ND.sum((0, 1))

    def scalar(*args: Any) -> Any:
        return jnp.sum(jnp.square(mlp(*args)[0]))

    arrays = (x_ND, up_DF, bias_F, down_FD)
    y_ND, sum_F, sum_N, total = jax.jit(mlp)(*arrays)
    grads = jax.jit(jax.grad(scalar, argnums=(0, 1, 2, 3)))(*arrays)

    x, up, bias, down = (a.astype(np.float64) for a in arrays)
    h = np.tanh(x @ up + bias)
    y = h @ down
    dpre = (2 * y @ down.T) * (1 - h**2)
    expected = (dpre @ up.T, x.T @ dpre, dpre.sum(0), h.T @ (2 * y))
    actuals = (y_ND, sum_F, sum_N, *grads)
    for actual, wanted in zip(actuals, (y, h.sum(0), h.sum(1), *expected), strict=True):
        assert relative(actual, wanted) < 5e-6
    assert abs(float(total) - y.sum()) < 1e-6 * np.abs(y).sum()


def test_product_followed_by_a_sum_over_either_axis() -> None:
    rng = np.random.default_rng(1)
    x_ND, w_DF = float32(rng, 64, 384), float32(rng, 384, 1536)
    sums = jax.jit(lambda x, w: ((x @ w).sum(1), (x @ w).sum(0), (x @ w).sum()))
    rows, columns, everything = sums(x_ND, w_DF)
    product_NF = x_ND.astype(np.float64) @ w_DF.astype(np.float64)
    assert_sum_close(rows, product_NF, 1)
    assert_sum_close(columns, product_NF, 0)
    assert_sum_close(everything, product_NF, (0, 1))


@pytest.mark.parametrize("rows", [1_000, 32_768, 32_769, 50_000])
def test_small_product_of_many_rows_then_a_sum_per_row(rows: int) -> None:
    x_ND, w_DD = float32(np.random.default_rng(rows), rows, 3), float32(np.random.default_rng(2), 3, 3)
    norms_N = jax.jit(jax.vmap(lambda x_D: jnp.sum(jnp.square(w_DD @ x_D))))(x_ND)
    expected_N = np.square(x_ND.astype(np.float64) @ w_DD.T.astype(np.float64)).sum(1)
    np.testing.assert_allclose(norms_N, expected_N, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [7, 49, 50, 64, 257, 5_000])
def test_elementwise_functions_at_sizes_around_a_vector(size: int) -> None:
    x_N = np.linspace(-4, 4, size).astype(np.float32)
    for function in (np.exp, np.tanh, np.arctan, np.sin, np.square, np.expm1):
        expected_N = function(x_N.astype(np.float64))
        actual_N = jax.jit(getattr(jnp, function.__name__))(x_N)
        np.testing.assert_allclose(actual_N, expected_N, rtol=2e-6, atol=2e-7, err_msg=function.__name__)


def test_multiply_and_sum_of_many_axes_does_not_crash() -> None:
    """In a process of its own: a bad release ends the interpreter."""
    program = (
        "import jax, jax.numpy as jnp; a = jnp.full((3, 1, 2, 2, 8, 8, 8), 0.5); "
        "print(float(jax.jit(lambda a, b: (a * b).sum(3))(a, a + 1).sum()))"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0
    assert float(done.stdout) == 0.5 * 1.5 * 3 * 2 * 2 * 8**3


@pytest.mark.parametrize("keys", [31, 255, 256, 257, 300, 512, 1000, 1024, 4097])
def test_row_statistics_and_softmax(keys: int) -> None:
    rng = np.random.default_rng(keys)
    x_NS = float32(rng, 12, keys) * 3 + 1

    @jax.jit
    def statistics(x_NS: Any) -> Any:
        moments = x_NS.sum(-1), x_NS.mean(-1), x_NS.var(-1), x_NS.max(-1)
        return *moments, jax.nn.softmax(x_NS), jax.nn.logsumexp(x_NS, -1)

    total, mean, variance, highest, softmax, log_sum = statistics(x_NS)
    x = x_NS.astype(np.float64)
    unnormalised = np.exp(x - x.max(-1, keepdims=True))
    assert_sum_close(total, x, -1)
    assert_sum_close(mean, x / keys, -1)
    np.testing.assert_allclose(variance, x.var(-1), rtol=1e-5)
    np.testing.assert_array_equal(highest, x_NS.max(-1))
    np.testing.assert_allclose(softmax, unnormalised / unnormalised.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(log_sum, np.log(unnormalised.sum(-1)) + x.max(-1), rtol=1e-6)


@pytest.mark.parametrize(("rows", "width", "ids"), [(7, 33, 4096), (128, 32, 48), (1000, 64, 8192)])
def test_gradient_of_a_lookup_adds_up_duplicate_rows(rows: int, width: int, ids: int) -> None:
    rng = np.random.default_rng(rows)
    table_VD, out_ND = float32(rng, rows, width), float32(rng, ids, width)
    index_N = np.minimum(rng.geometric(0.05, ids) - 1, rows - 1)  # a few rows take most of the hits

    grad_VD = jax.jit(jax.grad(lambda table: jnp.sum(table[index_N] * out_ND)))(table_VD)
    expected_VD = np.zeros((rows, width))
    np.add.at(expected_VD, index_N, out_ND.astype(np.float64))
    magnitude_VD = np.zeros((rows, width))
    np.add.at(magnitude_VD, index_N, np.abs(out_ND.astype(np.float64)))
    assert np.all(np.abs(np.asarray(grad_VD) - expected_VD) <= F32_EPSILON * np.sqrt(ids) * magnitude_VD)


@pytest.mark.parametrize("pattern", ["never", "always", "mixed"])
def test_scan_with_a_branch_that_keeps_the_carry(pattern: str) -> None:
    steps = 9
    rng = np.random.default_rng(4)
    take_T = rng.random(steps) < {"never": 0.0, "mixed": 0.5, "always": 1.0}[pattern]
    start = {"w": float32(rng, 33, 5), "m": float32(rng, 33, 5), "count": np.int32(0)}
    grads_T = float32(rng, steps, 33, 5)
    grads_T[~take_T] = np.nan  # must not leak out of the branch that is not taken

    def update(carry: Any, g: Any) -> Any:
        m = 0.5 * carry["m"] + 0.5 * g
        return {"w": carry["w"] - 0.25 * m, "m": m, "count": carry["count"] + 1}

    def step(carry: Any, inputs: Any) -> Any:
        take, g = inputs
        carry = jax.lax.cond(take, lambda c: update(c, g), lambda c: c, carry)
        return carry, carry["w"]

    end, history_T = jax.jit(lambda c, xs: jax.lax.scan(step, c, xs))(start, (take_T, grads_T))

    expected = {name: np.asarray(value, np.float64) for name, value in start.items()}
    for t in range(steps):
        if take_T[t]:
            expected = update(expected, grads_T[t].astype(np.float64))
        np.testing.assert_allclose(history_T[t], expected["w"], rtol=1e-5, atol=1e-6)
        if not take_T[t]:
            np.testing.assert_array_equal(history_T[t], history_T[t - 1] if t else start["w"])
    assert int(end["count"]) == take_T.sum()
    np.testing.assert_array_equal(end["w"], history_T[-1])
    np.testing.assert_allclose(end["m"], expected["m"], rtol=1e-5, atol=1e-6)


def test_products_of_odd_shapes_are_right_and_repeatable() -> None:
    rng = np.random.default_rng(5)
    product = jax.jit(jnp.matmul)
    for _ in range(30):
        n, k, m = (int(size) for size in rng.integers(1, 300, 3))
        a, b = float32(rng, n, k), float32(rng, k, m)
        first, second = np.asarray(product(a, b)), np.asarray(product(a, b))
        np.testing.assert_array_equal(first, second, err_msg=f"[{n}, {k}] x [{k}, {m}]")
        assert_product_close(first, a, b)


def test_batched_products_of_odd_shapes_with_either_side_transposed() -> None:
    rng = np.random.default_rng(6)
    equations = ("hnk,hkm->hnm", "hnk,hmk->hnm", "hkn,hkm->hnm")
    for index in range(12):
        n, k, m = (int(size) for size in rng.integers(1, 90, 3))
        equation = equations[index % 3]
        sizes = {"h": 3, "n": n, "k": k, "m": m}
        left, right = equation.split("->")[0].split(",")
        a = float32(rng, *(sizes[letter] for letter in left))
        b = float32(rng, *(sizes[letter] for letter in right))
        actual = jax.jit(lambda a, b, equation=equation: jnp.einsum(equation, a, b))(a, b)
        expected = np.einsum(equation, a.astype(np.float64), b.astype(np.float64))
        bound = 4 * F32_EPSILON * np.sqrt(k) * np.einsum(equation, np.abs(a), np.abs(b))
        assert np.all(np.abs(np.asarray(actual) - expected) <= bound), f"{equation} n={n} k={k} m={m}"
