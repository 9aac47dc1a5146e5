"""Disks that are full or too small, and what a cut in the metrics does."""

import json
import pathlib
import re

import fault_runs
import pytest
from tiny_run import Workshop, mounted, workshop

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


def test_full_while_saving_it_stops_with_that_save(tiny: Workshop, tmp_path_factory: pytest.TempPathFactory) -> None:
    """64 MB, of a state of 20 MB each: room for some saves, which stay whole; not for all that are kept."""
    disk = tmp_path_factory.mktemp("disk")
    large = {"model.n_embd": 256, "checkpoint.keep_last": 100, "train.eval_every": 24, "train.sample_every": 0}
    prefix = mounted(disk, "size=64m")
    script = f'"$@" > {disk}.out 2> {disk}.err; echo $? > {disk}.code; ls {disk}/run/checkpoints > {disk}.ls'
    with fault_runs.started(tiny, disk / "run", settings=large, prefix=[*prefix, "sh", "-c", script, "sh"]) as (
        process,
    ):
        fault_runs.finish(process, fault_runs.SECONDS)
    code, err = int(pathlib.Path(f"{disk}.code").read_text()), pathlib.Path(f"{disk}.err").read_text()
    assert code == 1, err
    line = err.splitlines()[-1]
    assert "Traceback" not in err
    assert re.search(r"[\d.]+ MiB are free, a save takes up to [\d.]+ MiB; a save failed: .*(space|ENOSPC)", line), line
    assert "the saved steps before it are intact" in line
    listed = pathlib.Path(f"{disk}.ls").read_text().split()
    saved = [int(name) for name in listed if name.isdecimal()]
    assert saved, listed
    # At that save, not at the next one.
    last_step = max(int(step) for step in re.findall(r"step (\d+)/24", err))
    assert last_step <= max(saved) + 2 * fault_runs.SHORT["checkpoint.every"]


def test_too_little_room_is_told_at_the_start(tiny: Workshop, tmp_path_factory: pytest.TempPathFactory) -> None:
    disk = tmp_path_factory.mktemp("disk")
    settings = {"model.n_embd": 256, "train.steps": 6}
    (done,) = fault_runs.run(tiny, disk / "run", settings=settings, prefix=mounted(disk, "size=4m"))
    assert done.code == 1, done.err
    assert re.search(r"warning: .*: [\d.]+ MiB are free, a save takes up to [\d.]+ MiB", done.err), done.err


def test_metrics_cut_in_half(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    (killed,) = fault_runs.run(tiny, tmp_path, faults=["step#20=kill"])
    assert killed.code == -9
    metrics = tmp_path / "metrics.jsonl"
    content = metrics.read_bytes()
    metrics.write_bytes(content[: len(content) // 2])
    (done,) = fault_runs.run(tiny, tmp_path)
    assert done.code == 0, done.err
    reports = [json.loads(line) for line in metrics.read_text().splitlines()]  # every line is whole
    assert max(report["step"] for report in reports) == 24
    steps = [report["step"] for report in reports if "loss" in report]
    assert steps == sorted(set(steps))
