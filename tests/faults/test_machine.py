"""What the machine does to a run: a clock that jumps, no memory, a damaged cache of compiled programs."""

import ast
import pathlib

import pytest
from tiny_run import REPOSITORY, Workshop, workshop

from gpt2_jax.run.metrics import read_reports

FEW = {"train.steps": 12, "train.log_every": 2, "train.eval_every": 6, "train.sample_every": 0, "checkpoint.every": 6}

# Read by Python at its start: whenever the wall clock is asked, it has been set back by another ten minutes.
SET_BACK = """
import time

now, back = time.time, 0.0


def earlier():
    global back
    back += 600
    return now() - back


time.time = earlier
time.time_ns = lambda: int(earlier() * 1e9)
"""

# Where the wall clock is read, and why nothing depends on it.
WALL_CLOCK = {
    "gpt2_jax/run/metrics.py": "TensorBoard's records have a time, which it shows",
    "gpt2_jax/run/lease_holder.py": "a lease says since when, to people",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


def losses(run: pathlib.Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "held_out_loss", "grad_norm")
    return [tuple(report[name] for name in names if name in report) for report in read_reports(run / "metrics.jsonl")]


def test_no_logic_asks_the_wall_clock() -> None:
    found = set()
    for file in (REPOSITORY / "gpt2_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                wall = "datetime" in names or (getattr(node, "module", None) == "time" and "time" in names)
            else:
                wall = (
                    isinstance(node, ast.Attribute)
                    and node.attr in ("time", "time_ns", "localtime", "gmtime", "ctime", "strftime")
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "time"
                )
            if wall:
                found.add(str(file.relative_to(REPOSITORY)))
    assert found == set(WALL_CLOCK)


@pytest.mark.faults
def test_a_clock_that_is_set_back_changes_nothing(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(SET_BACK)
    prefix = ["env", f"PYTHONPATH={tmp_path / 'python'}:{REPOSITORY}", "TZ=Pacific/Apia"]
    settings = {**FEW, "optimizer.schedule": "constant"}
    for folder, before, steps in (("set back", prefix, 6), ("set back", prefix, 12), ("steady", [], 12)):
        settings["train.steps"] = steps
        done = tiny.run(tmp_path / folder, settings, "--tensorboard", quick=True, prefix=before)
        assert done.code == 0, done.err
        assert ("resumed after step 6" in done.err) == ((folder, steps) == ("set back", 12))
    assert losses(tmp_path / "set back") == losses(tmp_path / "steady")
    assert losses(tmp_path / "steady")[-1][0] == 12


@pytest.mark.faults
def test_no_room_on_the_device_is_one_line(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    """Attention scores of 2 ** 17 positions: several terabytes."""
    text = tmp_path / "long.txt"
    text.write_text("as long as it has to be. " * 8000)
    settings = {"data.source": f"text:{text}", "model.n_positions": 2**17, "train.batch_size": 64}
    done = tiny.run(tmp_path / "run", {**FEW, **settings, "model.attention": "xla"}, quick=True)
    assert done.code == 1, done.err
    last = done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert last.startswith("train.py: error: out of memory on the devices ("), done.err
    for fragment in ("train.batch_size=64 windows of 131072 tokens", "raise train.microbatches", "remat=full"):
        assert fragment in last


@pytest.mark.faults
def test_a_damaged_cache_of_programs_is_compiled_anew(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    """Every other program is cut short, the rest is written over."""
    cache = tmp_path / "xla"
    flag = f"--compile_cache={cache}"
    first = tiny.run(tmp_path / "first", FEW, flag, quick=True)
    assert first.code == 0, first.err
    programs = sorted(file for file in cache.rglob("*") if file.is_file() and file.stat().st_size > 100)
    assert len(programs) > 3
    for number, file in enumerate(programs):
        whole = file.read_bytes()
        file.write_bytes(b"x" * len(whole) if number % 2 else whole[:50])
    second = tiny.run(tmp_path / "second", FEW, flag, quick=True)
    assert second.code == 0, second.err
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
