"""GPT-2 on torch as nanoGPT shapes it, with given weights: the peer of the training benchmarks.

One fused projection to queries, keys and values, torch's fused attention, a tied head over logits that exist whole,
fused AdamW in two groups, clipping, and gradients set to None: what nanoGPT's documentation and torch's advise.

Shapes: B batch, T length, D width, H heads, K head dimension, V vocabulary.
"""

import contextlib
import math
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gpt2_jax.config import ModelConfig, OptimizerConfig


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.heads, self.attn_pdrop, self.resid_pdrop = config.n_head, config.attn_pdrop, config.resid_pdrop

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        thirds = self.c_attn(x_BTD).split(D, dim=2)
        q_BHTK, k_BHTK, v_BHTK = (third.view(B, T, self.heads, D // self.heads).transpose(1, 2) for third in thirds)
        rate = self.attn_pdrop if self.training else 0.0
        out_BHTK = functional.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, dropout_p=rate, is_causal=True)
        out_BTD = self.c_proj(out_BHTK.transpose(1, 2).reshape(B, T, D))
        return functional.dropout(out_BTD, self.resid_pdrop, self.training)


class _Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.resid_pdrop = config.resid_pdrop

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        out_BTD = self.c_proj(functional.gelu(self.c_fc(x_BTD), approximate=self.approximate))
        return functional.dropout(out_BTD, self.resid_pdrop, self.training)


class _Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        epsilon, bias = config.layer_norm_epsilon, config.bias
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=epsilon, bias=bias)
        self.attn = _Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=epsilon, bias=bias)
        self.mlp = _Mlp(config)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class TorchGPT2(nn.Module):
    """The model; the names of its parameters are Hugging Face's, kernels are `[out, in]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.embd_pdrop = config.embd_pdrop
        residual_std = config.initializer_range / math.sqrt(2 * config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=residual_std if "c_proj" in name else config.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes weights under Hugging Face's names, whose kernels are `[in, out]`."""
        for name, parameter in self.named_parameters():
            value = torch.from_numpy(np.array(tensors[name]))
            with torch.no_grad():
                parameter.copy_(value.T if parameter.ndim == 2 and not name.startswith(("wte", "wpe")) else value)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = functional.dropout(self.wte(tokens_BT) + self.wpe(positions_T), self.embd_pdrop, self.training)
        for block in self.h:
            x_BTD = block(x_BTD)
        logits_BTV = functional.linear(self.ln_f(x_BTD), self.wte.weight)
        return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class TorchTrainer:
    """Model, optimizer and step.

    Attributes:
      model: the module.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        compiled: bool = False,
        block_by_block: bool = False,
    ) -> None:
        """`dtype` is that of the matrix products, by autocast; parameters stay float32.

        `block_by_block` compiles one block for all, in a fraction of the time that the whole model takes.
        """
        self.model = TorchGPT2(config).to(device).train()
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (optimizer.b1, optimizer.b2)
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optimizer.learning_rate,
            betas=betas,
            eps=optimizer.eps,
            fused=True,
        )
        self._clip_norm = optimizer.clip_norm
        self._forward = self.model
        if compiled and block_by_block:
            for block in self.model.h:
                block.compile()
        elif compiled:
            self._forward = torch.compile(self.model)
        self._context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if dtype != "float32":
            self._context = torch.autocast(device, dtype=getattr(torch, dtype))

    def step(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, learning_rate: float | None = None
    ) -> torch.Tensor:
        """One update; the loss before it, on the device."""
        if learning_rate is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
        with self._context:
            loss = self._forward(tokens_BT, targets_BT)
        loss.backward()
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def free(self) -> None:
        """Gives the memory of parameters and optimizer back; the trainer can do nothing more."""
        self._optimizer.state.clear()
        self.model.to("meta")


def torch_matmul_rate(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of torch's float32 product, as `run.hardware.measured_matmul_rate` measures ours."""
    a = torch.ones(size, size)
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, a)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
