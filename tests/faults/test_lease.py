"""A run folder is held by one job: leases that are renewed, left behind, damaged, lost and fought for."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from storage_emulator import Storage, storage
from tiny_run import REPOSITORY, Workshop, contents, finish, workshop

from gpt2_jax.errors import DivergedError, PreemptedError, UsageError
from gpt2_jax.run.folders import run_folders
from gpt2_jax.run.hosts import Hosts
from gpt2_jax.run.lease import LeaseLostError, Rhythm, held
from gpt2_jax.run.lease_file import BucketLeaseFile, LeaseFile, LocalLeaseFile

# Of a holder whose renewals a test waits for; the lapse is long, so that a busy machine does not let it pass.
HOLDING = Rhythm(renew=0.05, lapse=60, look=0.02, pause=0.05)
# Of one who finds a lease that nobody renews.
FINDING = Rhythm(renew=0.05, lapse=0.5, look=0.02, pause=0.05)
# Of one who is slow, and reads again late enough for others as slow.
CAREFUL = dataclasses.replace(HOLDING, renew=0.2, pause=0.5)
# The same, where a lease may be left that nobody renews.
RACING = dataclasses.replace(CAREFUL, lapse=15)
SECONDS = 60

BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
if not BOOT.exists():
    pytest.skip("this system has no boot id: every lease is watched", allow_module_level=True)


def elsewhere(**changes: Any) -> dict[str, Any]:
    """The lease of a job on another machine, put together by hand."""
    lease = {
        **{"host": "far-away", "boot": "b" * 36, "pid_namespace": "pid:[1]", "pid": 4242, "started": "17"},
        **{"token": "f" * 32, "renewals": 3, "since": "2026-01-02 03:04:05 UTC"},
    }
    return lease | changes


def here(**changes: Any) -> dict[str, Any]:
    """The lease of a job on this machine: this process, unless a test says otherwise."""
    started = pathlib.Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[19]
    place = {"boot": BOOT.read_text().strip(), "pid_namespace": os.readlink("/proc/self/ns/pid")}
    return elsewhere(host=socket.gethostname(), **place, pid=os.getpid(), started=started) | changes


def put(folder: pathlib.Path, lease: dict[str, Any] | bytes) -> bytes:
    data = lease if isinstance(lease, bytes) else json.dumps(lease).encode()
    (folder / "lease.json").write_bytes(data)
    return data


def take(folder: pathlib.Path, rhythm: Rhythm = FINDING, *, steal: bool = False) -> contextlib.AbstractContextManager:
    return run_folders(Hosts(0, 1), str(folder), "", steal=steal, rhythm=rhythm)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def overwrite(lease: pathlib.Path, text: str) -> None:
    """Not emptied before, as a holder renews it: who reads it meanwhile finds the old one or the new one."""
    with lease.open("r+") as file:
        file.write(text)


@contextlib.contextmanager
def renewed(renew: Callable[[int], None]) -> Iterator[None]:
    """A machine far away, that raises the counter of its lease."""
    stop = threading.Event()

    def work() -> None:
        count = 4
        while not stop.wait(0.05):
            renew(count)
            count += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# A job: takes the folder, says so, and asks the lease whenever it gets a line.
JOB = """
import resource, sys
from gpt2_jax.cli.guard import guarded
from gpt2_jax.run.folders import run_folders
from gpt2_jax.run.hosts import Hosts
from gpt2_jax.run.lease import Rhythm

def body():
    rhythm = Rhythm(*map(float, sys.argv[3:]))
    with run_folders(Hosts(0, 1), sys.argv[1], "", steal=sys.argv[2] == "steal", rhythm=rhythm) as folders:
        print("in", flush=True)
        for line in sys.stdin:
            if line.startswith("limit"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(line.split()[1]), -1))
            folders.check_held()
            print("held", flush=True)
    return 0

sys.exit(guarded("job", body))
"""


@contextlib.contextmanager
def job(folder: pathlib.Path, flag: str = "", rhythm: Rhythm | None = None) -> Iterator[subprocess.Popen]:
    """A process that holds `folder`, or tries to."""
    seconds = dataclasses.astuple(rhythm or Rhythm())
    command = [sys.executable, "-c", JOB, str(folder), flag, *map(str, seconds)]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen, word: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == f"{word}\n", process.communicate(timeout=SECONDS)[1]


def asked(process: subprocess.Popen, line: str, answer: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    said(process, answer)


@pytest.fixture
def bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The server; mirrors are below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return storage()


# One machine


def test_two_jobs_on_one_folder(tmp_path: pathlib.Path) -> None:
    with job(tmp_path) as first:
        said(first, "in")
        lease = json.loads((tmp_path / "lease.json").read_text())
        before = contents(tmp_path)
        with job(tmp_path) as second:
            err = second.communicate(timeout=SECONDS)[1]
        assert second.returncode == 2
        (line,) = err.splitlines()
        assert line.startswith(f"job: error: --workdir={tmp_path}: the job of host {socket.gethostname()}, ")
        for part in (f"pid {first.pid}, since {lease['since']} works there", "stop that job", "another folder"):
            assert part in line
        assert contents(tmp_path) == before
        asked(first, "", "held")
        out, err = first.communicate(timeout=SECONDS)  # which closes its input: an orderly end
        assert (first.returncode, out, err) == (0, "", "")
    assert contents(tmp_path) == {}
    with job(tmp_path) as third:
        said(third, "in")
        assert third.communicate(timeout=SECONDS)[1] == ""


def test_what_a_killed_job_leaves_is_taken_over_at_once(tmp_path: pathlib.Path) -> None:
    with job(tmp_path) as first:
        said(first, "in")
        first.kill()
        # Nobody has waited for the process yet: it is a zombie, and its number is still in use.
        wait_for(lambda: ") Z " in pathlib.Path(f"/proc/{first.pid}/stat").read_text())
        lease = (tmp_path / "lease.json").read_bytes()
        with job(tmp_path) as second:  # which would watch for minutes
            said(second, "in")
            assert (tmp_path / "lease.json").read_bytes() != lease
            err = second.communicate(timeout=SECONDS)[1]
            assert f"pid {first.pid}, since " in err
            assert err.endswith(" is gone; taken over\n")
        second_lease = contents(tmp_path)
    assert {*second_lease} <= {"run.lock"}


def test_a_lease_says_who_holds_it_and_is_renewed(tmp_path: pathlib.Path) -> None:
    def lease() -> dict[str, Any]:
        return json.loads((tmp_path / "lease.json").read_text())

    with take(tmp_path, HOLDING) as folders:
        first = lease()
        assert first == here(token=first["token"], renewals=first["renewals"], since=first["since"])
        assert re.fullmatch("[0-9a-f]{32}", first["token"])
        wait_for(lambda: lease()["renewals"] > first["renewals"] + 12)  # more digits, too
        assert lease() == first | {"renewals": lease()["renewals"]}
        folders.check_held()
    assert contents(tmp_path) == {}


def test_another_process_with_the_number_of_the_holder(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    put(tmp_path, here(started="1"))
    with take(tmp_path, Rhythm()):
        pass
    assert f"pid {os.getpid()}, since 2026-01-02 03:04:05 UTC is gone; taken over" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{}, {"boot": "", "pid": 2**31 - 1}, {"boot": "c" * 36, "pid": 2**31 - 1}, {"pid_namespace": "", "pid": 2**31 - 1}],
    ids=["alive", "no boot id", "another boot", "another container"],
)
def test_who_may_be_alive_is_watched(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, changes: dict[str, Any]
) -> None:
    put(tmp_path, here(**changes))
    started = time.monotonic()
    with take(tmp_path):
        assert time.monotonic() - started > FINDING.lapse
    assert "watching for 0.5 s" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PreemptedError("75"), DivergedError("4"), OSError("1")])
def test_a_lease_is_released_however_the_job_ends(tmp_path: pathlib.Path, error: BaseException) -> None:
    with pytest.raises(type(error)), take(tmp_path):
        assert (tmp_path / "lease.json").exists()
        raise error
    assert contents(tmp_path) == {}


def test_the_processes_beside_the_first_hold_nothing(tmp_path: pathlib.Path) -> None:
    with run_folders(Hosts(1, 1), str(tmp_path), "") as folders:
        assert contents(tmp_path) == {}
        folders.check_held()


def test_checkpoints_of_their_own_are_held_too(tmp_path: pathlib.Path) -> None:
    saved = tmp_path / "saved"
    with run_folders(Hosts(0, 1), str(tmp_path / "a"), str(saved), rhythm=HOLDING) as folders:
        for lease in (tmp_path / "a" / "lease.json", saved / "lease.json"):
            assert json.loads(lease.read_text())["pid"] == os.getpid()
        with (
            pytest.raises(UsageError, match=f"--checkpoints={saved}: the job of .* pid {os.getpid()}"),
            run_folders(Hosts(0, 1), str(tmp_path / "b"), str(saved)),
        ):
            pass
        assert not (tmp_path / "b" / "lease.json").exists()
        folders.check_held()
        put(saved, elsewhere())
        with pytest.raises(LeaseLostError, match=f"--checkpoints={saved}: the job of host far-away, pid 4242"):
            checked_until_lost(folders.check_held)
    assert {*contents(tmp_path)} == {"saved/lease.json"}


def checked_until_lost(check: Callable[[], None]) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        check()
        time.sleep(0.01)


# Another machine


def test_a_lease_of_another_host_that_is_renewed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    lease = tmp_path / "lease.json"
    put(tmp_path, elsewhere())
    rhythm = dataclasses.replace(FINDING, lapse=SECONDS)
    with (
        renewed(lambda count: overwrite(lease, json.dumps(elsewhere(renewals=count)))),
        pytest.raises(UsageError, match=re.escape(f"--workdir={tmp_path}: ")) as raised,
        take(tmp_path, rhythm),
    ):
        pass
    assert "host far-away, pid 4242, since 2026-01-02 03:04:05 UTC works there; stop that job" in str(raised.value)
    (notice,) = capsys.readouterr().err.splitlines()
    assert notice.startswith(f"--workdir={tmp_path}: held by the job of host far-away, pid 4242, since 2026-01-02")
    assert "watching for 60 s" in notice
    assert json.loads(lease.read_text())["host"] == "far-away"
    assert {*contents(tmp_path)} == {"lease.json"}


@pytest.mark.parametrize("clock", [0, 2**33], ids=["1970", "2242"])
@pytest.mark.parametrize("since", ["1970-01-01 00:00:00 UTC", "9999-12-31 23:59:59 UTC", ""])
def test_a_lease_that_is_not_renewed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, clock: int, since: str
) -> None:
    put(tmp_path, elsewhere(since=since))
    os.utime(tmp_path / "lease.json", (clock, clock))
    started = time.monotonic()
    with take(tmp_path) as folders:
        assert time.monotonic() - started > FINDING.lapse
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
        folders.check_held()
    watching, taken = capsys.readouterr().err.splitlines()
    assert "watching for 0.5 s whether it is renewed" in watching
    assert (
        taken
        == f"--workdir={tmp_path}: not renewed; taken over from the job of host far-away, pid 4242, "
        + (f"since {since}").rstrip()
    )
    assert contents(tmp_path) == {}


def test_a_lease_that_is_released_while_it_is_watched(tmp_path: pathlib.Path) -> None:
    put(tmp_path, elsewhere())
    timer = threading.Timer(0.3, (tmp_path / "lease.json").unlink)
    timer.start()
    with take(tmp_path, dataclasses.replace(FINDING, lapse=10 * SECONDS)) as folders:
        folders.check_held()
    timer.join()


WHOLE = json.dumps(elsewhere()).encode()
DAMAGED = {
    **{"empty": b"", "half": WHOLE[: len(WHOLE) // 2], "no JSON": b"\xff\x00", "a list": b"[]", "deep": b"[" * 4000},
    **{"long": WHOLE + b" " * 10**6, "more": json.dumps(elsewhere(more=1)).encode()},
    **{"less": json.dumps({"pid": 4242}).encode(), "no text": json.dumps(elsewhere(host=1)).encode()},
    **{"pid 0": json.dumps(here(pid=0)).encode(), "pid -1": json.dumps(here(pid=-1)).encode()},
    **{"pid": json.dumps(here(pid=10**30)).encode(), "lines": json.dumps(elsewhere(host="a\nb\x1b[2J")).encode()},
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_lease_is_one_of_an_unknown_holder(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, data: bytes
) -> None:
    put(tmp_path, data)
    started = time.monotonic()
    with take(tmp_path) as folders:
        assert time.monotonic() - started > FINDING.lapse
        folders.check_held()
    watching, taken = capsys.readouterr().err.splitlines()
    assert "held by another job; watching" in watching
    assert taken.endswith("not renewed; taken over from another job")


def test_a_damaged_lease_that_changes_is_held(tmp_path: pathlib.Path) -> None:
    put(tmp_path, b"")
    with (
        renewed(lambda count: (tmp_path / "lease.json").write_bytes(b"{" * (count % 7))),
        pytest.raises(UsageError, match="another job works there"),
        take(tmp_path, HOLDING),
    ):
        pass


# A lease that is lost


@pytest.mark.parametrize("there", [elsewhere(), b"{"], ids=["another's", "damaged"])
def test_another_lease_in_the_place_of_ones_own(tmp_path: pathlib.Path, there: dict[str, Any] | bytes) -> None:
    with take(tmp_path, HOLDING) as folders:
        folders.check_held()
        data = put(tmp_path, there)
        with pytest.raises(LeaseLostError, match=f"--workdir={tmp_path}: .* this job writes nothing more") as raised:
            checked_until_lost(folders.check_held)
        assert ("far-away, pid 4242" in str(raised.value)) == isinstance(there, dict)
        assert raised.value.exit_code == 2
        with pytest.raises(LeaseLostError):
            folders.check_held()
    assert (tmp_path / "lease.json").read_bytes() == data


def test_a_lease_that_is_gone(tmp_path: pathlib.Path) -> None:
    with take(tmp_path, HOLDING) as folders:
        (tmp_path / "lease.json").unlink()
        with pytest.raises(LeaseLostError, match="its lease is gone"):
            checked_until_lost(folders.check_held)
    assert contents(tmp_path) == {}


def test_a_job_that_stood_still_for_too_long(tmp_path: pathlib.Path) -> None:
    rhythm = dataclasses.replace(HOLDING, renew=0.2)
    with job(tmp_path, rhythm=rhythm) as first:
        said(first, "in")
        asked(first, "", "held")
        first.send_signal(signal.SIGSTOP)
        (tmp_path / "run.lock").unlink()  # which says nothing to another machine
        with take(tmp_path) as folders:
            assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
            assert first.stdin is not None
            first.stdin.write("\n")
            first.stdin.flush()
            first.send_signal(signal.SIGCONT)
            out, err = first.communicate(timeout=SECONDS)
            assert (first.returncode, out) == (2, "")
            assert f"the job of host {socket.gethostname()}, pid {os.getpid()}, since" in err.splitlines()[-1]
            assert "has taken it; this job writes nothing more there" in err.splitlines()[-1]
            folders.check_held()
            assert (tmp_path / "lease.json").exists()


def test_a_lease_that_cannot_be_renewed_for_a_while(tmp_path: pathlib.Path) -> None:
    lease = tmp_path / "lease.json"

    def renewals() -> int:
        return int(json.loads(lease.read_text())["renewals"])

    with job(tmp_path, rhythm=HOLDING) as process:
        said(process, "in")
        asked(process, "limit 0", "held")  # it may read, but not write, as on a full disk
        before = renewals()
        time.sleep(10 * HOLDING.renew)
        asked(process, "", "held")
        assert renewals() <= before + 1
        asked(process, "limit -1", "held")
        wait_for(lambda: renewals() > before + 3)
        asked(process, "", "held")
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (0, "")
    (line,) = err.splitlines()
    assert line.startswith(f"--workdir={tmp_path}: its lease cannot be renewed ([Errno 27] ")
    assert contents(tmp_path) == {}


def test_a_lease_that_cannot_be_renewed_any_more(tmp_path: pathlib.Path) -> None:
    with job(tmp_path, rhythm=dataclasses.replace(HOLDING, lapse=3)) as process:
        said(process, "in")
        asked(process, "limit 0", "held")
        time.sleep(4)
        assert process.stdin is not None
        process.stdin.write("\n")
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (2, "")
    warning, lost = err.splitlines()
    assert "its lease cannot be renewed" in warning
    assert "its lease could not be renewed for 3 s ([Errno 27] " in lost


def test_a_lease_that_cannot_be_read(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    lease, aside, loop = (tmp_path / name for name in ("lease.json", "aside", "loop"))
    with take(tmp_path, HOLDING) as folders:
        os.link(lease, aside)
        loop.symlink_to(lease)
        os.replace(loop, lease)
        time.sleep(10 * HOLDING.look)
        folders.check_held()
        os.replace(aside, lease)
        before = json.loads(lease.read_text())["renewals"]
        wait_for(lambda: json.loads(lease.read_text())["renewals"] > before)
        folders.check_held()
    assert "its lease cannot be renewed ([Errno 40]" in capsys.readouterr().err


# Stealing


def test_a_folder_is_taken_from_a_job_that_is_alive(tmp_path: pathlib.Path) -> None:
    with job(tmp_path, rhythm=HOLDING) as first:
        said(first, "in")
        with job(tmp_path, "steal", HOLDING) as second:
            said(second, "in")
            assert first.stdin is not None
            first.stdin.write("\n" * 20)
            out, err = first.communicate(timeout=SECONDS)
            assert (first.returncode, "") == (2, out.replace("held\n", ""))
            assert f"pid {second.pid}, since" in err
            assert "has taken it; this job writes nothing more there" in err
            asked(second, "", "held")
            with job(tmp_path) as third:  # though the lock file went with the first one
                refused = third.communicate(timeout=SECONDS)[1]
            assert third.returncode == 2
            assert f"pid {second.pid}, since" in refused.splitlines()[-1]
            asked(second, "", "held")
            out, err = second.communicate(timeout=SECONDS)
        assert (second.returncode, out) == (0, "")
        (line,) = err.splitlines()
        assert line.startswith(
            f"--workdir={tmp_path}: taken from the job of host {socket.gethostname()}, pid {first.pid}"
        )
        assert line.endswith(" by --steal_lock")
    assert contents(tmp_path) == {}


def test_a_folder_is_taken_from_another_host_at_once(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    put(tmp_path, elsewhere())
    with take(tmp_path, Rhythm(), steal=True) as folders:  # which would watch for minutes
        folders.check_held()
    assert "taken from the job of host far-away, pid 4242" in capsys.readouterr().err
    with take(tmp_path, steal=True):
        pass
    assert capsys.readouterr().err == ""


# Two who take it at once


def race(file: Callable[[], LeaseFile], rhythm: Rhythm, takers: int, seed: int) -> int:
    """Lets them all go for it, without a lock between them; gives the number of those that had it."""
    start, over = threading.Barrier(takers), threading.Event()
    winners: list[int] = []
    failures: list[str] = []

    def go(number: int) -> None:
        own, dice = file(), random.Random(seed * takers + number)
        start.wait()
        sys.settrace(lambda *frame: dawdle(dice, *frame))  # of this thread
        try:
            with held(own, "the place", rhythm=rhythm) as lease:
                lease.check()
                winners.append(number)
                over.wait()
        except UsageError:
            failures.append("refused")
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=go, args=(number,)) for number in range(takers)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(winners) + len(failures) == takers)
    try:
        assert {*failures} <= {"refused"}
        return len(winners)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def dawdle(dice: random.Random, frame: types.FrameType, event: str, _: Any) -> Any:
    """Traces the lines of the lease, and waits a little before some, so that they come in all orders."""
    if not pathlib.Path(frame.f_code.co_filename).name.startswith("lease"):
        return None
    if event == "line" and dice.random() < 0.3:
        time.sleep(dice.random() * 0.003)
    return lambda *inner: dawdle(dice, *inner)


@pytest.mark.parametrize("left", [None, here(started="1")], ids=["an empty folder", "a dead job's lease"])
def test_one_of_many_on_one_folder_gets_it(tmp_path: pathlib.Path, left: dict[str, Any] | None) -> None:
    """As machines that share a folder, without the lock that keeps jobs of one machine apart.

    The lease of one that gave way may stay, put back by another who had moved it away to judge it; it lapses.
    """
    rounds, won = 10, 0
    for seed in range(rounds):
        if left is not None:
            put(tmp_path, left)
        winners = race(lambda: LocalLeaseFile(tmp_path), RACING, 6, seed)
        assert winners <= 1
        won += winners
        if (tmp_path / "lease.json").exists():
            with take(tmp_path):
                pass
        assert not list(tmp_path.iterdir())
    assert won > rounds / 2


def test_who_is_written_over_at_the_start_gives_way(tmp_path: pathlib.Path) -> None:
    with take(tmp_path, Rhythm()) as folders:
        put(tmp_path, elsewhere())
        with pytest.raises(LeaseLostError, match="host far-away"):
            folders.check_held()  # long before the thread looks


def test_who_is_written_over_while_he_takes_over_gives_way(tmp_path: pathlib.Path) -> None:
    old = put(tmp_path, here(started="1"))

    def write_over() -> None:
        wait_for(lambda: LocalLeaseFile(tmp_path).read() not in (old, None, b""))
        put(tmp_path, elsewhere())

    thread = threading.Thread(target=write_over)
    thread.start()
    with pytest.raises(UsageError, match="host far-away, pid 4242, .* works there"), take(tmp_path, CAREFUL):
        pass
    thread.join()
    assert json.loads((tmp_path / "lease.json").read_text()) == elsewhere()


def test_what_is_there_is_not_made_anew(tmp_path: pathlib.Path, bucket: Storage) -> None:
    for file in (LocalLeaseFile(tmp_path), BucketLeaseFile("gs://bucket/leases/new")):
        assert file.read() is None
        assert file.create(b"first")
        assert not file.create(b"second")
        assert file.read() == b"first"
        for change in (file.remove, lambda judge, file=file: file.renew(judge, b"third")):
            assert not change(lambda data: data == b"second")
        assert file.read() == b"first"
        assert file.renew(lambda data: data == b"first", b"third")
        assert file.read() == b"third"
        assert file.remove(lambda data: data == b"third")
        assert file.read() is None
        assert not file.remove(lambda data: True)
        assert not file.renew(lambda data: True, b"fourth")
        assert file.read() is None


@pytest.mark.parametrize("change", ["remove", "renew"])
def test_a_lease_that_comes_between_two_steps_of_another_stays(tmp_path: pathlib.Path, change: str) -> None:
    file = LocalLeaseFile(tmp_path)
    file.create(b"old")

    def judge(data: bytes) -> bool:
        if data == b"old":  # and now another takes the folder over
            file_of_other.write_bytes(b"another's")
            os.replace(file_of_other, tmp_path / "lease.json")
        return data == b"old"

    file_of_other = tmp_path / "other"
    if change == "remove":
        assert not file.remove(judge)
    else:
        file.renew(judge, b"new")
    assert file.read() == b"another's"
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


# Real runs


LONG = {"train.steps": 100000, "train.eval_every": 100000, "train.sample_every": 100000}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@contextlib.contextmanager
def training(tiny: Workshop, folder: pathlib.Path, *flags: str) -> Iterator[subprocess.Popen]:
    """A run that has saved a step since it was started."""
    before = saved(folder)
    process = tiny.start(folder, LONG, *flags, quick=True)
    try:
        while saved(folder) <= before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


def saved(folder: pathlib.Path) -> int:
    steps = folder / "checkpoints"
    return max((int(step.name) for step in steps.glob("*") if step.name.isdecimal()), default=0)


def test_the_flag_that_steals(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    put(tmp_path, elsewhere())
    done = tiny.run_here(tmp_path, {"data.source": f"tokens:{tmp_path}"}, "--steal_lock")
    assert done.code == 3, done.err
    assert "taken from the job of host far-away, pid 4242" in done.err.splitlines()[0]
    assert contents(tmp_path) == {}


@pytest.mark.faults
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=["75", "130", "killed"])
def test_a_run_refuses_others_and_leaves_its_folder_free(
    tiny: Workshop, tmp_path: pathlib.Path, how: signal.Signals
) -> None:
    with training(tiny, tmp_path / "run") as first:
        since = json.loads((tmp_path / "run" / "lease.json").read_text())["since"]
        tiny.run_here(tmp_path / "run").says(2, f"pid {first.pid}, since {since} works there", "stop that job")
        first.send_signal(how)
        done = finish(first)
    expected = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how]
    assert done.code == expected, done.err
    assert (tmp_path / "run" / "lease.json").exists() == (how == signal.SIGKILL)
    with training(tiny, tmp_path / "run") as second:
        second.send_signal(signal.SIGTERM)
        done = finish(second)
    assert done.code == 75, done.err
    assert (f"pid {first.pid}, since {since} is gone; taken over" in done.err) == (how == signal.SIGKILL)
    assert not (tmp_path / "run" / "lease.json").exists()


@pytest.mark.faults
def test_a_run_whose_folder_is_stolen_saves_no_more(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    with training(tiny, folder) as first, job(folder, "steal") as thief:
        said(thief, "in")
        err = finish(first).err
        assert first.returncode == 2, err
        assert f"pid {thief.pid}, since " in err.splitlines()[-1]
        assert "has taken it; this job writes nothing more there" in err.splitlines()[-1]
        asked(thief, "", "held")


# A bucket


def take_remote(name: str, rhythm: Rhythm, **options: Any) -> contextlib.AbstractContextManager:
    return run_folders(Hosts(0, 1), f"gs://bucket/{name}", "", rhythm=rhythm, **options)


def test_a_bucket_is_held_by_one_job(bucket: Storage, capsys: pytest.CaptureFixture) -> None:
    name = "leases/one"

    def lease() -> dict[str, Any]:
        return json.loads(bucket.get(f"{name}/lease.json"))

    with take_remote(name, HOLDING) as folders:
        first = lease()
        assert (first["host"], first["pid"]) == (socket.gethostname(), os.getpid())
        wait_for(lambda: lease()["renewals"] > first["renewals"])
        folders.check_held()
        assert not (folders.run / "lease.json").exists()
        place = f"--workdir=gs://bucket/{name}"
        refused = f"{place}: the job of .* pid {os.getpid()}, "
        with pytest.raises(UsageError, match=refused), take_remote(name, HOLDING):
            pass
        other_machine = BucketLeaseFile(f"gs://bucket/{name}")  # which does not see the lock file of this one
        watching = dataclasses.replace(FINDING, lapse=SECONDS)
        with pytest.raises(UsageError, match=refused), held(other_machine, place, rhythm=watching):
            pass
        folders.check_held()
    assert bucket.names(name) == {}
    assert capsys.readouterr().err.count("\n") == 1


def test_a_lease_in_a_bucket_lapses_and_is_lost(bucket: Storage, capsys: pytest.CaptureFixture) -> None:
    name = "leases/two"
    bucket.put(f"{name}/lease.json", json.dumps(elsewhere()).encode())
    with take_remote(name, FINDING) as folders:
        folders.check_held()
        taken = bucket.get(f"{name}/lease.json")
        assert json.loads(taken)["pid"] == os.getpid()
    assert "not renewed; taken over from the job of host far-away" in capsys.readouterr().err
    with take_remote(name, HOLDING, steal=True) as folders:
        bucket.put(f"{name}/lease.json", json.dumps(elsewhere()).encode())
        with pytest.raises(LeaseLostError, match=f"gs://bucket/{name}: the job of host far-away, pid 4242"):
            checked_until_lost(folders.check_held)
    assert json.loads(bucket.get(f"{name}/lease.json")) == elsewhere()


@pytest.mark.parametrize("left", [None, here(started="1")], ids=["an empty folder", "a dead job's lease"])
def test_one_of_many_on_one_bucket_gets_it(bucket: Storage, left: dict[str, Any] | None) -> None:
    for count in range(3):
        name = f"leases/race{count}{left is None}"
        if left is not None:
            bucket.put(f"{name}/lease.json", json.dumps(left).encode())
        assert race(lambda name=name: BucketLeaseFile(f"gs://bucket/{name}"), RACING, 4, count) <= 1
        assert bucket.names(name) == {}
