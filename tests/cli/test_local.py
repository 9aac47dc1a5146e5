"""`python -m gpt2_jax.cli.local`: processes started, heard and ended together; small programs stand for train.py."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, sys, time, signal
place = dict(word[2:].split("=") for word in sys.argv[1:] if "=" in word)
index = int(place["process_id"])
print("stdout of", index, "of", place["num_processes"], os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"])
print("[Gloo] Rank 0 is connected to 1 peer ranks.")
print("stderr of", index, file=sys.stderr)
"""


def local(tmp_path: pathlib.Path, rest: str, *flags: str) -> subprocess.Popen:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + rest)
    return subprocess.Popen(
        [sys.executable, "-m", "gpt2_jax.cli.local", *flags, str(program), "--a=b"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> tuple[int, list[str], list[str]]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, sorted(out.splitlines()), sorted(err.splitlines())


def test_each_line_has_the_number_of_its_process(tmp_path: pathlib.Path) -> None:
    process = local(tmp_path, "sys.stdout.write('no end')", "--processes=2", "--devices_per_process=3")
    code, out, err = finished(process)
    assert code == 0
    assert out == ["[0] no end", "[0] stdout of 0 of 2 cpu 3", "[1] no end", "[1] stdout of 1 of 2 cpu 3"]
    assert err == ["[0] stderr of 0", "[1] stderr of 1"]


@pytest.mark.parametrize(
    ("end", "expected"),
    [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)],
)
def test_when_one_fails_the_others_are_ended(tmp_path: pathlib.Path, end: str, expected: int) -> None:
    """Those that do not end by themselves are killed."""
    start = time.monotonic()
    rest = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
if index == 1:
    {end}
time.sleep(600)
"""
    code, out, _ = finished(local(tmp_path, rest, "--processes=2", "--grace=1"))
    assert code == expected
    assert time.monotonic() - start < 30
    (waiting,) = (int(line.removeprefix("[0] ")) for line in out if line.removeprefix("[0] ").isdecimal())
    with pytest.raises(ProcessLookupError):
        os.kill(waiting, 0)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_handed_on(tmp_path: pathlib.Path, sent: signal.Signals) -> None:
    rest = f"""
def end(number, frame):
    print("heard", number)
    sys.exit(75)
signal.signal({int(sent)}, end)
print("waits", flush=True)
time.sleep(600)
"""
    process = local(tmp_path, rest, "--processes=2")
    said: list[str] = []
    while sum("waits" in line for line in said) < 2:
        said.append(process.stdout.readline())
    process.send_signal(sent)
    code, out, _ = finished(process)
    assert code == 75
    assert out == [f"[0] heard {int(sent)}", f"[1] heard {int(sent)}"]


def test_what_cannot_be_started(tmp_path: pathlib.Path) -> None:
    for flags, fragment in ((["--processes=0", "x"], "--processes=0; allowed"), (["--processes=2"], "no program")):
        done = subprocess.run(
            [sys.executable, "-m", "gpt2_jax.cli.local", *flags],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert fragment in done.stderr
