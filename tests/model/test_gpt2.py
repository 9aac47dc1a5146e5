"""The JAX model against the NumPy float64 reference, and properties that GPT-2 must have.

Shape letters: B batch, T positions, D width, V vocabulary, P position rows, L layers, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_gpt2

from gpt2_jax.config import ModelConfig
from gpt2_jax.model.gpt2 import GPT2, init_params, padded_vocab_size, parameter_count
from gpt2_jax.training.loss import cross_entropy_sums

B, T, V = 3, 16, 70
CONFIG = ModelConfig(
    n_layer=3,
    n_head=4,
    n_embd=32,
    n_positions=20,
    vocab_size=V,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
REFERENCE = {"n_head": CONFIG.n_head, "vocab_size": V, "epsilon": CONFIG.layer_norm_epsilon}
LEAVES = [
    "wte.embedding",
    "wpe.embedding",
    *(f"h.{norm}.{leaf}" for norm in ("ln_1", "ln_2") for leaf in ("scale", "bias")),
    *(
        f"h.{part}.{leaf}"
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for leaf in ("kernel", "bias")
    ),
    "ln_f.scale",
    "ln_f.bias",
]


def random_params(seed: int = 0) -> Any:
    return numpy_gpt2.random_params(
        np.random.default_rng(seed),
        n_layer=CONFIG.n_layer,
        n_embd=CONFIG.n_embd,
        n_positions=CONFIG.n_positions,
        vocab_size=V,
        padded_vocab_size=padded_vocab_size(V),
    )


def random_batch(seed: int = 1) -> tuple[Any, Any, Any]:
    """Tokens, targets and uneven weights, one of them zero."""
    rng = np.random.default_rng(seed)
    weights_BT = rng.uniform(0.1, 2.0, (B, T))
    weights_BT[0, 3] = 0.0
    return rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T)), weights_BT


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def apply_logits(params: Any, tokens_BT: Any, config: ModelConfig = CONFIG) -> Any:
    return jax.jit(lambda p, t: GPT2(config).apply({"params": p}, t, deterministic=True))(params, tokens_BT)


def loss_and_gradients(config: ModelConfig, params: Any, batch: Any, dropout_key: Any = None) -> Any:
    def loss(params: Any, tokens_BT: Any, targets_BT: Any, weights_BT: Any) -> Any:
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        x_BTD = GPT2(config).apply(
            {"params": params},
            tokens_BT,
            deterministic=dropout_key is None,
            rngs=rngs,
            method="hidden_states",
        )
        table_VD = params["wte"]["embedding"]
        total, weight = cross_entropy_sums(x_BTD, table_VD[None], targets_BT, weights_BT, vocab_size=V, chunk=0)
        return total / weight

    return jax.jit(jax.value_and_grad(loss))(params, *batch)


@functools.cache
def reference_results() -> tuple[Any, float, Any]:
    """Logits, loss and gradients by name from NumPy."""
    params, (tokens_BT, targets_BT, weights_BT) = random_params(), random_batch()
    logits_BTV = numpy_gpt2.logits(params, tokens_BT, **REFERENCE)
    loss, grads = numpy_gpt2.loss_and_gradients(params, tokens_BT, targets_BT, weights_BT, **REFERENCE)
    return logits_BTV, loss, numpy_gpt2.leaves(grads)


@functools.cache
def float32_results() -> tuple[float, Any]:
    """Loss and gradients by name from the model in float32."""
    tokens_BT, targets_BT, weights_BT = random_batch()
    batch = (tokens_BT, targets_BT, weights_BT.astype(np.float32))
    loss, grads = loss_and_gradients(CONFIG, cast(random_params(), jnp.float32), batch)
    return float(loss), numpy_gpt2.leaves(grads)


@functools.cache
def float64_results() -> tuple[Any, Any, Any]:
    """Logits, loss and gradients by name from the model in float64, as NumPy arrays."""
    config = dataclasses.replace(CONFIG, dtype="float64")
    with jax.enable_x64(True):
        params = cast(random_params(), jnp.float64)
        logits_BTV = np.asarray(apply_logits(params, random_batch()[0], config))
        loss, grads = loss_and_gradients(config, params, random_batch())
        return logits_BTV, np.asarray(loss), numpy_gpt2.leaves(jax.tree.map(np.asarray, grads))


def relative(actual: Any, expected: Any) -> float:
    """The L2 norm of the difference over that of `expected`."""
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float64)))


def without_key_bias(name: str, grad: Any) -> Any:
    """A gradient without the key third of c_attn's bias, which is zero: it shifts a row of scores alike."""
    return np.asarray(grad)[:, [0, 2]] if name == "h.attn.c_attn.bias" else np.asarray(grad)


# The reference itself


@pytest.mark.parametrize("name", LEAVES)
def test_reference_gradient_equals_finite_differences(name: str) -> None:
    params, (tokens_BT, targets_BT, weights_BT) = random_params(), random_batch()
    _, _, grads = reference_results()
    array, rng = numpy_gpt2.leaves(params)[name], np.random.default_rng(2)

    def loss_at(index: tuple[int, ...], value: float) -> float:
        before, array[index] = array[index], value
        result = numpy_gpt2.loss(params, tokens_BT, targets_BT, weights_BT, **REFERENCE)
        array[index] = before
        return result

    rows = {"wte.embedding": V, "wpe.embedding": T}.get(name, array.shape[0])  # others get none
    step = 1e-4
    for _ in range(4):
        index = (int(rng.integers(rows)), *(int(rng.integers(size)) for size in array.shape[1:]))
        if name == "h.attn.c_attn.bias":
            index = (index[0], index[1] // 2 * 2, index[2])
        near, far = (loss_at(index, array[index] + k * step) - loss_at(index, array[index] - k * step) for k in (1, 2))
        slope = (8 * near - far) / (12 * step)  # fourth order: the error is of the order step**4
        assert slope == pytest.approx(grads[name][index], rel=1e-6, abs=1e-10)


def test_reference_tree_has_the_leaves_of_the_model() -> None:
    params = jax.eval_shape(lambda: init_params(GPT2(CONFIG), jax.random.key(0)))
    shapes = {name: leaf.shape for name, leaf in numpy_gpt2.leaves(params).items()}
    assert shapes == {name: leaf.shape for name, leaf in numpy_gpt2.leaves(random_params()).items()}
    assert set(shapes) == set(LEAVES)
    assert all(leaf.dtype == jnp.float32 for leaf in numpy_gpt2.leaves(params).values())


# The model against the reference


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("n_layer", "n_embd", "n_head", "count"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
        (6, 768, 12, 81_912_576),
    ],
)
def test_parameter_count(n_layer: int, n_embd: int, n_head: int, count: int) -> None:
    config = ModelConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=1024, vocab_size=50257)
    assert parameter_count(config) == count


@pytest.mark.parametrize(("rows", "padded"), [(1, 128), (70, 128), (128, 128), (129, 256), (50257, 50304)])
def test_padded_vocab_size(rows: int, padded: int) -> None:
    assert padded_vocab_size(rows) == padded


@pytest.mark.smoke
def test_logits_in_float32() -> None:
    logits_BTV = apply_logits(cast(random_params(), jnp.float32), random_batch()[0])
    assert logits_BTV.shape == (B, T, V)
    assert logits_BTV.dtype == jnp.float32
    expected_BTV = reference_results()[0]
    assert relative(logits_BTV, expected_BTV) < 1e-5
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=1e-5 * np.abs(expected_BTV).max())


@pytest.mark.smoke
def test_loss_in_float32() -> None:
    assert float32_results()[0] == pytest.approx(reference_results()[1], rel=1e-5)


@pytest.mark.parametrize("name", LEAVES)
def test_gradient_in_float32(name: str) -> None:
    grad, expected = float32_results()[1][name], reference_results()[2][name]
    assert relative(without_key_bias(name, grad), without_key_bias(name, expected)) < 1e-4


def test_gradient_of_the_key_bias_is_zero() -> None:
    name = "h.attn.c_attn.bias"
    assert np.abs(reference_results()[2][name][:, 1]).max() < 1e-12
    assert np.abs(float32_results()[1][name][:, 1]).max() < 1e-6
    assert np.abs(float64_results()[2][name][:, 1]).max() < 1e-12


def test_logits_and_loss_in_float64() -> None:
    logits_BTV, loss, _ = float64_results()
    assert logits_BTV.dtype == np.float64
    assert loss.dtype == np.float64
    assert relative(logits_BTV, reference_results()[0]) < 1e-9
    assert float(loss) == pytest.approx(reference_results()[1], rel=1e-9)


@pytest.mark.parametrize("name", LEAVES)
def test_gradient_in_float64(name: str) -> None:
    grad, expected = float64_results()[2][name], reference_results()[2][name]
    assert grad.dtype == np.float64
    assert relative(without_key_bias(name, grad), without_key_bias(name, expected)) < 1e-9


def test_gelu_by_erf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_gpt2, "gelu", lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2)
    params, (tokens, _, _) = random_params(), random_batch()
    want = numpy_gpt2.logits(params, tokens, **REFERENCE)
    got = apply_logits(cast(params, np.float32), tokens, dataclasses.replace(CONFIG, activation="gelu_erf"))
    assert relative(got, want) < 1e-5
    assert relative(apply_logits(cast(params, np.float32), tokens), want) > 1e-5  # tanh is another function


def test_no_biases_are_biases_of_zero() -> None:
    leaves, (tokens, _, _) = numpy_gpt2.leaves(random_params()), random_batch()
    zeros = {name: 0 * leaf if name.endswith("bias") else leaf for name, leaf in leaves.items()}
    want = numpy_gpt2.logits(numpy_gpt2.from_leaves(zeros), tokens, **REFERENCE)
    bare = numpy_gpt2.from_leaves({name: leaf for name, leaf in leaves.items() if not name.endswith("bias")})
    config = dataclasses.replace(CONFIG, bias=False)
    assert relative(apply_logits(cast(bare, np.float32), tokens, config), want) < 1e-5
    shapes = jax.eval_shape(lambda: init_params(GPT2(config), jax.random.key(0)))
    assert jax.tree.structure(shapes) == jax.tree.structure(bare)


@pytest.mark.parametrize(("remat", "unroll"), [("none", 2), ("dots", 1), ("full", 3)])
def test_remat_and_unrolling_change_nothing(remat: str, unroll: int) -> None:
    config = dataclasses.replace(CONFIG, remat=remat, scan_unroll=unroll)
    tokens_BT, targets_BT, weights_BT = random_batch()
    batch = (tokens_BT, targets_BT, weights_BT.astype(np.float32))
    loss, grads = loss_and_gradients(config, cast(random_params(), jnp.float32), batch)
    expected_loss, expected = float32_results()
    assert float(loss) == pytest.approx(expected_loss, rel=1e-6)
    for name, grad in numpy_gpt2.leaves(grads).items():
        assert relative(without_key_bias(name, grad), without_key_bias(name, expected[name])) < 1e-6, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_the_reference(dtype: str) -> None:
    """Within a few roundings: 2^-9 in bfloat16 and 2^-12 in float16 for each of some ten steps in a row."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    rounding = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[dtype]
    params = cast(random_params(), jnp.float32)
    tokens_BT, targets_BT, weights_BT = random_batch()
    logits_BTV = apply_logits(params, tokens_BT, config)
    loss, grads = loss_and_gradients(config, params, (tokens_BT, targets_BT, weights_BT.astype(np.float32)))

    expected_logits, expected_loss, expected = reference_results()
    assert logits_BTV.dtype == jnp.float32
    assert rounding / 10 < relative(logits_BTV, expected_logits) < 10 * rounding
    assert float(loss) == pytest.approx(expected_loss, rel=2 * rounding)
    for name, grad in numpy_gpt2.leaves(grads).items():
        assert grad.dtype == jnp.float32
        assert relative(without_key_bias(name, grad), without_key_bias(name, expected[name])) < 20 * rounding, name


# Causality and padding


def test_logits_depend_on_no_later_position() -> None:
    params = cast(random_params(), jnp.float32)
    tokens_1T = random_batch()[0][:1]
    probe_V = jnp.asarray(np.random.default_rng(3).standard_normal(V), jnp.float32)

    def projected(wpe_PD: Any) -> Any:
        changed = {**params, "wpe": {"embedding": wpe_PD}}
        return GPT2(CONFIG).apply({"params": changed}, tokens_1T, deterministic=True)[0] @ probe_V

    jacobian_TPD = jax.jit(jax.jacrev(projected))(params["wpe"]["embedding"])
    influence_TP = np.abs(np.asarray(jacobian_TPD)).max(-1)
    allowed_TP = np.tril(np.ones((T, CONFIG.n_positions), bool))
    assert np.all(influence_TP[~allowed_TP] == 0)
    assert np.all(influence_TP[allowed_TP] > 0)


def test_changing_a_token_leaves_earlier_logits_and_other_rows_alone() -> None:
    params, (tokens_BT, _, _) = cast(random_params(), jnp.float32), random_batch()
    changed_BT = tokens_BT.copy()
    changed_BT[1, 9] = (changed_BT[1, 9] + 1) % V
    before, after = (np.asarray(apply_logits(params, tokens)) for tokens in (tokens_BT, changed_BT))
    np.testing.assert_array_equal(after[1, :9], before[1, :9])
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.all(np.abs(after[1, 9:] - before[1, 9:]).max(-1) > 0)


def test_padded_vocabulary_rows_take_no_part() -> None:
    params = cast(random_params(), jnp.float32)
    table_VD = params["wte"]["embedding"]
    changed = {**params, "wte": {"embedding": table_VD.at[V:].set(1e3)}}
    tokens_BT, targets_BT, weights_BT = random_batch()
    batch = (tokens_BT, targets_BT, weights_BT.astype(np.float32))
    np.testing.assert_array_equal(apply_logits(changed, tokens_BT), apply_logits(params, tokens_BT))

    loss, grads = loss_and_gradients(CONFIG, changed, batch)
    expected_loss, expected = float32_results()
    assert float(loss) == expected_loss
    for name, grad in numpy_gpt2.leaves(grads).items():
        np.testing.assert_array_equal(grad, expected[name], err_msg=name)
    assert np.all(np.asarray(grads["wte"]["embedding"])[V:] == 0)


# Dropout


@functools.partial(jax.jit, static_argnames=("rate", "deterministic"))
def dropout_logits(key: Any, *, rate: float = 0.2, deterministic: bool = False) -> Any:
    config = dataclasses.replace(CONFIG, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    variables = {"params": cast(random_params(), jnp.float32)}
    rngs = {"dropout": key}
    return GPT2(config).apply(variables, random_batch()[0], deterministic=deterministic, rngs=rngs)


def test_dropout_follows_its_key() -> None:
    first, again, other = (dropout_logits(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert relative(other, first) > 0.01


def test_dropout_is_off_when_deterministic_or_when_the_rates_are_zero() -> None:
    expected_BTV = reference_results()[0]
    assert relative(dropout_logits(jax.random.key(0), deterministic=True), expected_BTV) < 1e-5
    assert relative(dropout_logits(jax.random.key(0), rate=0.0), expected_BTV) < 1e-5
    assert relative(dropout_logits(jax.random.key(0)), expected_BTV) > 0.01


def test_dropout_is_the_same_whatever_is_recomputed_and_however_layers_are_looped_over() -> None:
    """In float64, in which programs that sum in another order are equal to all but the last digits."""
    rates = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
    with jax.enable_x64(True):
        plain, *others = (
            loss_and_gradients(
                dataclasses.replace(CONFIG, dtype="float64", remat=remat, scan_unroll=unroll, **rates),
                cast(random_params(), jnp.float64),
                random_batch(),
                jax.random.key(5),
            )
            for remat, unroll in (("none", 1), ("full", 1), ("none", 3), ("full", 3))
        )
    expected = numpy_gpt2.leaves(plain[1])
    for loss, grads in others:
        assert float(plain[0]) == pytest.approx(float(loss), rel=1e-12)
        for name, grad in numpy_gpt2.leaves(grads).items():
            assert relative(without_key_bias(name, grad), without_key_bias(name, expected[name])) < 1e-12, name


def linear_model(rng: np.random.Generator, config: ModelConfig) -> Any:
    """Parameters of one block whose output is linear in whatever dropout multiplies.

    With epsilon = 1 and activations near 1e-3, LayerNorm only subtracts the mean. The attention branch passes
    the values on unchanged, the MLP branch adds its bias.
    """
    d = config.n_embd
    params = numpy_gpt2.random_params(
        rng, n_layer=1, n_embd=d, n_positions=T, vocab_size=V, padded_vocab_size=padded_vocab_size(V)
    )
    for table in (params["wte"], params["wpe"]):
        table["embedding"] *= 3e-3
    for norm in (params["h"]["ln_1"], params["ln_f"]):
        norm["scale"][:], norm["bias"][:] = 1.0, 0.0
    attn, mlp = params["h"]["attn"], params["h"]["mlp"]
    attn["c_attn"]["kernel"][:, :, :2] *= 1e3  # queries and keys of order 1: weights that differ
    attn["c_attn"]["bias"][:, 2] = 0.0
    attn["c_proj"]["kernel"][0], attn["c_proj"]["bias"][:] = np.eye(d), 0.0
    mlp["c_proj"]["kernel"][:] = 0.0
    mlp["c_proj"]["bias"] *= 3e-3
    return params


def test_dropout_keeps_the_mean_and_has_the_variance_of_its_rate() -> None:
    """A value x becomes x / (1 - p) with probability 1 - p, else 0: mean x, variance x^2 p / (1 - p)."""
    p, samples, context = 0.25, 4000, 6
    base = dataclasses.replace(CONFIG, n_layer=1, n_positions=T, layer_norm_epsilon=1.0)
    params = linear_model(np.random.default_rng(6), base)
    tokens_T = np.random.default_rng(7).integers(0, V, context)
    tokens_BT = np.broadcast_to(tokens_T, (samples, context))

    centring_DD = np.eye(base.n_embd) - 1.0 / base.n_embd
    embedded_TD = params["wte"]["embedding"][tokens_T] + params["wpe"]["embedding"][:context]
    block = numpy_gpt2.layer(params["h"], 0)
    normed_BTD = numpy_gpt2.layer_norm(embedded_TD[None], block["ln_1"], 1.0)[0]
    branch_BTD, saved = numpy_gpt2.attention(normed_BTD, block["attn"], base.n_head)
    bias_D = block["mlp"]["c_proj"]["bias"]
    expected_TD = (embedded_TD + branch_BTD[0] + bias_D) @ centring_DD

    heads_HDK = centring_DD.reshape(base.n_embd, base.n_head, -1).transpose(1, 0, 2)
    terms_THSD = np.einsum("hts,hsk,hdk->thsd", saved["probs"][0], saved["v"][0], heads_HDK)
    dropped_TD = {
        "attn_pdrop": (terms_THSD**2).sum((1, 2)),
        "resid_pdrop": (branch_BTD[0] ** 2 + bias_D**2) @ centring_DD**2,
    }
    for rate, squares_TD in dropped_TD.items():
        config = dataclasses.replace(base, **{rate: p})
        x_BTD = np.asarray(hidden_with_dropout(config, params, tokens_BT), np.float64)
        variance_TD = squares_TD * p / (1 - p)
        z_TD = (x_BTD.mean(0) - expected_TD) / np.sqrt(variance_TD / samples)
        assert np.abs(z_TD).max() < 5, rate
        np.testing.assert_allclose(x_BTD.var(0), variance_TD, rtol=0.25, err_msg=rate)
        assert x_BTD.var(0).sum() == pytest.approx(variance_TD.sum(), rel=0.03), rate


def hidden_with_dropout(config: ModelConfig, params: Any, tokens_BT: Any) -> Any:
    rngs = {"dropout": jax.random.key(8)}
    variables = {"params": cast(params, jnp.float32)}
    return jax.jit(lambda v, t: GPT2(config).apply(v, t, deterministic=False, rngs=rngs, method="hidden_states"))(
        variables, tokens_BT
    )


# Initialisation


INIT_CONFIG = dataclasses.replace(CONFIG, n_layer=4, n_embd=256, n_head=8, n_positions=256, vocab_size=1000)


@functools.partial(jax.jit, static_argnames="config")
def initialise(config: ModelConfig, seed: int) -> Any:
    return init_params(GPT2(config), jax.random.key(seed))


@functools.cache
def initial_params() -> Any:
    params = initialise(INIT_CONFIG, 0)
    return {name: np.asarray(leaf) for name, leaf in numpy_gpt2.leaves(params).items()}


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("wte.embedding", 0.02),
        ("wpe.embedding", 0.01),
        ("h.attn.c_attn.kernel", 0.02),
        ("h.mlp.c_fc.kernel", 0.02),
        ("h.attn.c_proj.kernel", 0.02 / np.sqrt(2 * 4)),
        ("h.mlp.c_proj.kernel", 0.02 / np.sqrt(2 * 4)),
    ],
)
def test_initial_matrices_are_normal(name: str, std: float) -> None:
    values = initial_params()[name]
    values = (values[:1000] if name == "wte.embedding" else values).astype(np.float64)
    assert values.std() == pytest.approx(std, rel=0.02)
    assert abs(values.mean()) < 5 * std / np.sqrt(values.size)
    assert np.mean(np.abs(values) > 2 * std) == pytest.approx(0.0455, rel=0.1)  # normal, not cut off


def test_initial_biases_norms_and_padding() -> None:
    for name, values in initial_params().items():
        if name.endswith("bias"):
            assert np.all(values == 0), name
        if name.endswith("scale"):
            assert np.all(values == 1), name
    assert np.all(initial_params()["wte.embedding"][1000:] == 0)


def test_initial_layers_and_leaves_differ() -> None:
    for name, values in initial_params().items():
        if name.startswith("h.") and name.endswith("kernel"):
            layers_LN = values.reshape(4, -1)
            assert np.abs(np.corrcoef(layers_LN) - np.eye(4)).max() < 0.05, name
    query, key, value = (initial_params()["h.attn.c_attn.kernel"][0, :, i].ravel() for i in range(3))
    assert np.abs(np.corrcoef([query, key, value]) - np.eye(3)).max() < 0.05


def test_initialisation_follows_its_key() -> None:
    first, again, other = (initialise(CONFIG, seed) for seed in (0, 0, 1))
    for name, leaf in numpy_gpt2.leaves(first).items():
        np.testing.assert_array_equal(leaf, numpy_gpt2.leaves(again)[name])
    assert relative(other["wte"]["embedding"], first["wte"]["embedding"]) > 1
