"""A whole run: data, mesh, model, state, loop, and what is left behind. The only place where the parts are wired."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import from_json, to_json, values_by_key
from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.errors import UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.model.gpt2 import padded_vocab_size, parameter_count
from gpt2_jax.remote_folder import address_of, push
from gpt2_jax.run.accelerators import check_accelerator_is_used
from gpt2_jax.run.actions import Evaluate, Report, Sample, Save, whole
from gpt2_jax.run.bundle import export_best, training_facts
from gpt2_jax.run.changes import DATA, TOKENIZER, Change, check_changes
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.compile_cache import set_compile_cache
from gpt2_jax.run.first_state import first_state
from gpt2_jax.run.folders import RunFolders, run_folders
from gpt2_jax.run.hosts import HostOptions, Hosts, code_version, joined
from gpt2_jax.run.interrupt import interrupt_held_back
from gpt2_jax.run.loop import Action, HostBatch, train
from gpt2_jax.run.metrics import JsonLines, MetricWriter, Mirror, TensorBoard, WeightsAndBiases
from gpt2_jax.run.out_of_memory import out_of_memory_told
from gpt2_jax.run.picture import draw_losses
from gpt2_jax.run.preemption import preemption_noticed
from gpt2_jax.run.progress import Progress
from gpt2_jax.run.run_data import cut_batches, data_changes, open_data, with_vocabulary, with_vocabulary_of_source
from gpt2_jax.run.run_folder import holds_run, read_changes, read_config, write_run
from gpt2_jax.run.step_settings import make_settings, with_attention
from gpt2_jax.run.xla_flags import set_compiler_flags
from gpt2_jax.sharding import check_divisible, make_mesh, use_mesh
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.steps import StepSettings
from gpt2_jax.training.train_state import abstract_state


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
      checkpoints: folder of the checkpoints, which all hosts share; empty: in the run folder.
      hosts: how the processes of the run find one another.
      allow_change: what a resumed run may change; see `changes.allowed_names`.
    """

    workdir: str
    config_flags: tuple[str, ...]
    tensorboard: bool = False
    wandb: str = ""
    profile: tuple[int, int] | None = None
    compile_cache: str = ""
    checkpoints: str = ""
    hosts: HostOptions = dataclasses.field(default_factory=HostOptions)
    allow_change: frozenset[str] = frozenset()


def run(config: RunConfig, options: RunOptions) -> None:
    """Trains in `options.workdir`, or resumes what is there, up to `train.steps`.

    Raises:
      UsageError, DataError, DivergedError: one line for the user; see errors.py.
      PreemptedError: SIGTERM asked for room; the run is saved.
      OtherHostError: another process of the run cannot start.
    """
    if options.profile is not None and options.profile[1] > config.train.steps:
        first, last = options.profile
        raise UsageError(f"--profile={first}:{last}: the run has only train.steps={config.train.steps} steps")
    _check_mirrors(options)
    with joined(options.hosts) as hosts:
        hosts.check_equal(_facts(config, options))
        with hosts.together():
            check_accelerator_is_used()
        with run_folders(hosts, options.workdir, options.checkpoints) as folders, out_of_memory_told(config):
            _run(config, options, hosts, folders)


def _run(config: RunConfig, options: RunOptions, hosts: Hosts, folders: RunFolders) -> None:
    set_compile_cache(options.compile_cache)
    folder = folders.run
    flags = set_compiler_flags(jax.devices())
    with hosts.together():
        mesh = make_mesh(config.mesh)
        check_divisible(config, mesh)
        changes: list[Change] = []
        if hosts.first:
            config, changes = _settled(config, folder, options.allow_change)
    config = from_json(hosts.gather(to_json(config))[0])
    with hosts.together():
        store = open_data(config, folder, options.allow_change)
        tokenizer = store.tokenizer
        config = with_vocabulary(config, tokenizer.vocab_size)
        check_divisible(config, mesh, padded_vocab_size(config.model.vocab_size))
        train_batches, held_out_batches = cut_batches(config, store, mesh)
    fingerprints = {"data_fingerprint": store.fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    hosts.check_equal(fingerprints)
    earlier: list[dict[str, Any]] = []
    with hosts.together():
        if hosts.first and holds_run(folder):
            earlier = read_changes(folder)
            changes += data_changes(folder, store)
    left = json.loads(hosts.gather(json.dumps(_left_fingerprints(earlier, changes)))[0])

    with hosts.together():
        as_run, attention = with_attention(config, mesh.devices.flat[0])
    settings = make_settings(as_run, mesh)
    steps = config.train.steps
    with contextlib.ExitStack() as stack:
        interrupt_if_asked = stack.enter_context(interrupt_held_back())
        preempted = stack.enter_context(preemption_noticed())
        stack.enter_context(use_mesh(mesh))
        if hosts.first:
            stack.callback(push, folder)  # last, whatever happens
        checkpoints = Checkpoints(folders.checkpoints, config.checkpoint)
        stack.callback(checkpoints.close)
        state = first_state(config, settings, mesh, checkpoints, fingerprints, left)
        start = int(state.step)
        with hosts.together():
            # Only now, when nothing can be refused any more: from here on the folder holds a run with these settings.
            if hosts.first:
                tokenizer.save(folder / "tokenizer")
                data = {"folder": str(store.folder), "fingerprint": store.fingerprint}
                write_run(folder, config, data, [*earlier, *({"step": start, **vars(change)} for change in changes)])
                push(folder)
            writers = _writers(folder, options, config, start) if hosts.first else []
        for writer in writers:
            stack.callback(writer.close)
        progress = Progress(start, steps, None if hosts.first else stack.enter_context(open(os.devnull, "w")))
        stack.callback(progress.close)
        if options.profile is not None and options.profile[1] <= start:
            progress.say(f"--profile: its steps were done before; the run goes on after step {start}")
        progress.say(_summary(config, store, train_batches, mesh, attention, flags, folder, start))
        if changes:
            progress.say(f"changed   {', '.join(map(str, changes))}: allowed, and recorded in run.json")

        evaluate = Evaluate(settings, mesh, held_out_batches, writers, progress)
        save = Save(checkpoints, {"config": dataclasses.asdict(config), **fingerprints}, evaluate)
        end_of_text = tokenizer.end_of_text
        first = int(store.split("held_out").read(0, 1)[0]) if end_of_text is None else end_of_text
        sample = Sample(config, settings.model, mesh, tokenizer, first, folder, progress)
        batches = _interruptible(train_batches.iterate(start, steps), interrupt_if_asked)
        train(
            state,
            _profiled(batches, options.profile if hosts.first else None, folder / "profile"),
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
                *([Action(config.checkpoint.every, lambda step, state: push(folder))] if hosts.first else []),
            ),
            preempted=preempted,
            save=save,
        )
    best = _best(config, settings, mesh, tokenizer, folders) if hosts.count > 1 else None
    with hosts.together():
        if hosts.first:
            draw_losses(folder / "metrics.jsonl", folder / "loss.png")
            if config.checkpoint.export_best:
                export_best(folder, config, best)
            push(folder)
            print(_farewell(config, options, folder, evaluate.losses, start), flush=True)


def _facts(config: RunConfig, options: RunOptions) -> dict[str, str]:
    """What must be the same on all hosts. Where they keep token stores may differ."""
    settings = {f"config.{key}": repr(value) for key, value in values_by_key(config).items() if key != "data.cache_dir"}
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    flags = {"--allow_change": ",".join(sorted(options.allow_change)) or "nothing"}
    return {"gpt2_jax": code_version(), **packages, **flags, **settings}


def _settled(config: RunConfig, folder: pathlib.Path, allowed: frozenset[str]) -> tuple[RunConfig, list[Change]]:
    """The config as the run in `folder` has it, or the model that it starts from; and what is allowed to change."""
    if not holds_run(folder):
        return with_vocabulary_of_source(config), []
    stored = read_config(folder)
    if not config.model.vocab_size:
        config = with_vocabulary(config, stored.model.vocab_size)
    return config, check_changes(stored, config, allowed, address_of(folder))


def _left_fingerprints(earlier: list[dict[str, Any]], changes: list[Change]) -> dict[str, list[str]]:
    """The fingerprints that the run was allowed to leave, by the names under which saves carry them."""
    left: dict[str, list[str]] = {f"{name}_fingerprint": [] for name in (DATA, TOKENIZER)}
    for change in [*earlier, *map(vars, changes)]:
        if change["key"] in (DATA, TOKENIZER):
            left[f"{change['key']}_fingerprint"].append(change["before"])
    return left


def _best(
    config: RunConfig, settings: StepSettings, mesh: Mesh, tokenizer: Tokenizer, folders: RunFolders
) -> Bundle | None:
    """The best save, whole, in process 0; all processes must call this together. None in the others."""
    if not config.checkpoint.export_best:
        return None
    with contextlib.closing(Checkpoints(folders.checkpoints)) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            return None
        abstract = abstract_state(settings.model, settings.optimizer, mesh, ema=False)
        params = whole(checkpoints.restore_params(step, abstract.params))
    if jax.process_index() > 0:
        return None
    return Bundle(config.model, params, tokenizer, training_facts(config, folders.run, step))


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
        writers.append(Mirror("--tensorboard", lambda: TensorBoard(folder / "tensorboard", start)))
    if options.wandb:
        writers.append(Mirror("--wandb", lambda: WeightsAndBiases(folder, options.wandb, config)))
    return writers


def _summary(
    config: RunConfig,
    store: TokenStore,
    batches: TrainBatches,
    mesh: Mesh,
    attention: str,
    flags: list[str],
    folder: pathlib.Path,
    start: int,
) -> str:
    device = mesh.local_devices[0]
    steps, batch_size = config.train.steps, config.train.batch_size
    epochs = steps * batch_size / batches.num_windows
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    resumed = f", resumed after step {start}" if start else ""
    return "\n".join(
        [
            f"run       {address_of(folder)}{resumed}",
            f"data      {config.data.source}: {len(store.split('train')):,} training tokens, "
            f"{len(store.split('held_out')):,} held out; tokenizer {store.tokenizer.name}, "
            f"{store.tokenizer.vocab_size:,} ids",
            f"model     {parameter_count(config.model):,} parameters, {config.model.dtype}",
            f"training  {steps:,} steps of {batch_size * config.context_length:,} tokens, {epochs:.3g} epochs",
            f"devices   {device.device_kind}, mesh {axes}",
            f"compiler  attention {attention}; flags: {'; '.join(flags) or 'none'}",
        ]
    )


def _farewell(
    config: RunConfig, options: RunOptions, folder: pathlib.Path, losses: dict[int, float], start: int
) -> str:
    lines, where = [], address_of(folder)
    if start >= config.train.steps:
        lines.append(f"{where} was done already: {start} of {config.train.steps} steps")
    elif losses:
        lines.append(f"held-out loss {losses[max(losses)]:.4f} after step {max(losses)}")
    load = f"import gpt2_jax; config, params, tokenizer = gpt2_jax.load({json.dumps(where)}); print(config.model)"
    finetune = [
        *options.config_flags,
        f"--workdir={address_of(folder.parent / folder.resolve().name)}-finetuned",
        f"--config.init_from={where}",
        f"--config.optimizer.learning_rate={config.optimizer.learning_rate / 10:g}",
    ]
    if config.checkpoint.export_best:
        lines.append(f"the best parameters, for transformers and others, {where}/huggingface")
    lines += [
        f"loss curve {where}/loss.png, numbers {where}/metrics.jsonl, samples {where}/samples",
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
