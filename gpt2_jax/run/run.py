"""A whole run: data, mesh, model, state, loop, and what is left behind. The only place where the parts are wired."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import values_by_key
from gpt2_jax.data.skipped import skips_to_json
from gpt2_jax.errors import UsageError
from gpt2_jax.exchange.bundle import Bundle
from gpt2_jax.remote_folder import push
from gpt2_jax.run.accelerators import check_accelerator_is_used
from gpt2_jax.run.actions import Evaluate, Report, Sample, Save, whole
from gpt2_jax.run.agreed import agree
from gpt2_jax.run.bundle import export_best, training_facts
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.compile_cache import set_compile_cache
from gpt2_jax.run.diagnosis import Diagnosis
from gpt2_jax.run.first_state import first_state
from gpt2_jax.run.fit_memory import memory_limit, with_memory_fitted
from gpt2_jax.run.folders import RunFolders, run_folders
from gpt2_jax.run.hosts import HostOptions, Hosts, code_version, joined
from gpt2_jax.run.leaving import leaving, sigterm_raises
from gpt2_jax.run.loop import Action, HostBatch, train
from gpt2_jax.run.messages import farewell, summary
from gpt2_jax.run.metrics import JsonLines, MetricWriter, Mirror, TensorBoard, WeightsAndBiases
from gpt2_jax.run.out_of_memory import out_of_memory_told
from gpt2_jax.run.picture import draw_losses
from gpt2_jax.run.progress import Progress
from gpt2_jax.run.rewind import Rewind, move_later_saves
from gpt2_jax.run.run_folder import write_run
from gpt2_jax.run.saved_metrics import mend_metrics
from gpt2_jax.run.step_settings import for_device, make_settings
from gpt2_jax.run.step_watch import StepWatch
from gpt2_jax.run.watchdog import LONG, Watchdog
from gpt2_jax.run.xla_flags import set_compiler_flags
from gpt2_jax.sharding import check_divisible, make_mesh, use_mesh
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.steps import StepSettings
from gpt2_jax.training.train_state import TrainState, abstract_state


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
      watchdog: seconds after which a step that does not end ends the process; 0: never.
      checkpoints: folder of the checkpoints, which all hosts share; empty: in the run folder.
      steal_lock: take the run folder, and that of the checkpoints, from whatever job holds them.
      hosts: how the processes of the run find one another.
      allow_change: what a resumed run may change; see `changes.allowed_names`.
      rewind: go back to a saved step, and leave out the batches that came next.
      malloc: what was done about the allocator, for the log.
    """

    workdir: str
    config_flags: tuple[str, ...]
    tensorboard: bool = False
    wandb: str = ""
    profile: tuple[int, int] | None = None
    compile_cache: str = ""
    watchdog: float = 0
    checkpoints: str = ""
    steal_lock: bool = False
    hosts: HostOptions = dataclasses.field(default_factory=HostOptions)
    allow_change: frozenset[str] = frozenset()
    rewind: Rewind | None = None
    malloc: str = "system"


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
    with sigterm_raises(), joined(options.hosts) as hosts:
        hosts.check_equal(_facts(config, options))
        with hosts.together():
            check_accelerator_is_used()
        held = run_folders(hosts, options.workdir, options.checkpoints, steal=options.steal_lock)
        with held as folders:
            _run(config, options, hosts, folders)


def _run(config: RunConfig, options: RunOptions, hosts: Hosts, folders: RunFolders) -> None:
    set_compile_cache(options.compile_cache)
    folder = folders.run
    flags = set_compiler_flags(jax.devices())
    with hosts.together():
        mesh = make_mesh(config.mesh)
        check_divisible(config, mesh)
    agreed = agree(config, hosts, folder, mesh, options.allow_change, options.rewind)
    config, store, tokenizer = agreed.config, agreed.store, agreed.store.tokenizer

    with hosts.together():
        as_run, choices = for_device(config, mesh.devices.flat[0])
    limit = min(map(int, hosts.gather(str(memory_limit(mesh.local_devices[0])))))
    as_run, fitted = with_memory_fitted(
        as_run, mesh, limit, largest=lambda peak: max(map(float, hosts.gather(str(peak))))
    )
    settings = make_settings(as_run, mesh)
    steps = config.train.steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(out_of_memory_told(as_run))
        stack.enter_context(use_mesh(mesh))
        if hosts.first:
            stack.callback(_send, folders)  # last, whatever happens
        with hosts.together():
            if hosts.first:
                mend_metrics(folders.checkpoints)
                if agreed.rewind is not None:
                    folders.check_held()
                    move_later_saves(folder, folders.checkpoints, agreed.rewind)
        watchdog = Watchdog(options.watchdog)
        stack.callback(watchdog.close)
        checkpoints = Checkpoints(folders.checkpoints, config.checkpoint)
        stack.callback(checkpoints.close)
        state = first_state(
            config, settings, mesh, checkpoints, agreed.fingerprints, agreed.left_fingerprints, hosts.gather
        )
        start = int(state.step)
        if hosts.first:
            checkpoints.check_space(state)
        with hosts.together():
            # Only now, when nothing can be refused any more: from here on the folder holds a run with these settings.
            if hosts.first:
                folders.check_held()
                tokenizer.save(folder / "tokenizer")
                data = {"folder": str(store.folder), "fingerprint": store.fingerprint}
                write_run(folder, config, data, agreed.all_changes(start), agreed.skips)
                _send(folders)
            writers = _writers(folder, options, config, start) if hosts.first else []
        for writer in writers:
            stack.callback(writer.close)
        progress = Progress(start, steps, None if hosts.first else stack.enter_context(open(os.devnull, "w")))
        stack.callback(progress.close)
        if options.profile is not None and options.profile[1] <= start:
            progress.say(f"--profile: its steps were done before; the run goes on after step {start}")
        progress.say(
            summary(
                config, store, agreed.train_batches, mesh, f"{choices}; {fitted}", options.malloc, flags, folder, start
            )
        )
        for line in agreed.notes():
            progress.say(line)

        evaluate = Evaluate(settings, mesh, agreed.held_out_batches, writers, progress)
        meta = {"config": dataclasses.asdict(config), **agreed.fingerprints, "skipped": skips_to_json(agreed.skips)}
        write = Save(checkpoints, meta, evaluate)

        def save(step: int, state: TrainState) -> None:
            folders.check_held()
            write(step, state)

        end_of_text = tokenizer.end_of_text
        first = int(store.split("held_out").read(0, 1)[0]) if end_of_text is None else end_of_text
        sample = Sample(config, settings.model, mesh, tokenizer, first, folder, progress)
        watch = StepWatch(config.train, int(state.nonfinite_steps), agreed.train_batches, store, folder, progress)
        profiled_steps = options.profile if hosts.first else None
        batches = _profiled(agreed.train_batches.iterate(start, steps), profiled_steps, folder / "profile")

        def advance(step: int) -> None:
            checkpoints.check()  # what fails in the background ends the run here, not at the next save
            folders.check_held()
            progress.advance(step)

        leave = stack.enter_context(leaving(hosts))
        train(
            state,
            batches,
            settings=settings,
            mesh=mesh,
            last_step=steps,
            log_every=config.train.log_every,
            report=Report(config, mesh, writers, progress),
            advance=advance,
            actions=(
                Action(config.train.eval_every, evaluate),
                Action(config.train.sample_every, sample),
                Action(config.checkpoint.every, save),  # last: a run that is killed goes on after what was saved
                *([Action(config.checkpoint.every, lambda step, state: _send(folders))] if hosts.first else []),
            ),
            leave=leave,
            save=save,
            explain=Diagnosis(settings, mesh, agreed.train_batches),
            watchdog=watchdog,
            observe=watch if hosts.first else lambda step, values: None,
        )
        watchdog.alive(LONG)  # the last save
    best = _best(config, settings, mesh, tokenizer, folders) if hosts.count > 1 else None
    with hosts.together():
        if hosts.first:
            folders.check_held()
            draw_losses(folder / "metrics.jsonl", folder / "loss.png")
            if config.checkpoint.export_best:
                export_best(folder, config, best)
            _send(folders)
            print(farewell(config, options.config_flags, folder, evaluate.losses, start), flush=True)


def _send(folders: RunFolders) -> None:
    """To gs://, what has changed in the mirror of a run folder there."""
    folders.check_held()
    push(folders.run)


def _facts(config: RunConfig, options: RunOptions) -> dict[str, str]:
    """What must be the same on all hosts. Where they keep token stores may differ."""
    settings = {f"config.{key}": repr(value) for key, value in values_by_key(config).items() if key != "data.cache_dir"}
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    flags = {"--allow_change": ",".join(sorted(options.allow_change)) or "nothing", "--rewind_to": str(options.rewind)}
    return {"gpt2_jax": code_version(), **packages, **flags, **settings}


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
