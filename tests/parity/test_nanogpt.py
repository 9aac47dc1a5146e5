"""nanoGPT's ckpt.pt beside torch: files that torch.save wrote are read, files of ours are loaded, logits are the same.

Shapes: B batch, T length, D width, H heads, K = D / H.
"""

import dataclasses
import functools
import pathlib
import pickle
from typing import Any

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.config import ModelConfig
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.exchange.nanogpt import read_nanogpt, write_nanogpt
from gpt2_jax.model.gpt2 import init_params
from gpt2_jax.tokenizer import tokenizer_from_characters

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")

CHARACTERS = "\n !,.:;?ABCDEFabcdefghijklmnopqrstuvwxyz"
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": len(CHARACTERS)}
TOLERANCE = 2e-4
F = torch.nn.functional


class LayerNorm(torch.nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.bias = torch.nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(torch.nn.Module):
    def __init__(self, n_embd: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn = torch.nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = torch.nn.Linear(n_embd, n_embd, bias=bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            part.view(B, T, self.n_head, D // self.n_head).transpose(1, 2) for part in self.c_attn(x_BTD).split(D, 2)
        )
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(torch.nn.Module):
    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = torch.nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.gelu = torch.nn.GELU()
        self.c_proj = torch.nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(torch.nn.Module):
    def __init__(self, n_embd: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(n_embd, bias)
        self.attn = Attention(n_embd, n_head, bias)
        self.ln_2 = LayerNorm(n_embd, bias)
        self.mlp = MLP(n_embd, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(torch.nn.Module):
    """A GPT with nanoGPT's names, made of its `model_args`."""

    def __init__(
        self, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, bias: bool, dropout: float
    ) -> None:
        super().__init__()
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(vocab_size, n_embd),
                "wpe": torch.nn.Embedding(block_size, n_embd),
                "h": torch.nn.ModuleList([Block(n_embd, n_head, bias) for _ in range(n_layer)]),
                "ln_f": LayerNorm(n_embd, bias),
            }
        )
        self.lm_head = torch.nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(ids_BT) + self.transformer.wpe(torch.arange(ids_BT.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def their_model(args: dict[str, Any]) -> GPT:
    """Random weights large enough that the two kinds of GELU differ, biases and norms included."""
    torch.manual_seed(0)
    model = GPT(**args).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm_scale = ".ln_" in name and name.endswith("weight")
            parameter.copy_(float(norm_scale) + 0.25 * torch.randn_like(parameter))
    return model


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (2, SHAPE["block_size"])).astype(np.int32)


def their_logits(model: GPT) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens(), dtype=torch.long)).numpy()


@functools.cache
def program(config: ModelConfig) -> Any:
    return jax.jit(gpt2_jax.GPT2(config).apply)


def our_logits(config: ModelConfig, params: Any) -> np.ndarray:
    return np.asarray(program(config)({"params": params}, tokens()))


def optimizer_after_steps(model: GPT) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in parameters if one.dim() >= 2], "weight_decay": 0.1},
        {"params": [one for one in parameters if one.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    ids = torch.tensor(tokens(1), dtype=torch.long)
    for _ in range(2):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return optimizer


def save(folder: pathlib.Path, model: GPT, args: dict[str, Any], state: dict[str, Any] | None = None) -> None:
    """As nanoGPT's train.py and its data/shakespeare_char/prepare.py do."""
    checkpoint = {
        "model": model.state_dict() if state is None else state,
        "optimizer": optimizer_after_steps(their_model(args)).state_dict(),
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "device": "cpu", "learning_rate": 1e-3, "compile": False},
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    stoi = {character: number for number, character in enumerate(CHARACTERS)}
    meta = {"vocab_size": len(stoi), "itos": dict(enumerate(CHARACTERS)), "stoi": stoi}
    with (folder / "meta.pkl").open("wb") as stream:
        pickle.dump(meta, stream)


def turned(state: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, kernels lying transposed in their storages and the position table within a longer one."""
    changed = {
        name: value.t().contiguous().t() if value.dim() == 2 and ".c_" in name else value
        for name, value in state.items()
    }
    wpe = state["transformer.wpe.weight"]
    changed["transformer.wpe.weight"] = torch.cat([wpe + 1, wpe, wpe + 2])[len(wpe) : 2 * len(wpe)]
    assert not changed["transformer.h.0.mlp.c_fc.weight"].is_contiguous()
    return changed


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("how", ["plain", "compiled", "turned", "masks", "trained"])
def test_what_torch_saved_is_read(how: str, bias: bool, tmp_path: pathlib.Path) -> None:
    args = {**SHAPE, "bias": bias, "dropout": 0.1}
    model = their_model(args)
    if how == "trained":
        optimizer_after_steps(model)
    state = model.state_dict()
    if how == "compiled":
        state = {f"_orig_mod.{name}": value for name, value in state.items()}
    if how == "turned":
        state = turned(state)
    if how == "masks":
        T = SHAPE["block_size"]
        state |= {f"transformer.h.{i}.attn.bias": torch.ones(T, T).tril()[None, None] for i in range(SHAPE["n_layer"])}
    save(tmp_path, model, args, state)
    found = read_nanogpt(tmp_path)
    assert (found.config.activation, found.config.bias, found.config.resid_pdrop) == ("gelu_erf", bias, 0.1)
    assert found.facts["training"] == "2,000 steps"
    assert found.facts["best held-out loss"] == "1.5000 nats per token"
    assert found.tokenizer.characters == CHARACTERS
    theirs = their_logits(model)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(our_logits(found.config, found.params), theirs, rtol=0, atol=TOLERANCE)
    # The other GELU is further off than what is allowed.
    tanh = dataclasses.replace(found.config, activation="gelu_tanh")
    assert np.abs(our_logits(tanh, found.params) - theirs).max() > TOLERANCE

    # Written again, each tensor has the same bits.
    again = tmp_path / "again"
    again.mkdir()
    write_nanogpt(again, found)
    written = torch.load(again / "ckpt.pt", weights_only=True)["model"]
    saved = model.state_dict()
    assert written.keys() == saved.keys()
    for name, value in saved.items():
        assert written[name].dtype == value.dtype
        assert written[name].numpy().tobytes() == value.numpy().tobytes()


@pytest.mark.parametrize(
    ("dtype", "tolerance", "bias"),
    [("float32", TOLERANCE, True), ("float32", TOLERANCE, False), ("float16", 0.1, True), ("bfloat16", 0.5, True)],
)
def test_torch_loads_what_is_written(dtype: str, tolerance: float, bias: bool, tmp_path: pathlib.Path) -> None:
    shape = {**SHAPE, "n_positions": SHAPE["block_size"]}
    del shape["block_size"]
    config = ModelConfig(**shape, bias=bias, activation="gelu_erf", initializer_range=0.25)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * np.random.default_rng(leaf.size).standard_normal(leaf.shape).astype(np.float32),
        init_params(gpt2_jax.GPT2(config), jax.random.key(0)),
    )
    params["wte"]["embedding"] = params["wte"]["embedding"].at[config.vocab_size :].set(0)
    bundle = Bundle(config, params, tokenizer_from_characters(CHARACTERS))
    write_nanogpt(tmp_path, bundle, dtype)

    # As nanoGPT's sample.py does.
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state = checkpoint["model"]
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    assert state["lm_head.weight"].dtype == getattr(torch, dtype)
    model = GPT(**checkpoint["model_args"]).eval()
    model.load_state_dict(state)
    ours, theirs = our_logits(config, params), their_logits(model)
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance)
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert "".join(meta["itos"][meta["stoi"][character]] for character in CHARACTERS) == CHARACTERS

    if dtype == "float32":
        back = read_nanogpt(tmp_path)
        assert jax.tree.all(
            jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), back.params, bundle.params)
        )
