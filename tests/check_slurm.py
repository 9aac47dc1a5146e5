"""Whether launch/slurm.sbatch does on a real SLURM what it says: a script, since it needs SLURM's daemons.

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python tests/check_slurm.py [--preempt_by=signal|requeue]

It starts munge, slurmctld and slurmd on the loopback address, with a configuration, ports and folders of their own, and
submits two jobs of two tasks, each a tiny run in two processes: one is left alone, and one is preempted in its midst,
which has to save, end with 75, be requeued and go on. It ends with 1 unless both have the same losses, step by step and
bit for bit, in training and held out. Nothing that it started or wrote is left.

Preempted by `signal`: SIGTERM to the tasks, as before a time limit; by `requeue`: `scontrol requeue`, as administrators
and jobs of higher priority do it.
"""

import argparse
import contextlib
import dataclasses
import getpass
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

from tiny_run import REPOSITORY, Workshop

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONFIGURATION = """
ClusterName=check
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=check Nodes=localhost Default=YES
"""
# Every step is told, and none saved by itself, so that a save is one that the signal asked for.
SETTINGS = {"train.steps": 400, "train.log_every": 1, "train.eval_every": 400, "checkpoint.every": 400}


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A cluster of one node with two CPUs."""

    environment: Mapping[str, str]

    def command(self, *words: str) -> str:
        """What one of SLURM's commands prints, without the newline."""
        done = subprocess.run(words, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job: JobState, Restarts, ExitCode and others."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextlib.contextmanager
def slurm(folder: pathlib.Path, environment: Mapping[str, str]) -> Iterator[Slurm]:
    """The daemons, until the end of the block."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    text = CONFIGURATION.format(folder=folder, host=host, user=getpass.getuser(), **ports)
    (folder / "slurm.conf").write_text(text)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    # Without the variables of a job that this itself may run in.
    inherited = {name: value for name, value in environment.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    cluster = Slurm({**inherited, "SLURM_CONF": str(folder / "slurm.conf")})
    with contextlib.ExitStack() as stack:
        munge = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "log", "pid", "seed")]
        # --force: munge takes a temporary folder, which is closed to others, for a mistake.
        command = ("munged", "--foreground", "--force", f"--socket={folder / 'munge.sock'}", *munge)
        stack.enter_context(daemon(cluster, folder, *command))
        wait("munge", (folder / "munge.sock").exists)
        stack.enter_context(daemon(cluster, folder, "slurmctld", "-D", "-i"))
        stack.enter_context(daemon(cluster, folder, "slurmd", "-D", "-N", "localhost"))
        wait("the node", lambda: "State=IDLE" in cluster.command("scontrol", "show", "node", "localhost"))
        try:
            yield cluster
        finally:
            cluster.command("scancel", "--user", getpass.getuser())
            wait("the end of all jobs", lambda: not cluster.command("squeue", "--noheader"))


@contextlib.contextmanager
def daemon(cluster: Slurm, folder: pathlib.Path, *command: str) -> Iterator[None]:
    with open(folder / f"{command[0]}.log", "wb") as log:
        process = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait(what: str, come: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not come():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:g} s for {what}")
        time.sleep(0.2)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of two processes in a job."""

    cluster: Slurm
    number: str
    run_folder: pathlib.Path
    log: pathlib.Path

    def losses(self) -> dict[tuple[int, str], float]:
        """By step and kind, as far as they were told."""
        file = self.run_folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        told = [json.loads(line) for line in lines if line.endswith("}")]
        return {(row["step"], kind): row[kind] for row in told for kind in ("loss", "held_out_loss") if kind in row}

    def has_ended(self) -> bool:
        state = self.cluster.job(self.number)["JobState"]
        if state in ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
            raise SystemExit(f"job {self.number} is {state}:\n{self.log.read_text()}")
        return state == "COMPLETED"


def submit(cluster: Slurm, tiny: Workshop, name: str) -> Job:
    folder, log = tiny.folder / name, tiny.folder / f"{name}.log"
    flags = tiny.arguments(folder, SETTINGS)
    words = ("sbatch", "--parsable", f"--job-name={name}", "--ntasks=2", f"--output={log}")
    return Job(cluster, cluster.command(*words, "launch/slurm.sbatch", *flags), folder, log)


def preempt(job: Job, by: str) -> None:
    """Waits until the run is in its midst, preempts it, waits until it is in the queue again, and lets it go on."""
    wait("the first steps", lambda: len(job.losses()) > SETTINGS["train.steps"] // 10 or job.has_ended())
    if by == "signal":
        job.cluster.command("scancel", "--signal=TERM", job.number)
    else:
        job.cluster.command("scontrol", "requeue", job.number)
    wait("the requeueing", lambda: job.cluster.job(job.number)["JobState"] == "PENDING" or job.has_ended())
    state, log = job.cluster.job(job.number), job.log.read_text()
    print(f"preempted by {by}: {state['Restarts']} restart, {len(job.losses())} losses told")
    if state["Restarts"] != "1" or "exit code 75" not in log:
        raise SystemExit(f"not requeued after exit code 75:\n{log}")
    job.cluster.command("scontrol", "update", f"JobId={job.number}", "StartTime=now")  # else two minutes later


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether launch/slurm.sbatch does what it says, on a real SLURM.")
    parser.add_argument("--preempt_by", choices=("signal", "requeue"), default="signal")
    by = parser.parse_args().preempt_by
    path = os.pathsep.join((str(pathlib.Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"))
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        print(f"check_slurm.py: not here: {', '.join(missing)}; install slurmctld, slurmd, slurm-client and munge")
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that nothing is left then either
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Workshop(pathlib.Path(scratch))
        with slurm(tiny.folder, {**tiny.environment(), "PATH": path}) as cluster:
            alone = submit(cluster, tiny, "left-alone")
            wait("the run that is left alone", alone.has_ended)
            preempted = submit(cluster, tiny, "preempted")
            preempt(preempted, by)
            wait("the run that was preempted", preempted.has_ended)
            expected, got = alone.losses(), preempted.losses()
    print(f"{len(expected)} losses left alone, {len(got)} preempted; those of the last step:")
    for (step, kind), loss in expected.items():
        if step == SETTINGS["train.steps"]:
            print(f"  {kind}: {loss!r} left alone, {got.get((step, kind))!r} preempted")
    equal = got == expected and len(expected) == SETTINGS["train.steps"] + 1
    print("equal, all of them" if equal else "not equal")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
