"""A whole run: data, mesh, model, state, loop, and what is left behind. The only place where the parts are wired."""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.errors import UsageError
from gpt2_jax.folder_lock import folder_lock
from gpt2_jax.model.gpt2 import GPT2, padded_vocab_size, parameter_count
from gpt2_jax.run.actions import Evaluate, Report, Sample, Save
from gpt2_jax.run.bundle import export_best
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.compile_cache import set_compile_cache
from gpt2_jax.run.first_state import first_state
from gpt2_jax.run.interrupt import interrupt_held_back
from gpt2_jax.run.loop import Action, HostBatch, train
from gpt2_jax.run.metrics import JsonLines, MetricWriter, TensorBoard, WeightsAndBiases
from gpt2_jax.run.picture import draw_losses
from gpt2_jax.run.progress import Progress
from gpt2_jax.run.run_data import cut_batches, open_data, with_vocabulary, with_vocabulary_of_source
from gpt2_jax.run.run_folder import check_unchanged, holds_run, make_folder, read_config, write_run
from gpt2_jax.sharding import check_divisible, make_mesh, use_mesh
from gpt2_jax.training.loss import choose_chunk
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.steps import StepSettings


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What does not change a run's numbers.

    Attributes:
      workdir: the run folder; made if need be, resumed if it holds a run.
      config_flags: the flags that the config came from, for the commands that the run proposes at its end.
      tensorboard: mirror the metrics for TensorBoard, in the run folder.
      wandb: project of Weights & Biases to mirror the metrics to; empty: none.
      profile: first and last step of a profiler trace, or None.
      compile_cache: folder of the persistent compilation cache; empty: none.
    """

    workdir: str
    config_flags: tuple[str, ...]
    tensorboard: bool = False
    wandb: str = ""
    profile: tuple[int, int] | None = None
    compile_cache: str = ""


def run(config: RunConfig, options: RunOptions) -> None:
    """Trains in `options.workdir`, or resumes what is there, up to `train.steps`.

    Raises:
      UsageError, DataError, DivergedError: one line for the user; see errors.py.
    """
    if options.profile is not None and options.profile[1] > config.train.steps:
        first, last = options.profile
        raise UsageError(f"--profile={first}:{last}: the run has only train.steps={config.train.steps} steps")
    _check_mirrors(options)
    folder = make_folder(options.workdir)
    with folder_lock(folder.resolve() / "run", wait=False):
        _run(config, options, folder)


def _run(config: RunConfig, options: RunOptions, folder: pathlib.Path) -> None:
    set_compile_cache(options.compile_cache)
    mesh = make_mesh(config.mesh)
    check_divisible(config, mesh)
    if holds_run(folder):
        stored = read_config(folder)
        if not config.model.vocab_size:
            config = with_vocabulary(config, stored.model.vocab_size)
        check_unchanged(stored, config, folder)
    else:
        config = with_vocabulary_of_source(config)
    store = open_data(config, folder)
    tokenizer = store.tokenizer
    config = with_vocabulary(config, tokenizer.vocab_size)
    check_divisible(config, mesh, padded_vocab_size(config.model.vocab_size))
    train_batches, held_out_batches = cut_batches(config, store)

    settings = make_settings(config, mesh)
    fingerprints = {"data_fingerprint": store.fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    steps = config.train.steps
    with contextlib.ExitStack() as stack:
        interrupt_if_asked = stack.enter_context(interrupt_held_back())
        stack.enter_context(use_mesh(mesh))
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
        stack.callback(checkpoints.close)
        state = first_state(config, settings, mesh, checkpoints, fingerprints)
        # Only now, when nothing can be refused any more: from here on the folder holds a run with these settings.
        tokenizer.save(folder / "tokenizer")
        write_run(folder, config, {"folder": str(store.folder), "fingerprint": store.fingerprint})
        start = int(state.step)
        writers = _writers(folder, options, config, start)
        for writer in writers:
            stack.callback(writer.close)
        progress = Progress(start, steps)
        stack.callback(progress.close)
        if options.profile is not None and options.profile[1] <= start:
            progress.say(f"--profile: its steps were done before; the run goes on after step {start}")
        progress.say(_summary(config, store, train_batches, mesh, folder, start))

        evaluate = Evaluate(settings, mesh, held_out_batches, writers, progress)
        save = Save(checkpoints, {"config": dataclasses.asdict(config), **fingerprints}, evaluate)
        end_of_text = tokenizer.end_of_text
        first = int(store.split("held_out").read(0, 1)[0]) if end_of_text is None else end_of_text
        sample = Sample(config, settings.model, mesh, tokenizer, first, folder, progress)
        batches = _interruptible(train_batches.iterate(start, steps), interrupt_if_asked)
        train(
            state,
            _profiled(batches, options.profile, folder / "profile"),
            settings=settings,
            mesh=mesh,
            last_step=steps,
            log_every=config.train.log_every,
            report=Report(config, mesh, writers, progress),
            advance=progress.advance,
            actions=(
                Action(config.train.eval_every, evaluate),
                Action(config.train.sample_every, sample),
                Action(config.checkpoint.every, save),  # last: a run that is killed goes on after what was saved
            ),
        )
    draw_losses(folder / "metrics.jsonl", folder / "loss.png")
    if config.checkpoint.export_best:
        export_best(folder, config)
    print(_farewell(config, options, folder, evaluate.losses, start), flush=True)


def make_settings(config: RunConfig, mesh: Mesh) -> StepSettings:
    """The model, optimizer and compile-time choices of a run; `model.vocab_size` must be filled in."""
    train_config = config.train
    chunk = train_config.loss_chunk
    if not chunk:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        tokens = train_config.batch_size // train_config.microbatches // shards * config.context_length
        vocab_rows = padded_vocab_size(config.model.vocab_size) // mesh.shape["tensor"]
        # The evaluation goes through the full context, whatever lengths training draws.
        chunk = choose_chunk(tokens, (*train_config.context_lengths, config.context_length), vocab_rows)
    return StepSettings(
        model=GPT2(config.model),
        optimizer=make_optimizer(config.optimizer, train_config.steps),
        schedule=learning_rate_schedule(config.optimizer, train_config.steps),
        seed=config.seed,
        microbatches=train_config.microbatches,
        loss_chunk=chunk,
        ema_decay=config.optimizer.ema_decay,
    )


def _check_mirrors(options: RunOptions) -> None:
    for flag, wanted, package, extra in (
        ("--tensorboard", options.tensorboard, "tensorboardX", "tensorboard"),
        ("--wandb", bool(options.wandb), "wandb", "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(f"{flag} needs {package}, which is not installed: pip install 'gpt2-jax[{extra}]'")


def _writers(folder: pathlib.Path, options: RunOptions, config: RunConfig, start: int) -> list[MetricWriter]:
    writers: list[MetricWriter] = [JsonLines(folder / "metrics.jsonl", start)]
    if options.tensorboard:
        writers.append(TensorBoard(folder / "tensorboard", start))
    if options.wandb:
        writers.append(WeightsAndBiases(folder, options.wandb, config))
    return writers


def _summary(
    config: RunConfig, store: TokenStore, batches: TrainBatches, mesh: Mesh, folder: pathlib.Path, start: int
) -> str:
    device = mesh.local_devices[0]
    steps, batch_size = config.train.steps, config.train.batch_size
    epochs = steps * batch_size / batches.num_windows
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    resumed = f", resumed after step {start}" if start else ""
    return "\n".join(
        [
            f"run       {folder}{resumed}",
            f"data      {config.data.source}: {len(store.split('train')):,} training tokens, "
            f"{len(store.split('held_out')):,} held out; tokenizer {store.tokenizer.name}, "
            f"{store.tokenizer.vocab_size:,} ids",
            f"model     {parameter_count(config.model):,} parameters, {config.model.dtype}",
            f"training  {steps:,} steps of {batch_size * config.context_length:,} tokens, {epochs:.3g} epochs",
            f"devices   {device.device_kind}, mesh {axes}",
        ]
    )


def _farewell(
    config: RunConfig, options: RunOptions, folder: pathlib.Path, losses: dict[int, float], start: int
) -> str:
    lines = []
    if start >= config.train.steps:
        lines.append(f"{folder} was done already: {start} of {config.train.steps} steps")
    elif losses:
        lines.append(f"held-out loss {losses[max(losses)]:.4f} after step {max(losses)}")
    load = f"import gpt2_jax; config, params, tokenizer = gpt2_jax.load({json.dumps(str(folder))}); print(config.model)"
    finetune = [
        *options.config_flags,
        f"--workdir={folder.parent / folder.resolve().name}-finetuned",
        f"--config.init_from={folder}",
        f"--config.optimizer.learning_rate={config.optimizer.learning_rate / 10:g}",
    ]
    if config.checkpoint.export_best:
        lines.append(f"the best parameters, for transformers and others, {folder / 'huggingface'}")
    lines += [
        f"loss curve {folder / 'loss.png'}, numbers {folder / 'metrics.jsonl'}, samples {folder / 'samples'}",
        "to use it, or to go on from it with a smaller rate (on your text: --config.data.source=text:GLOB):",
        f"  python -c {shlex.quote(load)}",
        f"  python train.py {shlex.join(finetune)}",
    ]
    return "\n".join(lines)


def _interruptible(
    batches: Iterator[tuple[int, HostBatch]], interrupt_if_asked: Callable[[], None]
) -> Iterator[tuple[int, HostBatch]]:
    for numbered in batches:
        interrupt_if_asked()
        yield numbered


def _profiled(
    batches: Iterator[tuple[int, HostBatch]], steps: tuple[int, int] | None, folder: pathlib.Path
) -> Iterator[tuple[int, HostBatch]]:
    """Hands on the batches while a profiler trace runs from the first to the last step of `steps`."""
    tracing = False
    try:
        for index, batch in batches:
            if steps is not None and not tracing and steps[0] <= index + 1 <= steps[1]:
                jax.profiler.start_trace(str(folder))
                tracing = True
            yield index, batch
            if tracing and steps is not None and index + 1 == steps[1]:
                jax.profiler.stop_trace()
                tracing = False
                print(f"profile of steps {steps[0]} to {steps[1]}: {folder}", file=sys.stderr)
    finally:
        if tracing:
            jax.profiler.stop_trace()
