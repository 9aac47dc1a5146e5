"""P10: what `gpt2-jax prove-resume` says of a run."""

import os
import pathlib
import subprocess
import sys

import pytest
from tiny_run import TINY, Finished, Workshop, workshop

from gpt2_jax.cli import prove_resume
from gpt2_jax.cli.main import main
from gpt2_jax.config import MeshConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


def prove(tiny: Workshop, folder: pathlib.Path, devices: int, *flags: str) -> Finished:
    settings = {**TINY, "data.source": f"text:{tiny.corpus}", "data.cache_dir": tiny.folder / "tokens"}
    command = [sys.executable, "-m", "gpt2_jax.cli.main", "prove-resume", f"--config={tiny.config}", *flags]
    command += [f"--workdir={folder}", *(f"--config.{key}={value}" for key, value in settings.items())]
    environment = {**tiny.environment(), "JAX_NUM_CPU_DEVICES": str(devices), "XDG_CACHE_HOME": str(tiny.folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.faults
def test_a_run_is_proved_on_its_mesh_and_on_another(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    done = prove(tiny, tmp_path, 2, "--kills=2", "--steps=16")
    assert done.code == 0, done.out + done.err
    lines = done.out.splitlines()
    assert lines[-1] == "PROVED"
    assert "sha256: all equal, bit for bit" in lines[-3]
    assert "on another mesh (" in lines[-2]
    assert sum(line.startswith("killed after step ") for line in lines) == 3
    assert {entry.name for entry in tmp_path.iterdir()} >= {"undisturbed", "killed", "mesh"}


@pytest.mark.faults
def test_a_difference_is_found(
    tiny: Workshop, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The killed run gets another seed."""
    finish = prove_resume._Proof.finish

    def otherwise(proof: prove_resume._Proof, folder: pathlib.Path, mesh: dict | None = None) -> float:
        if folder.name == "killed":
            for step in (folder / "checkpoints").glob("*"):
                step.rename(tmp_path / step.name)
            mesh = {"seed": "1"}
        return finish(proof, folder, mesh)

    monkeypatch.setattr(prove_resume._Proof, "finish", otherwise)
    monkeypatch.setattr(prove_resume, "_other_mesh", lambda mesh: {})
    for name, value in {**tiny.environment(), "JAX_NUM_CPU_DEVICES": "2", "XDG_CACHE_HOME": str(tiny.folder)}.items():
        monkeypatch.setitem(os.environ, name, value)
    settings = {**TINY, "data.source": f"text:{tiny.corpus}", "data.cache_dir": tiny.folder / "tokens"}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    code = main(
        ["prove-resume", f"--config={tiny.config}", f"--workdir={tmp_path / 'w'}", "--kills=1", "--steps=16", *flags]
    )
    told = capsys.readouterr().out
    assert code == 1, told
    assert " differ, the first of them " in told
    assert "NOT PROVED" in told


def test_the_other_mesh_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    for own, other in ((MeshConfig(), MeshConfig(1, -1, 1)), (MeshConfig(1, -1, 1), MeshConfig(-1, 1, 1))):
        settings = prove_resume._other_mesh(own)
        assert {name: int(size) for name, size in settings.items()} == {
            f"mesh.{name}": getattr(other, name) for name in ("data", "fsdp", "tensor")
        }


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        ([], "--config=FILE is needed"),
        (["--config=configs/quickstart.py", "--steps=3"], "--steps=3; allowed: 8 or more"),
        (["--config=configs/quickstart.py", "--kills=0"], "--kills=0; allowed: 1 or more"),
        (["--config=configs/quickstart.py", "--workdir=."], "is not empty"),
        (["--config=configs/quickstart.py", "--config.train.stepz=3"], "train.stepz"),
    ],
)
def test_what_is_refused(flags: list[str], fragment: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["prove-resume", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fragment in line
