"""What this package computes for a case, by the way that a training run goes: windows, `make_settings`, `train_step`.

Shapes: B batch, T length, V vocabulary.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from goldens.cases import STEPS, Case, token_stream, weight

from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.data.token_store import Shard, TokenStream
from gpt2_jax.data.windows import PackedWindows
from gpt2_jax.exchange.names import params_from_tensors, tensors, tensors_from_params
from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.run.step_settings import make_settings
from gpt2_jax.sharding import make_mesh, place_batch, use_mesh
from gpt2_jax.training.steps import train_step
from gpt2_jax.training.train_state import sharded_state


class Ours:
    """The model of a case with its weights, trained on its batches; `folder` takes the tokens."""

    def __init__(self, case: Case, folder: pathlib.Path) -> None:
        model = ModelConfig(**case.model, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        self.config = RunConfig(
            model=model,
            optimizer=OptimizerConfig(**case.optimizer),
            train=TrainConfig(steps=STEPS, batch_size=case.batch_size, context_length=case.length),
        )
        shapes = {tensor.name: tensor.shape for tensor in tensors(model)}
        self._params = params_from_tensors(model, lambda name: weight(case, name, shapes[name]))
        self._windows = _windows(case, folder)
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """Of the first batch, `[B, T, V]`."""
        apply = jax.jit(GPT2(self.config.model).apply)
        return np.asarray(apply({"params": self._params}, self._batch(0)["tokens"]))

    @property
    def losses(self) -> list[float]:
        """The mean loss of each batch before the step that is made with it."""
        return self._trained[0]

    @functools.cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        """Of the first step, by Hugging Face's name; the padding rows of the token table are left out."""
        return {tensor.name: value for tensor, value in tensors_from_params(self.config.model, self._trained[1])}

    @property
    def padding_gradients(self) -> np.ndarray:
        """Of the first step, of the padding rows of the token table."""
        return self._trained[1]["wte"]["embedding"][self.config.model.vocab_size :]

    @functools.cached_property
    def _trained(self) -> tuple[list[float], Params]:
        mesh, settings = self._mesh, make_settings(self.config, self._mesh)
        settings = dataclasses.replace(settings, optimizer=optax.chain(_kept_gradients(), settings.optimizer))
        losses, gradients = [], {}
        with use_mesh(mesh):
            state = sharded_state(settings.model, settings.optimizer, self._params, mesh)
            for step in range(self.config.train.steps):
                state, metrics = train_step(state, place_batch(self._batch(step), mesh), settings=settings)
                losses.append(float(metrics["loss_sum"]) / float(metrics["weight_sum"]))
                if step == 0:
                    gradients = jax.tree.map(np.array, state.opt_state[0])
        return losses, gradients

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        B = self.config.train.batch_size
        rows = [self._windows[index] for index in range(step * B, (step + 1) * B)]
        return {name: np.stack(parts) for name, *parts in zip(("tokens", "targets", "weights"), *rows, strict=True)}


def _kept_gradients() -> optax.GradientTransformation:
    """Passes gradients on as they are; its state is the last ones."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params), update=lambda grads, _state, _params: (grads, grads)
    )


def _windows(case: Case, folder: pathlib.Path) -> PackedWindows:
    tokens = token_stream(case)
    tokens.astype("<u2").tofile(folder / "tokens.bin")
    shard = Shard("tokens.bin", len(tokens), int(tokens.max()), "")
    return PackedWindows(TokenStream("train", folder, (shard,), np.dtype("<u2")), case.length)
