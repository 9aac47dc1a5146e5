"""Who holds a run folder, as its lease says it, and whether that process is gone."""

import dataclasses
import datetime
import json
import os
import pathlib
import secrets
import socket

MAX_BYTES = 4096  # of a lease; what is longer is none
_TEXT = 255  # characters of a name that is shown


@dataclasses.dataclass(frozen=True)
class Holder:
    """What a lease holds.

    Attributes:
      host: name of the machine.
      boot: id of its boot; empty where the system has none.
      pid_namespace: in which `pid` counts: containers on one machine have their own; empty where there is none.
      pid: the process; of a run of many, process 0.
      started: when that process began, in ticks after the boot; empty where the system does not tell.
      token: random; whose lease it is.
      renewals: raised at each, so that others see it change.
      since: the time of day when it was taken, for people only: nothing is decided by it.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str
    token: str
    renewals: int
    since: str

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"


def this_process() -> Holder:
    """A new lease of this process."""
    return Holder(
        host=socket.gethostname(),
        boot=_boot(),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        started=_state_and_start(os.getpid())[1],
        token=secrets.token_hex(16),
        renewals=0,
        since=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
    )


def lease_text(holder: Holder) -> bytes:
    """The lease, as it is stored: JSON, never shorter after a renewal than before it."""
    return json.dumps(dataclasses.asdict(holder), indent=2).encode() + b"\n"


def read_holder(data: bytes) -> Holder | None:
    """The holder that a lease names; None where it is damaged."""
    try:
        values = json.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        return None
    types = {field.name: field.type for field in dataclasses.fields(Holder)}
    if not isinstance(values, dict) or values.keys() != types.keys():
        return None
    if any(type(values[name]) is not kind for name, kind in types.items()):
        return None
    if not all(value.isprintable() and len(value) <= _TEXT for value in values.values() if isinstance(value, str)):
        return None
    holder = Holder(**values)
    return holder if 0 < holder.pid < 2**31 and holder.token else None


def is_gone(holder: Holder) -> bool:
    """Whether the process is known to have ended: it was one of this boot and counted as ours are, and is no more."""
    if not holder.boot or (holder.boot, holder.pid_namespace) != (_boot(), _pid_namespace()):
        return False
    try:
        os.kill(holder.pid, 0)  # a question, no signal
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, which may be all that is shown of it
        pass
    state, started = _state_and_start(holder.pid)
    # One that was killed and that nobody waits for; or another one, which got the number again.
    return state in ("Z", "X") or bool(started and holder.started and started != holder.started)


def _boot() -> str:
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _state_and_start(pid: int) -> tuple[str, str]:
    try:
        # The second field is a name in brackets, with whatever the process likes in it.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return "", ""
    return (fields[0].decode(), fields[19].decode()) if len(fields) > 19 else ("", "")
