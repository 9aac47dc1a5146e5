"""GPT-2 in NumPy float64: forward pass, loss and a backward pass written by hand.

The tests compare the JAX model with these functions. Nothing here comes from the package under test.

Shape letters:
    B  batch            T  positions of the batch    D  width        L  layers
    H  heads            S  positions attended to     K  D / H        F  width inside the MLP
    V  vocabulary rows as stored (real rows first, then padding)     P  rows of the position table

Parameters are a nested dict of float64 arrays; the layers are stacked on the first axis:
    wte.embedding [V, D], wpe.embedding [P, D], ln_f.{scale, bias} [D],
    h.{ln_1, ln_2}.{scale, bias} [L, D],
    h.attn.c_attn.{kernel [L, D, 3, D], bias [L, 3, D]} with query, key, value in that order on the axis of 3,
    h.attn.c_proj.{kernel [L, D, D], bias [L, D]},
    h.mlp.c_fc.{kernel [L, D, F], bias [L, F]}, h.mlp.c_proj.{kernel [L, F, D], bias [L, D]}.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]
Tree = dict[str, Any]

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBE = 0.044715


# Layer normalisation


def layer_norm(x: Array, p: Tree, epsilon: float) -> tuple[Array, Tree]:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1.0 / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    normed = centred * rstd
    return normed * p["scale"] + p["bias"], {"normed": normed, "rstd": rstd}


def layer_norm_backward(dy: Array, p: Tree, saved: Tree) -> tuple[Array, Tree]:
    normed, rstd = saved["normed"], saved["rstd"]
    leading = tuple(range(dy.ndim - 1))
    grads = {"scale": (dy * normed).sum(leading), "bias": dy.sum(leading)}
    dn = dy * p["scale"]
    dx = dn - dn.mean(-1, keepdims=True) - normed * (dn * normed).mean(-1, keepdims=True)
    return dx * rstd, grads


# GELU in the tanh form


def gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(GELU_SCALE * (x + GELU_CUBE * x**3)))


def gelu_derivative(x: Array) -> Array:
    t = np.tanh(GELU_SCALE * (x + GELU_CUBE * x**3))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t**2) * GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * x**2)


# Causal self-attention


def split_heads(x_BTD: Array, n_head: int) -> Array:
    """Cut the width into contiguous groups of K columns, one per head."""
    b, t, d = x_BTD.shape
    return x_BTD.reshape(b, t, n_head, d // n_head).transpose(0, 2, 1, 3)


def join_heads(x_BHTK: Array) -> Array:
    b, h, t, k = x_BHTK.shape
    return x_BHTK.transpose(0, 2, 1, 3).reshape(b, t, h * k)


def causal_softmax(scores_BHTS: Array) -> Array:
    """Softmax over S of the positions s <= t; exactly zero elsewhere."""
    t = scores_BHTS.shape[-1]
    allowed_TS = np.tril(np.ones((t, t), dtype=bool))
    masked = np.where(allowed_TS, scores_BHTS, -np.inf)
    unnormalised = np.exp(masked - masked.max(-1, keepdims=True))
    probs_BHTS: Array = unnormalised / unnormalised.sum(-1, keepdims=True)
    return probs_BHTS


def attention(x_BTD: Array, p: Tree, n_head: int) -> tuple[Array, Tree]:
    qkv_BT3D = np.einsum("btd,dce->btce", x_BTD, p["c_attn"]["kernel"]) + p["c_attn"]["bias"]
    q, k, v = (split_heads(qkv_BT3D[:, :, i], n_head) for i in range(3))
    probs_BHTS = causal_softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))
    mixed_BTD = join_heads(probs_BHTS @ v)
    y_BTD = mixed_BTD @ p["c_proj"]["kernel"] + p["c_proj"]["bias"]
    return y_BTD, {"x": x_BTD, "q": q, "k": k, "v": v, "probs": probs_BHTS, "mixed": mixed_BTD}


def attention_backward(dy_BTD: Array, p: Tree, saved: Tree) -> tuple[Array, Tree]:
    q, k, v, probs_BHTS = saved["q"], saved["k"], saved["v"], saved["probs"]
    dmixed_BTD, grad_proj = linear_backward(dy_BTD, saved["mixed"], p["c_proj"]["kernel"])
    dmixed_BHTK = split_heads(dmixed_BTD, q.shape[1])

    dv_BHSK = probs_BHTS.swapaxes(-1, -2) @ dmixed_BHTK
    dprobs_BHTS = dmixed_BHTK @ v.swapaxes(-1, -2)
    dscores_BHTS = probs_BHTS * (dprobs_BHTS - (dprobs_BHTS * probs_BHTS).sum(-1, keepdims=True))
    dscores_BHTS /= math.sqrt(q.shape[-1])
    dq_BHTK = dscores_BHTS @ k
    dk_BHSK = dscores_BHTS.swapaxes(-1, -2) @ q

    dqkv_BT3D = np.stack([join_heads(d) for d in (dq_BHTK, dk_BHSK, dv_BHSK)], axis=2)
    grad_attn = {"kernel": np.einsum("btd,btce->dce", saved["x"], dqkv_BT3D), "bias": dqkv_BT3D.sum((0, 1))}
    dx_BTD = np.einsum("btce,dce->btd", dqkv_BT3D, p["c_attn"]["kernel"])
    return dx_BTD, {"c_attn": grad_attn, "c_proj": grad_proj}


# MLP


def linear_backward(dy: Array, x: Array, kernel: Array) -> tuple[Array, Tree]:
    """Backward of `x @ kernel + bias` for x [B, T, in] and kernel [in, out]."""
    grads = {"kernel": np.einsum("bti,bto->io", x, dy), "bias": dy.sum((0, 1))}
    return dy @ kernel.T, grads


def mlp(x_BTD: Array, p: Tree) -> tuple[Array, Tree]:
    pre_BTF = x_BTD @ p["c_fc"]["kernel"] + p["c_fc"]["bias"]
    act_BTF = gelu(pre_BTF)
    y_BTD = act_BTF @ p["c_proj"]["kernel"] + p["c_proj"]["bias"]
    return y_BTD, {"x": x_BTD, "pre": pre_BTF, "act": act_BTF}


def mlp_backward(dy_BTD: Array, p: Tree, saved: Tree) -> tuple[Array, Tree]:
    dact_BTF, grad_proj = linear_backward(dy_BTD, saved["act"], p["c_proj"]["kernel"])
    dpre_BTF = dact_BTF * gelu_derivative(saved["pre"])
    dx_BTD, grad_fc = linear_backward(dpre_BTF, saved["x"], p["c_fc"]["kernel"])
    return dx_BTD, {"c_fc": grad_fc, "c_proj": grad_proj}


# One block: x + attention(ln_1(x)), then x + mlp(ln_2(x))


def block(x_BTD: Array, p: Tree, n_head: int, epsilon: float) -> tuple[Array, Tree]:
    saved: Tree = {}
    normed, saved["ln_1"] = layer_norm(x_BTD, p["ln_1"], epsilon)
    y, saved["attn"] = attention(normed, p["attn"], n_head)
    x_BTD = x_BTD + y
    normed, saved["ln_2"] = layer_norm(x_BTD, p["ln_2"], epsilon)
    y, saved["mlp"] = mlp(normed, p["mlp"])
    return x_BTD + y, saved


def block_backward(dx_BTD: Array, p: Tree, saved: Tree) -> tuple[Array, Tree]:
    grads: Tree = {}
    d, grads["mlp"] = mlp_backward(dx_BTD, p["mlp"], saved["mlp"])
    d, grads["ln_2"] = layer_norm_backward(d, p["ln_2"], saved["ln_2"])
    dx_BTD = dx_BTD + d
    d, grads["attn"] = attention_backward(dx_BTD, p["attn"], saved["attn"])
    d, grads["ln_1"] = layer_norm_backward(d, p["ln_1"], saved["ln_1"])
    return dx_BTD + d, grads


# The whole model


def layer(tree: Tree, index: int) -> Tree:
    """The parameters of one layer out of the stacked ones."""
    return {name: layer(v, index) if isinstance(v, dict) else v[index] for name, v in tree.items()}


def stack_layers(trees: list[Tree]) -> Tree:
    """The inverse of `layer` over all layers."""

    def join(values: list[Any]) -> Any:
        return stack_layers(values) if isinstance(values[0], dict) else np.stack(values)

    return {name: join([tree[name] for tree in trees]) for name in trees[0]}


def count_layers(params: Tree) -> int:
    return int(params["h"]["ln_1"]["scale"].shape[0])


def _hidden(params: Tree, tokens_BT: Ints, n_head: int, epsilon: float) -> tuple[Array, Tree]:
    positions = tokens_BT.shape[1]
    x_BTD = params["wte"]["embedding"][tokens_BT] + params["wpe"]["embedding"][:positions]
    saved_blocks = []
    for index in range(count_layers(params)):
        x_BTD, saved = block(x_BTD, layer(params["h"], index), n_head, epsilon)
        saved_blocks.append(saved)
    x_BTD, saved_ln = layer_norm(x_BTD, params["ln_f"], epsilon)
    return x_BTD, {"h": saved_blocks, "ln_f": saved_ln}


def hidden_states(params: Tree, tokens_BT: Ints, *, n_head: int, epsilon: float) -> Array:
    """The final normalised states [B, T, D], before the tied head."""
    return _hidden(params, tokens_BT, n_head, epsilon)[0]


def logits(params: Tree, tokens_BT: Ints, *, n_head: int, vocab_size: int, epsilon: float) -> Array:
    """Logits [B, T, vocab_size] of the real vocabulary; the head is the token table, without a bias."""
    x_BTD = hidden_states(params, tokens_BT, n_head=n_head, epsilon=epsilon)
    logits_BTV: Array = x_BTD @ params["wte"]["embedding"][:vocab_size].T
    return logits_BTV


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    log_p: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_p


def token_losses(logits_BTV: Array, targets_BT: Ints) -> Array:
    """-log p(target) in nats at every position, [B, T]."""
    return -np.take_along_axis(log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]


def loss(
    params: Tree,
    tokens_BT: Ints,
    targets_BT: Ints,
    weights_BT: Array,
    *,
    n_head: int,
    vocab_size: int,
    epsilon: float,
) -> float:
    """Weighted mean of -log p(target) in nats: sum(w * -log p) / sum(w)."""
    logits_BTV = logits(params, tokens_BT, n_head=n_head, vocab_size=vocab_size, epsilon=epsilon)
    return float((weights_BT * token_losses(logits_BTV, targets_BT)).sum() / weights_BT.sum())


def loss_and_gradients(
    params: Tree,
    tokens_BT: Ints,
    targets_BT: Ints,
    weights_BT: Array,
    *,
    n_head: int,
    vocab_size: int,
    epsilon: float,
) -> tuple[float, Tree]:
    """`loss` and its gradient with respect to every parameter, as a tree shaped like `params`."""
    x_BTD, saved = _hidden(params, tokens_BT, n_head, epsilon)
    head_VD = params["wte"]["embedding"][:vocab_size]
    log_p_BTV = log_softmax(x_BTD @ head_VD.T)
    share_BT = weights_BT / weights_BT.sum()
    one_hot_BTV = np.eye(vocab_size)[targets_BT]
    value = float(-(share_BT[..., None] * one_hot_BTV * log_p_BTV).sum())

    dlogits_BTV = share_BT[..., None] * (np.exp(log_p_BTV) - one_hot_BTV)
    d_wte = np.zeros_like(params["wte"]["embedding"])
    d_wte[:vocab_size] = np.einsum("btv,btd->vd", dlogits_BTV, x_BTD)
    dx_BTD, grad_ln = layer_norm_backward(dlogits_BTV @ head_VD, params["ln_f"], saved["ln_f"])

    grad_blocks: list[Tree] = []
    for index in reversed(range(count_layers(params))):
        dx_BTD, grads = block_backward(dx_BTD, layer(params["h"], index), saved["h"][index])
        grad_blocks.insert(0, grads)

    np.add.at(d_wte, tokens_BT, dx_BTD)
    d_wpe = np.zeros_like(params["wpe"]["embedding"])
    d_wpe[: tokens_BT.shape[1]] = dx_BTD.sum(0)
    gradients = {
        "wte": {"embedding": d_wte},
        "wpe": {"embedding": d_wpe},
        "h": stack_layers(grad_blocks),
        "ln_f": grad_ln,
    }
    return value, gradients


# Parameters for tests


def random_params(
    rng: np.random.Generator,
    *,
    n_layer: int,
    n_embd: int,
    n_positions: int,
    vocab_size: int,
    padded_vocab_size: int,
) -> Tree:
    """Parameters in which no bias is zero and no scale is one, so that no term can hide.

    The values are larger than at initialisation: attention is far from uniform and GELU far from linear.
    The rows that pad the token table are zero.
    """
    d, f, layers = n_embd, 4 * n_embd, n_layer

    def normal(shape: tuple[int, ...], std: float, mean: float = 0.0) -> Array:
        return mean + std * rng.standard_normal(shape)

    def norm(*shape: int) -> Tree:
        return {"scale": normal(shape, std=0.2, mean=1.0), "bias": normal(shape, std=0.1)}

    def linear(inputs: int, *outputs: int, gain: float) -> Tree:
        kernel = normal((layers, inputs, *outputs), std=gain / math.sqrt(inputs))
        return {"kernel": kernel, "bias": normal((layers, *outputs), std=0.2)}

    wte_VD = normal((padded_vocab_size, d), std=0.3)
    wte_VD[vocab_size:] = 0.0
    return {
        "wte": {"embedding": wte_VD},
        "wpe": {"embedding": normal((n_positions, d), std=0.2)},
        "h": {
            "ln_1": norm(layers, d),
            "attn": {"c_attn": linear(d, 3, d, gain=1.5), "c_proj": linear(d, d, gain=0.5)},
            "ln_2": norm(layers, d),
            "mlp": {"c_fc": linear(d, f, gain=1.0), "c_proj": linear(f, d, gain=0.5)},
        },
        "ln_f": norm(d),
    }


def leaves(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Every array by its dotted name, such as `h.attn.c_attn.kernel`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return found


def from_leaves(flat: dict[str, Any]) -> Tree:
    """The inverse of `leaves`."""
    tree: Tree = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
