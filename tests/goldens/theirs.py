"""What torch and transformers compute for a case.

Shapes: B batch, T length, V vocabulary.
"""

import functools

import numpy as np
import torch
import transformers
from goldens.cases import STEPS, Case, token_stream, weight, without_key_bias
from goldens.stored import Golden, chosen, sketch


class Theirs:
    """transformers' GPT-2 with the weights of a case; `attention` is `eager` or `sdpa`."""

    def __init__(self, case: Case, attention: str = "eager") -> None:
        config = transformers.GPT2Config(
            **case.model,
            **{"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
            **{"bos_token_id": 0, "eos_token_id": 0},
            attn_implementation=attention,
        )
        self._case = case
        self._model = transformers.GPT2LMHeadModel(config).train()
        assert self._model.config._attn_implementation == attention
        # A tied parameter is named once, so the output head is the token table here.
        self._parameters = {
            name.removeprefix("transformer."): parameter for name, parameter in self._model.named_parameters()
        }
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(weight(case, name, tuple(parameter.shape))))
        # Rows of T targets; each starts with the last token of the one before.
        T, tokens = case.length, token_stream(case).astype(np.int64)
        rows = np.stack([tokens[at : at + T + 1] for at in range(0, len(tokens) - 1, T)])
        self._batches = torch.tensor(rows).split(case.batch_size)
        assert len(self._batches) == STEPS

    @property
    def logits(self) -> np.ndarray:
        """Of the first batch, `[B, T, V]`."""
        return self._first[0]

    @property
    def loss(self) -> float:
        """Of the first batch, the mean over its targets."""
        return self._first[1]

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        """Of the first batch, by Hugging Face's name."""
        return self._first[2]

    @functools.cached_property
    def losses(self) -> list[float]:
        """The mean loss of each batch before the step that is made with it; the model has other weights then."""
        first = [self.loss]  # while the weights are the first ones
        matrices = [parameter for parameter in self._parameters.values() if parameter.ndim == 2]
        vectors = [parameter for parameter in self._parameters.values() if parameter.ndim == 1]
        settings = self._case.optimizer
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings["learning_rate"],
            betas=(settings["b1"], settings["b2"]),
            eps=settings["eps"],
        )
        losses = []
        for rows in self._batches:
            losses.append(self._backward(rows)[1])
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), settings["clip_norm"])
            optimizer.step()
        assert losses[:1] == first
        return losses

    def golden(self) -> Golden:
        """What is kept of all this."""
        gradients, _ = without_key_bias(self.gradients)
        sketches = {name: sketch(name, gradient) for name, gradient in gradients.items()}
        return Golden(chosen(self.logits), np.array(self.losses), sketches)

    @functools.cached_property
    def _first(self) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        logits_BTV, loss = self._backward(self._batches[0])
        return logits_BTV, loss, {name: p.grad.numpy().copy() for name, p in self._parameters.items()}

    def _backward(self, rows: torch.Tensor) -> tuple[np.ndarray, float]:
        """Gradients of one batch. transformers shifts the targets itself; the last token of a row is only a target."""
        self._model.zero_grad()
        result = self._model(rows, labels=rows)
        result.loss.backward()
        return result.logits[:, :-1].detach().numpy(), result.loss.item()
