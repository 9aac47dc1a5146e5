"""The processes of a run find one another before JAX connects them.

`jax.distributed.initialize` waits too, but where one process does not come it ends the others without saying how many
came. Here process 0 listens at the coordinator's address, which JAX's coordinator takes over; the others tell their
number there, and all are told how many have come.
"""

import contextlib
import ipaddress
import socket
import time

from gpt2_jax.errors import Gpt2JaxError, UsageError

_RETRY_SECONDS = 0.2
_GREETING_SECONDS = 2.0
_LOOPBACK_SECONDS = 5.0


def meet(address: str, count: int, index: int, timeout: float) -> None:
    """Returns when all processes have come.

    Args:
      address: HOST:PORT of process 0.
      count: processes in all.
      index: number of this one.
      timeout: in seconds.

    Raises:
      UsageError: an address without a port, or one that process 0 cannot listen at.
      Gpt2JaxError: not all have come in time; says how many of how many.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--coordinator_address={address}: give HOST:PORT of process 0")
    end = time.monotonic() + timeout
    seen = (
        _wait_for_others(address, count, end) if index == 0 else _report(host.strip("[]"), int(port), count, index, end)
    )
    if len(seen) < count:
        raise Gpt2JaxError(_who_is_missing(address, count, seen, timeout))


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_address() -> str:
    """A loopback address that nothing listens at. Raises OSError where there is none, or where it cannot be reached."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        # One that is down takes listeners, but whoever connects waits for minutes. Another port than the one that is
        # handed out, so that nothing is left of the connection there.
        with socket.create_server(("127.0.0.1", 0)) as reached:
            socket.create_connection(reached.getsockname(), timeout=_LOOPBACK_SECONDS).close()
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _wait_for_others(address: str, count: int, end: float) -> set[int]:
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(address))
        while len(here) < count - 1 and time.monotonic() < end:
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
                index = _greeting(connection, count)
            except OSError:  # nobody within the time, or one that left at once
                continue
            if index is not None:
                here[index] = connection
                _tell(here)
    return {0, *here}


def _listen(address: str) -> socket.socket:
    host, port = address.rsplit(":", 1)
    try:
        if is_loopback(address):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host.strip("[]"), int(port)), family=family)
        # At all addresses of this machine, as JAX's coordinator does: a name may stand for another one of them.
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", int(port)))
    except OSError as error:
        raise UsageError(f"coordinator {address}: cannot listen there ({error.strerror}); name a free port") from None


def _greeting(connection: socket.socket, count: int) -> int | None:
    """The number of who has come; None for a stranger."""
    connection.settimeout(_GREETING_SECONDS)
    index, _, wanted = connection.recv(32).decode("ascii", "replace").strip().partition("/")
    known = index.isdecimal() and wanted == str(count) and 0 < int(index) < count
    return int(index) if known else None


def _tell(here: dict[int, socket.socket]) -> None:
    """Tells all who have come; those that have left meanwhile are forgotten."""
    message = ",".join(str(index) for index in (0, *sorted(here))) + "\n"
    for index, connection in list(here.items()):
        try:
            connection.sendall(message.encode("ascii"))
        except OSError:
            del here[index]


def _report(host: str, port: int, count: int, index: int, end: float) -> set[int]:
    seen: set[int] = set()
    while len(seen) < count and time.monotonic() < end:
        try:
            left = max(end - time.monotonic(), 0.001)
            with socket.create_connection((host, port), timeout=left) as connection, connection.makefile() as lines:
                connection.sendall(f"{index}/{count}\n".encode("ascii"))
                for line in lines:
                    seen = {int(number) for number in line.split(",")}
                    connection.settimeout(max(end - time.monotonic(), 0.001))
        except (OSError, ValueError):  # process 0 is not there yet, or another program is
            pass
        if len(seen) < count:
            time.sleep(_RETRY_SECONDS)
    return seen


def _who_is_missing(address: str, count: int, seen: set[int], timeout: float) -> str:
    advice = (
        "start the missing ones with the same coordinator and number of processes, or raise --initialization_timeout"
    )
    if not seen:
        return f"no answer from host 0 at {address} within {timeout:g} s: 1 of {count} hosts seen, this one; {advice}"
    missing = ", ".join(str(index) for index in range(count) if index not in seen)
    return f"{len(seen)} of {count} hosts came to {address} within {timeout:g} s, missing: {missing}; {advice}"
