"""Whole runs of the real train.py: what it leaves behind, and that nothing is lost when it is killed.

Shape letters: T positions, V vocabulary.
"""

import json
import math
import pathlib
import re
import shutil
import signal
import subprocess
import time
from typing import Any

import jax
import numpy as np
import pytest
from reference import numpy_gpt2
from tiny_run import Finished, Workshop, assert_identical, contents, finish, finished_run, workshop

import gpt2_jax
from gpt2_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
from gpt2_jax.data.token_store import open_token_store
from gpt2_jax.decoding.batch import Batch, Limits
from gpt2_jax.decoding.layout import make_decoder
from gpt2_jax.decoding.settings import Sampling
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.loop import Action, train
from gpt2_jax.sharding import make_mesh, use_mesh
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.steps import StepSettings
from gpt2_jax.training.train_state import TrainState, abstract_state, sharded_init

STEPS = 120


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Finished]:
    return finished_run(tmp_path_factory.getbasetemp())


def reports(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The reports less what depends on the time and the machine."""
    measured = ("tokens_per_second", "mfu", "memory_gib")
    return [{name: v for name, v in report.items() if name not in measured} for report in reports(folder)]


def state_of(folder: pathlib.Path, step: int) -> TrainState:
    """A saved state on one device."""
    config, _, _ = gpt2_jax.load(folder)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        ema = config.optimizer.ema_decay > 0
        return checkpoints.restore(step, abstract_state(GPT2(config.model), optimizer, mesh, ema=ema))[0]
    finally:
        checkpoints.close()


def numpy_loss(params: Any, config: Any, tokens: np.ndarray) -> float:
    """Mean loss in float64 over windows of T targets, one after another; the last may be shorter."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    T, total = config.context_length, 0.0
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1]
        logits_1TV = numpy_gpt2.logits(
            params,
            window[None, :-1],
            n_head=config.model.n_head,
            vocab_size=config.model.vocab_size,
            epsilon=config.model.layer_norm_epsilon,
        )
        total += numpy_gpt2.token_losses(logits_1TV, window[None, 1:]).sum()
    return total / (len(tokens) - 1)


# What a run leaves behind


@pytest.mark.smoke
def test_a_run_leaves_all_it_should(straight: tuple[pathlib.Path, Finished]) -> None:
    folder, said = straight
    assert said.code == 0, said.err
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "run.json", "tokenizer", "checkpoints", "metrics.jsonl", "samples", "loss.png"),
        *("tensorboard", "profile"),
    }
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (folder / "samples" / f"step_{STEPS:07d}.txt").read_text() in said.err
    assert f"--- sample after step {STEPS}" in said.err
    assert list((folder / "profile").rglob("*.xplane.pb")), "no profiler trace"

    losses = {report["step"]: report["loss"] for report in reports(folder) if "loss" in report}
    held_out = {r["step"]: r["held_out_loss"] for r in reports(folder) if "held_out_loss" in r}
    assert list(losses) == list(range(5, STEPS + 1, 5))
    assert list(held_out) == list(range(20, STEPS + 1, 20))
    # At the start about as good as a guess among the 257 ids; then it learns.
    assert losses[5] == pytest.approx(math.log(257), abs=0.3)
    assert held_out[STEPS] < held_out[20] - 1
    assert f"held-out loss {held_out[STEPS]:.4f} after step {STEPS}" in said.out
    assert f"step {STEPS}: held-out loss {held_out[STEPS]:.4f}" in said.err


@pytest.mark.smoke
def test_the_held_out_loss_is_that_of_the_saved_model(straight: tuple[pathlib.Path, Finished]) -> None:
    """Computed again from the text, in NumPy: split, tokens, windows and model by hand."""
    folder, said = straight
    config, params, _ = gpt2_jax.load(folder, step=STEPS)
    data = pathlib.Path(config.data.source.removeprefix("text:")).read_bytes()  # ASCII: a byte is a character
    tail = np.array(list(data[len(data) * 9 // 10 :]))
    printed = float(re.search(r"held-out loss (\S+) after step", said.out)[1])
    assert numpy_loss(params, config, tail) == pytest.approx(printed, abs=1e-4)
    last = [report for report in reports(folder) if "held_out_loss" in report][-1]
    assert last["held_out_loss"] == pytest.approx(numpy_loss(params, config, tail), rel=1e-5)
    assert last["held_out_perplexity"] == pytest.approx(math.exp(last["held_out_loss"]), rel=1e-6)


def test_the_reports_say_what_was_done(straight: tuple[pathlib.Path, Finished]) -> None:
    folder, _ = straight
    for report in reports(folder):
        if "loss" not in report:
            continue
        step = report["step"]
        assert report["tokens"] == step * 16 * 16
        if step >= 5:  # cosine from 0.01 to 0.001 after 5 steps of warm-up
            share = 0.5 * (1 + math.cos(math.pi * (step - 5) / (STEPS - 5)))
            assert report["learning_rate"] == pytest.approx(1e-3 + 9e-3 * share, rel=1e-4)
        for name in ("grad_norm", "tokens_per_second", "mfu", "memory_gib"):
            assert report[name] > 0, name


def test_run_json_names_data_and_versions(straight: tuple[pathlib.Path, Finished]) -> None:
    folder, _ = straight
    about = json.loads((folder / "run.json").read_text())
    store = open_token_store(about["data"]["folder"])
    assert about["data"]["fingerprint"] == store.fingerprint
    assert about["versions"]["jax"] == jax.__version__
    assert json.loads((folder / "config.json").read_text())["model"]["vocab_size"] == 257


def test_tensorboard_has_the_same_numbers(straight: tuple[pathlib.Path, Finished]) -> None:
    """Read back by hand: a record is a length, its checksum, a protocol buffer and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    folder, _ = straight
    (file,) = (folder / "tensorboard").iterdir()
    data, position, found = file.read_bytes(), 0, []
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        event = Event.FromString(data[position + 12 : position + 12 + length])
        position += 12 + length + 4
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    written = [
        (report["step"], name, value) for report in reports(folder) for name, value in report.items() if name != "step"
    ]
    assert [entry[:2] for entry in found] == [entry[:2] for entry in written]
    np.testing.assert_allclose([entry[2] for entry in found], [entry[2] for entry in written], rtol=1e-6)


# Interrupt and resume


def wait_for(process: subprocess.Popen, folder: pathlib.Path, step: int) -> None:
    """Until the running command has saved the step."""
    end = time.monotonic() + 240
    while not (folder / "checkpoints" / str(step)).is_dir():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_killed_run_resumes_bit_by_bit(
    tiny: Workshop, straight: tuple[pathlib.Path, Finished], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "killed"
    process = tiny.start(folder)
    wait_for(process, folder, 30)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert not (folder / "checkpoints" / str(STEPS)).exists(), "it was done before it was killed"

    again = tiny.run(folder)
    assert again.code == 0, again.err
    assert re.search(r"resumed after step \d+", again.err)
    assert without_clock(folder) == without_clock(straight[0])
    assert contents(folder / "samples") == contents(straight[0] / "samples")
    for step in (STEPS - 10, STEPS):
        assert_identical(state_of(folder, step), state_of(straight[0], step))
    state = state_of(folder, STEPS)
    assert int(state.step) == STEPS
    assert state.ema is not None


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_the_run_goes_on_with_another_rhythm(
    tiny: Workshop, straight: tuple[pathlib.Path, Finished], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "interrupted"
    process = tiny.start(folder)
    wait_for(process, folder, 20)
    process.send_signal(signal.SIGINT)
    stopped = finish(process)
    assert stopped.code == 130
    assert re.fullmatch(r"train.py: interrupted: step \d+ is saved; the same command .*", stopped.err.splitlines()[-1])
    assert "Traceback" not in stopped.err
    assert not list((folder / "checkpoints").glob("*tmp*")), "the last save was not waited for"

    again = tiny.run(folder, {"checkpoint.every": 60, "train.log_every": 20})
    assert again.code == 0, again.err
    assert_identical(state_of(folder, STEPS), state_of(straight[0], STEPS))


def test_a_finished_run_changes_nothing(tiny: Workshop, straight: tuple[pathlib.Path, Finished]) -> None:
    folder, _ = straight
    before = contents(folder)
    again = tiny.run(folder)
    assert again.code == 0, again.err
    assert f"{folder} was done already: {STEPS} of {STEPS} steps" in again.out
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer.learning_rate": 0.02}, ["optimizer.learning_rate 0.01 -> 0.02"]),
        (
            {"train.batch_size": 8, "train.microbatches": 1, "seed": 1},
            ["train.batch_size 16 -> 8", "train.microbatches 2 -> 1", "seed 0 -> 1"],
        ),
        ({"train.steps": 140}, ["train.steps 120 -> 140"]),  # the rate depends on it
        ({"tokenizer.name": "chars"}, ["tokenizer.name 'bytes' -> 'chars'"]),
        ({"model.vocab_size": 300}, ["model.vocab_size 257 -> 300"]),
        ({"init_from": "elsewhere"}, ["init_from '' -> 'elsewhere'"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_settings_do_not_touch_a_run(
    tiny: Workshop, straight: tuple[pathlib.Path, Finished], settings: dict[str, Any], named: list[str]
) -> None:
    folder, _ = straight
    before = contents(folder)
    tiny.run_here(folder, settings).says(2, f"--workdir={folder} holds a run with other settings", *named)
    assert contents(folder) == before


def test_other_data_do_not_touch_a_run_but_the_same_elsewhere_are_fine(
    tiny: Workshop, straight: tuple[pathlib.Path, Finished], tmp_path: pathlib.Path
) -> None:
    folder, _ = straight
    before = contents(folder)
    (tmp_path / "other.txt").write_text("another text " * 50)
    other = {"data.source": f"text:{tmp_path / 'other.txt'}"}
    tiny.run_here(folder, other).says(2, f"{folder} was trained on data", "bring the old data back")
    assert contents(folder) == before
    (tmp_path / "moved.txt").write_bytes(tiny.corpus.read_bytes())
    moved = tiny.run_here(folder, {"data.source": f"text:{tmp_path / 'moved.txt'}"})
    assert moved.code == 0, moved.err


@pytest.mark.slow
def test_a_vocabulary_chosen_once_stays(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    settings = {"train.steps": 2, "train.eval_every": 0, "checkpoint.every": 1, "optimizer.warmup_steps": 1}
    assert tiny.run_here(tmp_path / "run", {**settings, "model.vocab_size": 600}).code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    again = tiny.run_here(tmp_path / "run", settings)
    assert again.code == 0, again.err
    config, params, _ = gpt2_jax.load(tmp_path / "run")
    assert config.model.vocab_size == 600
    assert params["wte"]["embedding"].shape[0] == 640


# Fine-tuning


def test_init_from_starts_where_the_other_run_ended(
    tiny: Workshop, straight: tuple[pathlib.Path, Finished], tmp_path: pathlib.Path
) -> None:
    source, _ = straight
    settings = {"init_from": source, "train.steps": 5, "train.log_every": 1, "train.eval_every": 1}
    settings |= {"optimizer.learning_rate": 1e-4, "optimizer.warmup_steps": 0}
    done = tiny.run(tmp_path / "tuned", settings, quick=True)
    assert done.code == 0, done.err
    before = min(report["held_out_loss"] for report in reports(source) if "held_out_loss" in report)
    after = [report["held_out_loss"] for report in reports(tmp_path / "tuned") if "held_out_loss" in report]
    assert after == pytest.approx([before] * 5, abs=0.05)
    config, _, _ = gpt2_jax.load(tmp_path / "tuned")
    assert config.init_from == str(source)
    assert config.optimizer.learning_rate != OptimizerConfig().learning_rate


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["chars", "bpe:30"])
def test_other_text_is_tuned_on_with_the_learned_tokenizer(
    tiny: Workshop, tmp_path: pathlib.Path, tokenizer: str
) -> None:
    settings = {"tokenizer.name": tokenizer, "train.steps": 4, "train.eval_every": 0, "optimizer.warmup_steps": 1}
    first = tiny.run_here(tmp_path / "first", settings)
    assert first.code == 0, first.err
    other = tmp_path / "other.txt"
    other.write_text("sums: one plus two is three. " * 60 if tokenizer != "chars" else "12 plus 34 is 46. " * 60)
    settings |= {"init_from": tmp_path / "first", "data.source": f"text:{other}"}
    second = tiny.run_here(tmp_path / "second", settings)
    assert second.code == 0, second.err
    tokenizers = [gpt2_jax.load(tmp_path / name)[2] for name in ("first", "second")]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"model.n_layer": 3}, ["model.n_layer=3", "has 2"]),
        ({"model.vocab_size": 300}, ["model.vocab_size=300", "has 257"]),
        ({"tokenizer.name": "chars", "model.vocab_size": 257}, ["tokenizer.name=chars", "has bytes"]),
    ],
    ids=["layers", "vocabulary", "tokenizer"],
)
def test_init_from_refuses_another_model(
    tiny: Workshop,
    straight: tuple[pathlib.Path, Finished],
    tmp_path: pathlib.Path,
    settings: dict[str, Any],
    fragments: list[str],
) -> None:
    source, _ = straight
    settings = {"init_from": source, **settings}
    tiny.run_here(tmp_path / "run", settings).says(2, f"init_from={source}", *fragments)
    assert not (tmp_path / "run" / "config.json").exists(), "the refused run would have to be resumed"


# Divergence


@pytest.mark.parametrize("eval_every", [0, 1])
def test_divergence_saves_no_ruined_state(tiny: Workshop, tmp_path: pathlib.Path, eval_every: int) -> None:
    """The first update has a finite loss and gradient, and ruins the parameters."""
    settings = {
        "optimizer.learning_rate": 1e30,
        "optimizer.warmup_steps": 0,
        "train.log_every": 1,
        "train.eval_every": eval_every,
        "checkpoint.every": 1,
    }
    done = tiny.run(tmp_path / "run", settings, quick=True)
    assert done.code == 4, done.err
    line = done.err.splitlines()[-1]
    assert re.match(r"train.py: error: step 1: held-out loss nan: not finite; .*optimizer.learning_rate", line)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_divergence_keeps_the_last_good_save(
    tiny: Workshop, straight: tuple[pathlib.Path, Finished], tmp_path: pathlib.Path
) -> None:
    """With one save kept, a ruined one would replace the good one. The rate is changed behind the run's back."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["optimizer"] |= {"schedule": "constant", "learning_rate": 1e30}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"optimizer.schedule": "constant", "optimizer.learning_rate": 1e30, "train.steps": STEPS + 5}
    settings |= {"checkpoint.every": 1, "checkpoint.keep_last": 1, "checkpoint.keep_best": 0}
    done = tiny.run(folder, settings, quick=True)
    assert done.code == 4, done.err
    assert f"step {STEPS + 1}: held-out loss nan: not finite" in done.err
    assert str(STEPS) in {path.name for path in (folder / "checkpoints").iterdir()}
    assert not {str(STEPS + n) for n in range(1, 6)} & {path.name for path in (folder / "checkpoints").iterdir()}
    assert_identical(gpt2_jax.load(folder, STEPS)[1], gpt2_jax.load(straight[0], STEPS)[1])


# All of it at once


def test_a_sequence_is_learned_saved_reloaded_and_written_out(tmp_path: pathlib.Path) -> None:
    """The real loop learns one sequence by heart and writes it out; from a save on, the losses are the same again."""
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=50, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    )
    optimizer_config = OptimizerConfig(learning_rate=1e-2, warmup_steps=5, weight_decay=0.0)
    steps = 80
    settings = StepSettings(
        model=GPT2(config),
        optimizer=make_optimizer(optimizer_config, steps),
        schedule=learning_rate_schedule(optimizer_config, steps),
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    text_T = np.random.default_rng(0).permutation(50)[:17].astype(np.int32)
    batch = {"tokens": text_T[None, :-1], "targets": text_T[None, 1:], "weights": np.ones((1, 16), np.float32)}

    def losses_from(state: TrainState, actions: tuple[Action, ...] = ()) -> tuple[TrainState, list[float]]:
        losses: list[float] = []
        start = int(state.step)
        with use_mesh(mesh):
            state = train(
                state,
                ((index, batch) for index in range(start, steps)),
                settings=settings,
                mesh=mesh,
                last_step=steps,
                log_every=1,
                report=lambda step, metrics, interval: losses.append(interval.loss_sum / interval.weight_sum),
                advance=lambda step: None,
                actions=actions,
            )
        return state, losses

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=9))
    save = Action(30, lambda step, state: checkpoints.save(state, {}, None), at_end=False)
    first = sharded_init(settings.model, settings.optimizer, 0, mesh)
    state, losses = losses_from(first, (save,))
    assert losses[0] == pytest.approx(math.log(50), abs=0.3)
    assert losses[-1] < 0.01

    decoder = make_decoder(settings.model.config, state.eval_params, 50, mesh=mesh)
    written = Batch(decoder, [text_T[:1].tolist()], sampling=Sampling(temperature=0), limits=Limits(16))
    assert [token.id for token in written] == text_T[1:].tolist()

    like = abstract_state(settings.model, settings.optimizer, mesh, ema=False)
    restored, _ = checkpoints.restore(30, like)
    checkpoints.close()
    again, later = losses_from(restored)
    assert later == losses[30:]
    assert_identical(again, state)
