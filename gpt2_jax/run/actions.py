"""What the loop does besides training: report, evaluate, save, sample."""

import itertools
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.config import MeshConfig, RunConfig
from gpt2_jax.data.batches import EvaluationBatches
from gpt2_jax.decoding.generate import Generator
from gpt2_jax.decoding.settings import Sampling, Stopping
from gpt2_jax.errors import DivergedError
from gpt2_jax.evaluation.held_out import held_out_loss
from gpt2_jax.fault_points import reach
from gpt2_jax.model.gpt2 import GPT2, Params
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.hardware import flops_per_token, memory_in_use, peak_flops
from gpt2_jax.run.loop import HostBatch, Interval
from gpt2_jax.run.metrics import MetricWriter
from gpt2_jax.run.progress import Progress
from gpt2_jax.sharding import make_mesh, use_mesh
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.steps import StepSettings
from gpt2_jax.training.train_state import TrainState

SAMPLE_TOKENS = 256
_SAMPLING = Sampling(temperature=0.8)


class Report:
    """Turns the sums of an interval into numbers, for the files and for the eye."""

    def __init__(self, config: RunConfig, mesh: Mesh, writers: Sequence[MetricWriter], progress: Progress) -> None:
        self._steps = config.train.steps
        self._tokens_per_step = config.train.batch_size * config.context_length
        self._flops = flops_per_token(config.model, config.context_length)
        device = mesh.local_devices[0]
        peak = peak_flops(device)
        # The devices of a CPU share the cores on which its rate was measured.
        self._peak = peak if peak is None or device.platform == "cpu" else peak * mesh.size
        self._writers, self._progress = writers, progress

    def __call__(self, step: int, metrics: dict[str, float], interval: Interval) -> None:
        """See `loop.train`."""
        rate = interval.tokens / interval.seconds
        values = {
            "loss": interval.loss_sum / interval.weight_sum if interval.weight_sum else math.nan,
            "learning_rate": metrics["learning_rate"],
            "grad_norm": metrics["grad_norm"],
            "tokens": float(step * self._tokens_per_step),
            "tokens_per_second": rate,
            "memory_gib": memory_in_use() / 2**30,
        }
        if self._peak is not None:
            values["mfu"] = rate * self._flops / self._peak
        if "loss_scale" in metrics:
            values |= {"loss_scale": metrics["loss_scale"], "skipped_steps": interval.skipped}
        for writer in self._writers:
            writer.write(step, values)
        self._progress.report(step, values, (self._steps - step) * interval.seconds / interval.steps)


class Evaluate:
    """Measures the held-out loss."""

    def __init__(
        self,
        settings: StepSettings,
        mesh: Mesh,
        batches: EvaluationBatches,
        writers: Sequence[MetricWriter],
        progress: Progress,
    ) -> None:
        self._settings, self._mesh, self._batches = settings, mesh, batches
        self._writers, self._progress = writers, progress
        self.losses: dict[int, float] = {}

    def __call__(self, step: int, state: TrainState) -> None:
        """See `loop.Action`. Raises DivergedError for a loss that is not finite."""
        reach("evaluate")
        values = self._measure(step, state.eval_params, self._batches)
        self.losses[step] = values["held_out_loss"]
        for writer in self._writers:
            writer.write(step, values)
        self._progress.say(
            f"step {step}: held-out loss {values['held_out_loss']:.4f} (perplexity {values['held_out_perplexity']:.2f})"
        )

    def check(self, step: int, state: TrainState) -> None:
        """Raises DivergedError when the loss of what is trained is not finite; one batch shows that."""
        if state.ema is not None or step not in self.losses:
            self._measure(step, state.params, itertools.islice(self._batches, 1))

    def _measure(self, step: int, params: Params, batches: Iterable[HostBatch]) -> dict[str, float]:
        values = held_out_loss(
            params,
            batches,
            model=self._settings.model,
            mesh=self._mesh,
            loss_chunk=self._settings.loss_chunk,
        )
        loss = values["held_out_loss"]
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {step}: held-out loss {loss:.4g}: not finite; the saved steps before it are intact; in another "
                "--workdir, lower optimizer.learning_rate or lengthen optimizer.warmup_steps"
            )
        return values


class Save:
    """Saves the state, with its held-out loss where that was measured."""

    def __init__(self, checkpoints: Checkpoints, meta: dict[str, Any], evaluate: Evaluate) -> None:
        self._checkpoints, self._meta, self._evaluate = checkpoints, meta, evaluate
        self._saved = 0

    def __call__(self, step: int, state: TrainState) -> None:
        """See `loop.Action`; does nothing where the step is saved already."""
        if step == self._saved:
            return
        # An update with a finite loss and gradient can still ruin the parameters, which only the next step would show.
        self._evaluate.check(step, state)
        self._checkpoints.save(state, self._meta, self._evaluate.losses.get(step))
        self._saved = step


class Sample:
    """Lets the model write a text, started by end-of-text (without one: by the first held-out token)."""

    def __init__(
        self,
        config: RunConfig,
        model: GPT2,
        mesh: Mesh,
        tokenizer: Tokenizer,
        start: int,
        folder: pathlib.Path,
        progress: Progress,
    ) -> None:
        self._model, self._mesh, self._tokenizer, self._start = model, mesh, tokenizer, start
        self._seed = config.seed
        # Positions that training does not reach know nothing.
        self._stopping = Stopping(max_new_tokens=max(1, min(config.context_length - 1, SAMPLE_TOKENS)))
        self._folder, self._progress = folder / "samples", progress

    def __call__(self, step: int, state: TrainState) -> None:
        """See `loop.Action`."""
        params, mesh = state.eval_params, self._mesh
        if jax.process_count() > 1:
            # What is drawn is read token by token, which wants it on one host.
            params, mesh = whole(params), make_mesh(MeshConfig(), jax.local_devices()[:1])
            if jax.process_index() > 0:
                return
        with use_mesh(mesh):
            generator = Generator(self._model.config, params, self._tokenizer, mesh=mesh)
            (sample,) = generator.generate(
                [[self._start]], sampling=_SAMPLING, stopping=self._stopping, seed=(self._seed + step) % 2**31
            )
        self._folder.mkdir(exist_ok=True)
        write_text_atomically(self._folder / f"step_{step:07d}.txt", sample.text)
        self._progress.say(f"--- sample after step {step}\n{sample.text}\n---")


def whole(params: Params) -> Params:
    """The parameters on the first device of process 0, from wherever they are; all processes must call this together.

    The other processes get nothing.
    """
    keep = jax.process_index() == 0

    def gathered(leaf: jax.Array) -> Any:
        found = multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_put(found, jax.local_devices()[0]) if keep else None

    return jax.tree.map(gathered, params)
