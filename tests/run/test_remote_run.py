"""Runs at gs://, against a storage server on this machine."""

import json
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
import pytest
from storage_emulator import Storage, storage
from tiny_run import assert_identical, finish, workshop

import gpt2_jax
from gpt2_jax.config import CheckpointConfig, ModelConfig, RunConfig
from gpt2_jax.errors import DataError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.remote_folder import pull, push
from gpt2_jax.run.bundle import load_bundle
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.run_folder import checkpoints_folder, holds_run, make_folder, write_run
from gpt2_jax.tokenizer import make_tokenizer
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import init_state

CONFIG = RunConfig(model=ModelConfig(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=257))


@pytest.fixture
def bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The server; mirrors are below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    return storage()


def test_what_is_saved_on_one_machine_is_loaded_on_another(
    bucket: Storage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = jax.jit(lambda: init_state(GPT2(CONFIG.model), make_optimizer(CONFIG.optimizer, 10), 0))()
    folder = make_folder("gs://bucket/runs/small")
    pull(folder)
    assert not holds_run(folder)
    make_tokenizer("bytes").save(folder / "tokenizer")
    write_run(folder, CONFIG, {"folder": "/nowhere", "fingerprint": "0"})
    push(folder)
    with pytest.raises(DataError, match="gs://bucket/runs/small has no checkpoints yet"):
        gpt2_jax.load("gs://bucket/runs/small")
    checkpoints = Checkpoints(checkpoints_folder(folder), CheckpointConfig())
    params = {}
    for step in (1, 2):
        params[step] = jax.tree.map(lambda leaf, step=step: np.asarray(leaf) * np.float32(step), state.params)
        saved = state.replace(step=np.int32(step), params=jax.device_put(params[step]))
        checkpoints.save(jax.device_put(saved), {"seed": 1}, 1.0 / step)
    checkpoints.close()
    assert {name.partition("/")[0] for name in bucket.names("runs/small/checkpoints")} >= {"1", "2"}
    assert holds_run(folder)
    # One that was killed in writing has no mark of being whole, and is none.
    bucket.put("runs/small/checkpoints/9/params/array", b"a part of it")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    config, loaded, tokenizer = gpt2_jax.load("gs://bucket/runs/small")
    assert (config, tokenizer.name) == (CONFIG, "bytes")
    assert_identical(loaded, params[2])
    with pytest.raises(DataError, match=r"gs://bucket/runs/small has no checkpoint of step 9; saved: \[1, 2\]"):
        gpt2_jax.load("gs://bucket/runs/small", 9)
    assert "2 steps" in load_bundle("gs://bucket/runs/small").facts["training"]


def test_a_killed_save_is_no_run(bucket: Storage) -> None:
    bucket.put("runs/killed/checkpoints/5/params/array", b"a part of it")
    folder = make_folder("gs://bucket/runs/killed")
    assert not holds_run(folder)
    # What another process saves is seen, though this one has looked before.
    bucket.put("runs/killed/checkpoints/6/commit_success.txt", b"{}")
    assert holds_run(folder)


RUN = "gs://bucket/runs/tiny"


@pytest.mark.slow
def test_a_killed_run_goes_on_elsewhere_as_if_nothing_had_been(
    bucket: Storage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = workshop(tmp_path)
    settings: dict[str, Any] = {"train.steps": 40, "train.sample_every": 0, "checkpoint.export_best": True}
    straight = tmp_path / "straight"
    assert tiny.run(straight, settings).code == 0
    (store,) = (path for path in (tiny.folder / "tokens").iterdir() if path.is_dir())
    bucket.put_folder("tokens", store)
    settings |= {"data.source": "tokens:gs://bucket/tokens", "data.cache_dir": tmp_path / "shards 1"}

    running = tiny.start(RUN, settings)
    while "checkpoints/20/commit_success.txt" not in bucket.names("runs/tiny"):
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    finish(running)
    left = bucket.names("runs/tiny")
    assert {"config.json", "run.json", "metrics.jsonl"} <= set(left)
    assert not {"loss.png", "huggingface/config.json", "checkpoints/40/commit_success.txt"} & set(left)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    resumed = tiny.run(RUN, settings | {"data.cache_dir": tmp_path / "shards 2"})
    assert resumed.code == 0, resumed.err
    said = resumed.out + resumed.err
    assert f"run       {RUN}, resumed after step " in said
    assert f"{RUN}/huggingface" in resumed.out
    assert f"{tmp_path / 'second'}" not in said.replace(f"to {tmp_path / 'shards 2'}", "")

    assert_identical(gpt2_jax.load(RUN, 40)[1], gpt2_jax.load(straight, 40)[1])
    ours = read_losses(bucket.get("runs/tiny/metrics.jsonl").decode())
    assert ours == read_losses((straight / "metrics.jsonl").read_text())
    assert len(ours) > 8
    assert bucket.get("runs/tiny/huggingface/model.safetensors") == (
        (straight / "huggingface" / "model.safetensors").read_bytes()
    )
    assert_identical(gpt2_jax.load(f"{RUN}/huggingface")[1], gpt2_jax.load(straight / "huggingface")[1])
    assert bucket.get("runs/tiny/loss.png")[:4] == b"\x89PNG"

    # A run that is done is left as it is, and other settings are refused under the name that the user gave.
    before = bucket.names("runs/tiny/huggingface")
    again = tiny.run(RUN, settings)
    assert f"{RUN} was done already: 40 of 40 steps" in again.out, again.err
    assert bucket.names("runs/tiny/huggingface") == before
    tiny.run(RUN, settings | {"seed": 5}).says(2, f"--workdir={RUN} holds a run with other settings: seed 0 -> 5")

    # The other commands take it too.
    main = "import sys; from gpt2_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    common = ("--prompt", "1 plus", "--max_new_tokens", 4, "--temperature", 0)
    written = [tiny.python(main, "generate", "--model", model, *common) for model in (RUN, straight)]
    assert written[0].code == 0, written[0].err
    assert written[0].out == written[1].out
    exported = tiny.python(main, "export", "--model", RUN, "--format", "npz", "--out", tmp_path / "npz")
    assert exported.code == 0, exported.err
    tuned = tiny.run(tmp_path / "tuned", settings | {"init_from": RUN, "train.steps": 2, "optimizer.warmup_steps": 1})
    assert tuned.code == 0, tuned.err


@pytest.mark.slow
def test_a_storage_that_cannot_be_reached(bucket: Storage, tmp_path: pathlib.Path) -> None:
    tiny = workshop(tmp_path)
    tiny.run("s3://bucket/run").says(2, "s3://bucket/run: a path on this machine", "gs://BUCKET/PATH")
    tiny.run("gs://no-such-bucket/run").says(2, "gs://no-such-bucket/run", "check the bucket's name")


def read_losses(text: str) -> list[tuple[Any, ...]]:
    """Step and losses of each report."""
    reports = [json.loads(line) for line in text.splitlines()]
    return [(report["step"], report.get("loss"), report.get("held_out_loss")) for report in reports]


def test_a_damaged_save_in_a_bucket_is_moved_aside(bucket: Storage, capsys: pytest.CaptureFixture) -> None:
    state = jax.jit(lambda: init_state(GPT2(CONFIG.model), make_optimizer(CONFIG.optimizer, 10), 0))()
    folder = checkpoints_folder(make_folder("gs://bucket/runs/damaged"))
    checkpoints = Checkpoints(folder, CheckpointConfig())
    for step in (1, 2):
        checkpoints.save(state.replace(step=jax.numpy.int32(step)), {"seed": step}, None)
    checkpoints.close()
    bucket.put("runs/damaged/checkpoints/2/seal/seal.json", b"{}")
    checkpoints = Checkpoints(folder, CheckpointConfig())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)
    restored, meta = checkpoints.restore_newest(like)
    assert (int(restored.step), meta) == (1, {"seed": 1})
    assert_identical(restored.params, state.params)
    assert "moved to gs://bucket/runs/damaged/checkpoints/damaged/2; going on from step 1" in capsys.readouterr().err
    assert checkpoints.steps() == [1]
    names = bucket.names("runs/damaged/checkpoints")
    assert "damaged/2/seal/seal.json" in names
    assert not [name for name in names if name.startswith("2/")]
    checkpoints.save(state.replace(step=jax.numpy.int32(2)), {}, None)  # again
    checkpoints.close()
