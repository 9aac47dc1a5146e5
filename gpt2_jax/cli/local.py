"""A run of several processes on this machine, for trying and for tests.

    python -m gpt2_jax.cli.local --processes 2 train.py --config=configs/quickstart.py

Each process computes on CPU devices of its own, and they exchange over gloo, as hosts of a cluster do over theirs.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO, NoReturn

from gpt2_jax.cli.guard import guarded
from gpt2_jax.errors import UsageError
from gpt2_jax.run.rendezvous import free_address

_POLL_SECONDS = 0.1
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOISE = "[Gloo] Rank "  # gloo's own word, on stdout, about each connection


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the first exit code that is not 0, of whichever process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded("local", lambda: _run(_parse(arguments)))


def _run(flags: argparse.Namespace) -> int:
    address = free_address()
    processes = [_start(flags, address, index) for index in range(flags.processes)]
    readers = [
        threading.Thread(target=_hand_on, args=(stream, sink, f"[{index}] "))
        for index, process in enumerate(processes)
        for stream, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in _HANDED_ON}
    try:
        return _wait(processes, flags.grace)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for reader in readers:
            reader.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(flags: argparse.Namespace, address: str, index: int) -> subprocess.Popen[str]:
    place = (f"--coordinator_address={address}", f"--num_processes={flags.processes}", f"--process_id={index}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(flags.devices_per_process)}
    return subprocess.Popen(
        [sys.executable, *flags.command, *place],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C on the terminal comes to them once, from here
    )


def _hand_on(stream: IO[str], sink: IO[str], prefix: str) -> None:
    for line in stream:
        if not line.startswith(_NOISE):
            sink.write(f"{prefix}{line.rstrip()}\n")
            sink.flush()


def _wait(processes: Sequence[subprocess.Popen[str]], grace: float) -> int:
    first_failure, end = 0, float("inf")
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if not first_failure and any(codes):
            first_failure, end = next(filter(None, codes)), time.monotonic() + grace
        if None not in codes:
            break
        time.sleep(_POLL_SECONDS)
    return first_failure if first_failure >= 0 else 128 - first_failure  # as shells tell a signal


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m gpt2_jax.cli.local",
        description="Runs train.py in several processes on the CPU of this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--devices_per_process", type=int, default=1, metavar="N", help="CPU devices of each (default: %(default)s)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="for the others to end when one fails",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train.py ...", help="the program and its flags")
    flags = parser.parse_args(argv)
    for name in ("processes", "devices_per_process"):
        if getattr(flags, name) < 1:
            raise UsageError(f"--{name}={getattr(flags, name)}; allowed: integers from 1")
    if not flags.command:
        raise UsageError("no program: python -m gpt2_jax.cli.local --processes 2 train.py --config=FILE")
    return flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


if __name__ == "__main__":
    sys.exit(main())
