"""P3: what is damaged in a saved step is found before training goes on, whatever file it is in, or it is harmless.

Harmless means: the state that is restored has the hash of the one that was saved.
"""

import contextlib
import pathlib
import random
import shutil
from collections.abc import Iterator

import fault_runs
import jax
import numpy as np
import pytest
from etils import epath
from tiny_run import Workshop, contents, workshop

import gpt2_jax
from gpt2_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
from gpt2_jax.errors import DamagedError, DataError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.run.checkpoint import Checkpoints
from gpt2_jax.run.checksums import checksums, named
from gpt2_jax.run.saved_metrics import mend_metrics
from gpt2_jax.sharding import make_mesh
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import TrainState, abstract_state

LOSSES = {3: 2.0, 6: 1.0, 9: 1.5}


def like() -> TrainState:
    model = GPT2(ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=40, dtype="float16"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return abstract_state(model, make_optimizer(OptimizerConfig(), 100), mesh, ema=True)


def drawn(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding), like()
    )
    return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))


def bits(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpoints(folder, CheckpointConfig(keep_last=3))) as checkpoints:
        for step, loss in LOSSES.items():
            checkpoints.save(drawn(step), {"data_fingerprint": "d"}, loss)
    return folder


@pytest.fixture
def copy(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[Checkpoints]:
    mend_metrics(epath.Path(folder))
    with contextlib.closing(Checkpoints(folder, CheckpointConfig(keep_last=3))) as checkpoints:
        yield checkpoints


def kind(file: pathlib.Path) -> str:
    return "array data" if file.parent.name == "d" else file.name


def damage(file: pathlib.Path, rng: random.Random) -> str:
    """A single bit flipped, the end cut off, or the file removed."""
    content = bytearray(file.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "remove"]) if content else "remove"
    if how == "flip":
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        file.unlink()
    return how


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_two_hundred_damages(saved: pathlib.Path, tmp_path: pathlib.Path, part: int) -> None:
    rng = random.Random(part)
    files = sorted(file.relative_to(saved) for file in (saved / "9").rglob("*") if file.is_file())
    kinds = sorted({kind(file) for file in files})
    assert {"array data", "manifest.ocdbt", "_METADATA", "seal.json", "metrics"} <= {*kinds}
    expected, found, harmless = {step: bits(drawn(step)) for step in LOSSES}, 0, 0
    for number in range(50):
        wanted = kinds[number % len(kinds)]
        file = rng.choice([file for file in files if kind(file) == wanted])
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        how = damage(folder / file, rng)
        with opened(folder) as checkpoints:
            state, meta = checkpoints.restore_newest(like())
            assert meta == {"data_fingerprint": "d"}
            assert checkpoints.best_step() == 6
            step = int(state.step)
            assert bits(state) == expected[step], (file, how)
            assert step in (9, 6), (file, how)
            assert (folder / "damaged" / "9").is_dir() == (step == 6)
            found, harmless = found + (step == 6), harmless + (step == 9)
        shutil.rmtree(folder)
    assert found > 10
    assert harmless > 0


def test_any_single_bit_changes_a_checksum() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.int32, np.float16, np.uint8):
        array = rng.integers(0, 256, (3, 5, 7, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
        before = named(checksums({"a": jax.numpy.asarray(array)}))
        for bit in rng.choice(8 * array.nbytes, 40, replace=False):
            flipped = bytearray(array.tobytes())
            flipped[bit // 8] ^= 1 << bit % 8
            other = np.frombuffer(bytes(flipped), dtype).reshape(array.shape)
            assert named(checksums({"a": jax.numpy.asarray(other)})) != before


def test_checksums_tell_places_apart_but_not_meshes() -> None:
    array = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    before = named(checksums({"a": jax.numpy.asarray(array)}))
    assert named(checksums({"a": jax.numpy.asarray(array[::-1])})) != before
    assert named(checksums({"a": jax.numpy.asarray(np.roll(array, 1, axis=1))})) != before
    for shape in ((1, 1, 1), (2, 2, 2), (1, 8, 1)):
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
        for spec in (jax.P("fsdp", "tensor"), jax.P(("data", "tensor"), None), jax.P()):
            placed = jax.device_put(array, jax.NamedSharding(mesh, spec))
            assert named(checksums({"a": placed})) == before
    # By hand, with Python's integers.
    total = 0
    for (row, column), value in np.ndenumerate(array):
        total += int(np.float32(value).view(np.uint32)) * factor(column, 1) * factor(row, 0)
    assert before == {"a": f"{total % 2**32:08x}"}


def factor(place: int, axis: int) -> int:
    mixed = (place * 0x9E3779B9 + axis) % 2**32
    return ((mixed ^ mixed >> 15) * 0x2C1B3C6D % 2**32) | 1


def test_the_newest_good_step_is_taken_and_the_bad_ones_are_set_aside(
    copy: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    for step in (9, 6):
        (copy / str(step) / "seal" / "seal.json").write_text("{}")
    (copy / "damaged" / "9").mkdir(parents=True)  # of an earlier time
    with opened(copy) as checkpoints:
        state, _ = checkpoints.restore_newest(like())
        assert (int(state.step), checkpoints.steps()) == (3, [3])
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 2
        for line, step, name in zip(told, (9, 6), ("9.1", "6"), strict=True):
            assert line.startswith(f"warning: {copy / str(step)}/seal/seal.json is damaged; moved to "), line
            assert line.endswith(f"damaged/{name}; going on from step 3"), line
        checkpoints.save(drawn(6), {}, None)  # again
        checkpoints.save(drawn(9), {}, None)
    assert sorted(entry.name for entry in (copy / "damaged").iterdir()) == ["6", "9", "9.1"]
    with opened(copy) as checkpoints:
        assert bits(checkpoints.restore_newest(like())[0]) == bits(drawn(9))


def test_where_no_step_is_good_nothing_is_moved_and_nothing_begun(copy: pathlib.Path) -> None:
    for step in LOSSES:
        for file in (copy / str(step) / "params").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:10])
    before = contents(copy)
    with opened(copy) as checkpoints, pytest.raises(DataError, match="no saved step can be used") as raised:
        checkpoints.restore_newest(like())
    assert contents(copy) == before
    assert str(raised.value).count("cannot be restored") == 3
    assert "\n" not in str(raised.value)


def test_foreign_files_and_an_empty_step(copy: pathlib.Path) -> None:
    (copy / "12").mkdir()
    (copy / "notes.txt").write_text("mine")
    (copy / "backup").mkdir()
    with opened(copy) as checkpoints:
        state, _ = checkpoints.restore_newest(like())
    assert int(state.step) == 9
    assert (copy / "damaged" / "12").is_dir()
    assert (copy / "notes.txt").read_text() == "mine"


def test_a_failure_of_the_machine_is_no_damage(copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: no memory")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.restore", fails)
    with opened(copy) as checkpoints, pytest.raises(DataError, match="RESOURCE_EXHAUSTED") as raised:
        checkpoints.restore_newest(like())
    assert not isinstance(raised.value, DamagedError)
    assert not (copy / "damaged").exists()


def test_a_save_from_elsewhere_reads_nothing_outside_of_itself(copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A link in it, or names that lead out of it."""
    (copy / "9" / "params").rename(tmp_path / "elsewhere")
    (copy / "9" / "params").symlink_to(tmp_path / "elsewhere")
    for step, name in ((6, "/etc"), (3, "../../6/params")):
        metadata = copy / str(step) / "params" / "_METADATA"
        text = metadata.read_text()
        assert '"wpe"' in text
        metadata.write_text(text.replace('"wpe"', f'"{name}"').replace("'wpe'", f"'{name}'"))
    with opened(copy) as checkpoints:
        with pytest.raises(DamagedError, match="9/params is a link, and saves have none"):
            checkpoints.restore(9, like())
        with pytest.raises(DataError, match="no saved step can be used"):
            checkpoints.restore_newest(like())


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "null", '{"meta": {}, "checksums": 3, "sha256": []}', ""])
def test_a_hostile_seal(copy: pathlib.Path, text: str) -> None:
    (copy / "9" / "seal" / "seal.json").write_text(text)
    (copy / "9" / "metrics" / "metrics").write_text(text)
    with opened(copy) as checkpoints:
        assert int(checkpoints.restore_newest(like())[0].step) == 6
        assert checkpoints.best_step() == 6


@pytest.mark.faults
def test_a_run_goes_on_from_the_step_before(tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny: Workshop = workshop(tmp_path_factory.getbasetemp())
    folder = tmp_path / "run"
    (first,) = fault_runs.run(tiny, folder, settings={"train.steps": 24})
    assert first.code == 0, first.err
    expected = fault_runs.state_hash(folder, 24)
    newest = folder / "checkpoints" / "24"
    (data,) = [file for file in (newest / "params").glob("ocdbt.process_0/d/*")][:1]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    shutil.rmtree(newest / "params" / "d")
    (again,) = fault_runs.run(tiny, folder)
    assert again.code == 0, again.err
    assert f"warning: {newest}" in again.err
    assert "going on from step 21" in again.err
    assert "Traceback" not in again.err
    assert fault_runs.state_hash(folder, 24) == expected
    # Who loads it is told, too.
    for step in fault_runs.saved_steps(folder):
        (folder / "checkpoints" / str(step) / "seal" / "seal.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"seal.json is damaged"):
        gpt2_jax.load(folder)
    (last,) = fault_runs.run(tiny, folder, settings={"train.log_every": 2})
    last.says(3, "no saved step can be used", "another --workdir")
