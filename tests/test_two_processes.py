"""Real processes that train together over gloo: same numbers as one, each reading its own rows, and how they end."""

import contextlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from tiny_run import TINY, Finished, Workshop, finish, finished_run, workshop

import gpt2_jax
from gpt2_jax.data.batches import TrainBatches
from gpt2_jax.run.rendezvous import free_address

STEPS = TINY["train.steps"]
ROWS = TINY["train.batch_size"]
SECONDS = 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a run in one process, never interrupted."""
    return finished_run(tmp_path_factory.getbasetemp())[0]


@contextlib.contextmanager
def started(
    tiny: Workshop,
    count: int,
    folders: list[pathlib.Path],
    settings: list[Mapping[str, Any]] | None = None,
    *flags: str,
    notes: pathlib.Path | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """As many processes as `folders`, of `count` that are told to come; ended with the block."""
    address = free_address()
    # With what XLA logs the pipe would be full before anybody reads it.
    environment = {**tiny.environment(), "JAX_NUM_CPU_DEVICES": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    processes = []
    with contextlib.ExitStack() as stack:
        for index, folder in enumerate(folders):
            program = [str(pathlib.Path(__file__).parents[1] / "train.py")]
            if notes is not None:
                program = [str(pathlib.Path(__file__).parent / "noting_train.py"), str(notes / f"{index}.txt")]
            place = (f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}")
            arguments = tiny.arguments(folder, settings and settings[index], *place, "--heartbeat_timeout=20", *flags)
            command, pipe = [sys.executable, *program, *arguments], subprocess.PIPE
            process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


def together(tiny: Workshop, folders: list[pathlib.Path], *args: Any, count: int = 0, **options: Any) -> list[Finished]:
    """The same, done."""
    with started(tiny, count or len(folders), folders, *args, **options) as processes:
        return [finish(process, SECONDS) for process in processes]


def last_line(done: Finished) -> str:
    return done.err.splitlines()[-1]


def reports(folder: pathlib.Path) -> dict[tuple[int, str], float]:
    """The losses by step and name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "held_out_loss", "tokens")
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def assert_same_losses(folder: pathlib.Path, expected: pathlib.Path, resumed: int) -> None:
    """Of all reports but the one whose steps were done in part before `resumed`."""
    ours, theirs = reports(folder), reports(expected)
    assert list(ours) == list(theirs)
    if resumed % 5:
        del ours[resumed // 5 * 5 + 5, "loss"], theirs[resumed // 5 * 5 + 5, "loss"]
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-5)


def wait_for(condition: Any, processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        assert all(process.poll() is None for process in processes), [finish(process).err for process in processes]
        time.sleep(0.02)


def written(file: pathlib.Path) -> str:
    return file.read_text() if file.exists() else ""


# One run in two processes


def test_two_processes_do_as_one_and_leave_together_when_one_gets_sigterm(
    tiny: Workshop, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Then one process goes on alone, and all of it gives the losses of the run that was never interrupted."""
    folder = tmp_path / "run"
    with started(tiny, 2, [folder, folder], notes=tmp_path) as processes:
        wait_for(lambda: '"step": 25,' in written(folder / "metrics.jsonl"), processes)
        processes[1].send_signal(signal.SIGTERM)
        first, second = (finish(process, SECONDS) for process in processes)
    assert (first.code, second.code) == (75, 75), first.err + second.err
    assert "host 0 of 2: " in first.err
    assert "host 1 of 2: " in second.err
    left = re.fullmatch(r"train.py: SIGTERM asked for room: step (\d+) is saved; .*", last_line(first))
    assert left, first.err
    assert last_line(second) == last_line(first)
    assert "grad norm" not in second.err  # one process is enough to report
    assert max(int(step.name) for step in (folder / "checkpoints").iterdir()) == int(left[1])
    assert 25 <= int(left[1]) < STEPS

    read: list[dict[int, list[int]]] = []
    for index in range(2):
        windows: dict[int, list[int]] = {}
        for line in (tmp_path / f"{index}.txt").read_text().splitlines():
            step, window = map(int, line.split())
            windows.setdefault(step, []).append(window)
        read.append(windows)
    order = TrainBatches(range(3582 // 16), batch_size=ROWS, seed=0)  # as many windows as the text has
    for step in range(int(left[1])):
        assert [len(windows[step]) for windows in read] == [ROWS // 2, ROWS // 2]
        assert read[0][step] + read[1][step] == order.window_indices(step)

    alone = tiny.run(folder)
    assert alone.code == 0, alone.err
    assert f"resumed after step {left[1]}" in alone.err
    assert_same_losses(folder, straight, int(left[1]))
    for step in range(30, STEPS + 1, 30):
        sample = f"samples/step_{step:07d}.txt"
        assert (folder / sample).read_bytes() == (straight / sample).read_bytes()


@pytest.mark.faults
def test_two_processes_go_on_where_one_was_killed(
    tiny: Workshop, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Sharded over the processes, which then export the best parameters together."""
    folder = tmp_path / "run"
    process = tiny.start(folder)
    try:
        wait_for(lambda: '"step": 25,' in written(folder / "metrics.jsonl"), [process])
    finally:
        process.kill()
        process.communicate()
    first, second = together(
        tiny, [folder, folder], [{"mesh.fsdp": 2, "checkpoint.export_best": True}] * 2, "--profile=100:101"
    )
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "resumed after step" in first.err
    assert_same_losses(folder, straight, 20)
    assert (folder / "loss.png").exists()
    assert list((folder / "profile").rglob("*.xplane.pb"))
    _, best, _ = gpt2_jax.load(folder)
    _, exported, _ = gpt2_jax.load(folder / "huggingface")
    np.testing.assert_array_equal(exported["ln_f"]["scale"], best["ln_f"]["scale"])
    # All was done: once more, together.
    first, second = together(tiny, [folder, folder], [{"mesh.fsdp": 2, "checkpoint.export_best": True}] * 2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "was done already" in first.out
    assert not (folder / "huggingface.1").exists()


@pytest.mark.faults
def test_disks_of_their_own_with_checkpoints_in_one_place(
    tiny: Workshop, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shared = f"--checkpoints={tmp_path / 'shared'}"
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    with started(tiny, 2, folders, None, shared) as processes:
        wait_for(lambda: '"step": 25,' in written(folders[0] / "metrics.jsonl"), processes)
        processes[0].send_signal(signal.SIGTERM)
        assert [finish(process, SECONDS).code for process in processes] == [75, 75]
    saved = max(int(step.name) for step in (tmp_path / "shared").iterdir())
    for done in together(tiny, folders, None, shared):
        assert done.code == 0, done.err
    assert_same_losses(folders[0], straight, saved)
    assert not folders[1].exists()
    assert gpt2_jax.load(folders[0])[0].model.n_embd == 16
    tiny.run_here(folders[0], None, f"--checkpoints={tmp_path / 'elsewhere'}").says(2, "--checkpoints=", "go on with")


# Refused before training, in all processes


def test_one_that_never_comes_is_counted(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    first, second = together(tiny, [tmp_path / "run"] * 2, None, "--initialization_timeout=4", count=3)
    first.says(1, "2 of 3 hosts", "within 4 s", "missing: 2", "--initialization_timeout")
    second.says(1, "2 of 3 hosts", "within 4 s", "missing: 2")
    assert time.monotonic() - start < 60
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_hosts_that_differ_are_refused(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    settings = [{}, {"optimizer.learning_rate": 0.5}]
    for done in together(tiny, [tmp_path / "run"] * 2, settings):
        assert done.code == 2, done.err
        found = r"error: host 1 \(.*\) has config.optimizer.learning_rate 0.5, host 0 .* 0.01;"
        assert re.search(found, last_line(done)), done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_data_that_differ_are_refused(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    """The same flags on disks of their own, with other texts."""
    folders = [tmp_path / name for name in "ab"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "corpus.txt").write_text(f"one and {number} " * 1000)
    address, environment = free_address(), tiny.environment()
    shared = {"data.source": "text:corpus.txt"}
    processes = []
    for index, folder in enumerate(folders):
        place = (f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}")
        arguments = tiny.arguments(
            folder / "run", {**shared, "data.cache_dir": folder}, f"--checkpoints={tmp_path / 'shared'}", *place
        )
        command = [sys.executable, str(pathlib.Path(__file__).parents[1] / "train.py"), *arguments]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True))
    for process in processes:
        done = finish(process, SECONDS)
        assert done.code == 2, done.err
        assert re.search(r"host 1 \(.*\) has data_fingerprint \w+, host 0", last_line(done)), done.err


@pytest.mark.faults
def test_folders_that_are_not_shared_are_refused(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    for done in together(tiny, folders):
        assert done.code == 2, done.err
        assert "host 1 does not see what host 0 writes there" in last_line(done)
        assert "--checkpoints=DIR" in last_line(done)
    for folder in folders:
        assert not list(folder.iterdir())


@pytest.mark.faults
def test_what_is_wrong_on_one_host_ends_all(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = together(tiny, [tmp_path / "file"] * 2)
    assert (first.code, second.code) == (2, 2)
    assert "choose a folder that can be made" in last_line(first)
    assert "host 0: --workdir=" in last_line(second)
