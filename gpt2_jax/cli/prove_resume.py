"""`gpt2-jax prove-resume`: shows on this machine, for one's own config, that a killed run loses nothing.

It runs the config, shortened, once undisturbed; then again, killing it at random moments and starting it anew; where
there are several devices, once more with another mesh after the first kill. Then it compares what was saved last.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from gpt2_jax.cli.quiet_logs import quiet_logs
from gpt2_jax.config import MeshConfig, RunConfig
from gpt2_jax.config_file import load_config
from gpt2_jax.errors import Gpt2JaxError, UsageError

# Sums in another order differ in their last bits, which training amplifies.
_ANOTHER_MESH = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.epilog = "Any key of the config is overridden by --config.SECTION.KEY=VALUE."
    parser.add_argument("--config", default="", metavar="FILE", help="Python file with get_config()")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=3, help="times that a run is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument(
        "--workdir", default="", metavar="DIR", help="where the runs are made and kept (default: a temporary folder)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 where all is equal, 1 where it is not."""
    if not arguments.config:
        raise UsageError("--config=FILE is needed, such as --config=configs/quickstart.py; see --help")
    for flag, low in (("steps", 8), ("kills", 1)):
        if getattr(arguments, flag) < low:
            raise UsageError(f"--{flag}={getattr(arguments, flag)}; allowed: {low} or more")
    quiet_logs()
    settings = _shortened(load_config(arguments.config, arguments.overrides), arguments.steps)
    proof = _Proof(arguments, settings)
    mesh = load_config(arguments.config, proof.overrides).mesh  # what is wrong is refused here, before anything is run
    with _workdir(arguments.workdir) as folder:
        return _prove(proof, folder, _other_mesh(mesh), random.Random(arguments.seed))


@dataclasses.dataclass
class _Proof:
    """The command of a run."""

    arguments: argparse.Namespace
    settings: dict[str, str]

    @property
    def overrides(self) -> dict[str, str]:
        return {**self.arguments.overrides, **self.settings}

    def start(self, folder: pathlib.Path, mesh: dict[str, str] | None = None) -> subprocess.Popen:
        flags = [f"--config.{key}={value}" for key, value in {**self.overrides, **(mesh or {})}.items()]
        program = [sys.executable, "-m", "gpt2_jax.cli.train", f"--config={self.arguments.config}"]
        with (folder.parent / f"{folder.name}.log").open("ab") as log:
            return subprocess.Popen([*program, f"--workdir={folder}", *flags], stdout=log, stderr=log)

    def finish(self, folder: pathlib.Path, mesh: dict[str, str] | None = None) -> float:
        """Runs to the end; the seconds that it took. Raises Gpt2JaxError when it fails."""
        start = time.monotonic()
        process = self.start(folder, mesh)
        with _killed_with_this(process):
            code = process.wait()
        if code:
            log = folder.parent / f"{folder.name}.log"
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise Gpt2JaxError(f"a run in {folder} ended with {code}: {last}")
        return time.monotonic() - start


def _prove(proof: _Proof, folder: pathlib.Path, meshes: dict[str, str], rng: random.Random) -> int:
    steps, kills = proof.arguments.steps, proof.arguments.kills
    print(f"{steps} steps, a save after every {proof.settings['checkpoint.every']}, in {folder}", flush=True)
    seconds = proof.finish(folder / "undisturbed")
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    _kill_again_and_again(proof, folder / "killed", kills, rng)
    expected, found = _state(folder / "undisturbed"), _state(folder / "killed")
    differ = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    verdict = [f"{len(expected)} arrays of the state after step {steps}, sha256: "]
    verdict[0] += f"{len(differ)} differ, the first of them {differ[0]}" if differ else "all equal, bit for bit"
    proved = not differ
    if meshes:
        _kill_again_and_again(proof, folder / "mesh", 1, rng, meshes)
        there, here = _losses(folder / "mesh"), _losses(folder / "undisturbed")
        worst = max(abs(there[step] - here[step]) / abs(here[step]) for step in here)
        proved = proved and worst <= _ANOTHER_MESH
        verdict.append(f"on another mesh ({meshes}) held-out losses differ by {worst:.1e} (allowed {_ANOTHER_MESH})")
    else:
        verdict.append("another mesh: not tried, there is one device")
    print("\n".join([*verdict, "PROVED" if proved else "NOT PROVED: keep the folder, and report it"]))
    return 0 if proved else 1


def _kill_again_and_again(
    proof: _Proof, folder: pathlib.Path, kills: int, rng: random.Random, then: dict[str, str] | None = None
) -> None:
    """Kills as soon as there is something new to lose, and a random while later."""
    steps = proof.arguments.steps
    for number in range(kills):
        goal = steps * (number + 1) // (kills + 1)
        process = proof.start(folder)
        with _killed_with_this(process):
            while process.poll() is None and _reported(folder) < goal:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5))
        step = _reported(folder)
        if process.returncode == 0:
            print(f"run {number + 1} was done before it could be killed; more --steps give more time")
            return
        if process.returncode != -signal.SIGKILL:
            raise Gpt2JaxError(f"a run in {folder} ended with {process.returncode}: see {folder}.log")
        print(f"killed after step {step}, {', '.join(map(str, _saved(folder))) or 'none'} saved", flush=True)
    proof.finish(folder, then)


def _shortened(config: RunConfig, steps: int) -> dict[str, str]:
    optimizer = config.optimizer
    return {
        "train.steps": str(steps),
        "optimizer.warmup_steps": str(min(optimizer.warmup_steps, steps // 4)),
        "optimizer.decay_steps": str(min(optimizer.decay_steps, steps // 4)),
        "train.log_every": "1",
        "train.eval_every": str(steps // 4),
        "train.eval_windows": str(min(config.train.eval_windows or 64, 64)),
        "train.sample_every": "0",
        "checkpoint.every": str(max(1, steps // 8)),
        "checkpoint.export_best": "False",
    }


def _other_mesh(mesh: MeshConfig) -> dict[str, str]:
    """Settings that lay the state out otherwise, where there is more than one device."""
    counted = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.device_count())"], capture_output=True, text=True, check=True
    )
    if int(counted.stdout) == 1:
        return {}
    whole, split = ("data", "fsdp") if mesh.fsdp == 1 else ("fsdp", "data")
    return {"mesh.tensor": "1", f"mesh.{whole}": "1", f"mesh.{split}": "-1"}


def _state(folder: pathlib.Path) -> dict[str, str]:
    """The hash of each array of the newest save, whose checksums are looked at on the way."""
    from gpt2_jax.run.state_hashes import state_hashes

    return state_hashes(folder)


def _saved(folder: pathlib.Path) -> list[int]:
    return sorted(int(step.name) for step in (folder / "checkpoints").glob("*") if step.name.isdecimal())


def _reported(folder: pathlib.Path) -> int:
    return max((report["step"] for report in _reports(folder)), default=0)


def _losses(folder: pathlib.Path) -> dict[int, float]:
    return {report["step"]: report["held_out_loss"] for report in _reports(folder) if "held_out_loss" in report}


def _reports(folder: pathlib.Path) -> list[dict]:
    from gpt2_jax.run.metrics import read_reports

    file = folder / "metrics.jsonl"
    return read_reports(file) if file.exists() else []


@contextlib.contextmanager
def _workdir(path: str) -> Iterator[pathlib.Path]:
    if path:
        folder = pathlib.Path(path).expanduser()
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"--workdir={path} is not empty; name a folder that is, or none")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    folder = pathlib.Path(tempfile.mkdtemp(prefix="prove-resume-"))
    yield folder
    shutil.rmtree(folder)  # after an error or a failed proof it is left to be looked at


@contextlib.contextmanager
def _killed_with_this(process: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()
