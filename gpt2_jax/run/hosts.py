"""The processes of a run, one per host: how they are joined, agree on what they start with, and part.

What they tell one another goes through the key-value store of JAX's coordinator, which needs no devices and, unlike a
collective, notices a process that has died.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
from jax._src import clusters, distributed  # what JAX detects of a cluster, and its key-value store, are not public

import gpt2_jax
from gpt2_jax.errors import Gpt2JaxError, OtherHostError, PreemptedError, UsageError
from gpt2_jax.run.checkpoint import forget_connection
from gpt2_jax.run.rendezvous import free_address, is_loopback, meet

# A host may be tokenizing for hours while the others wait. One that dies is noticed by its heartbeat.
_WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000
# How long a process that ends by an error waits for the others to end too; JAX's 300 would be a hang.
_SHUTDOWN_SECONDS = 10
_PATIENCE_SECONDS = 5
_LEAVING_MILLISECONDS = 20_000
_PREEMPTED = "gpt2_jax/preempted"
_ALONE = "give --no_distributed to train in this process alone"


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """How the processes find one another; whatever is left open is detected by JAX, or there is one process.

    Attributes:
      coordinator_address: HOST:PORT of process 0.
      num_processes: processes in all.
      process_id: number of this one, from 0.
      initialization_timeout: seconds within which all must have come.
      heartbeat_timeout: seconds after which a silent process counts as dead, and the others end.
      distributed: False: this process alone, without a coordinator.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 300
    heartbeat_timeout: int = 100
    distributed: bool = True


class Hosts:
    """The processes of a run. All of them must call the same methods in the same order."""

    def __init__(self, index: int, count: int) -> None:
        """For tests and for one process; else see `joined`."""
        self.index, self.count = index, count
        self._calls = 0
        self._unwatched = threading.Event()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all share."""
        return self.index == 0

    def gather(self, value: str) -> list[str]:
        """The value of every process, in their order. Raises Gpt2JaxError when one has died meanwhile."""
        if self.count == 1:
            return [value]
        self._calls += 1
        call, client = f"gpt2_jax/{self._calls}", distributed.global_state.client
        assert client is not None, "processes that are not connected"
        try:
            client.key_value_set(f"{call}/{self.index}", value)
            _interruptibly(lambda: client.wait_at_barrier(call, _WAIT_MILLISECONDS))
            return [client.blocking_key_value_get(f"{call}/{host}", _WAIT_MILLISECONDS) for host in range(self.count)]
        except jax.errors.JaxRuntimeError as error:
            raise Gpt2JaxError(f"host {self.index}: another host has ended: {_shortened(error)}") from None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends alike in all processes: where it fails in one, all raise when they have come to its end.

        Raises OtherHostError where it failed elsewhere. There must be no collectives in it.
        """
        failure: Exception | None = None
        try:
            yield
        except PreemptedError:  # of which the others learn in another way, wherever they are
            raise
        except Exception as error:
            failure = error
        report = "" if failure is None else json.dumps([getattr(failure, "exit_code", 1), str(failure)])
        reports = self.gather(report)
        if failure is not None:
            raise failure
        for host, text in enumerate(reports):
            if text:
                code, message = json.loads(text)
                raise OtherHostError(f"host {host}: {message}", code)

    def check_equal(self, facts: Mapping[str, str]) -> None:
        """Raises UsageError, in all processes, when one has other facts than process 0: names the host and the key."""
        everywhere = [json.loads(told) for told in self.gather(json.dumps([socket.gethostname(), dict(facts)]))]
        first_name, first = everywhere[0]
        for host, (name, here) in enumerate(everywhere):
            for key in sorted({*first, *here}):
                if first.get(key) != here.get(key):
                    raise UsageError(
                        f"host {host} ({name}) has {key} {here.get(key)}, host 0 ({first_name}) {first.get(key)}; "
                        "all hosts need the same code, flags, config and data"
                    )

    def training_begins(self) -> None:
        """From here on JAX tells all processes of a SIGTERM; until here `leave_together` does."""
        self.gather("")
        self.stop_watching()

    def leave_together(self) -> None:
        """Lets the others, wherever they are before training, get SIGTERM too; waits a while until all leave."""
        client = distributed.global_state.client
        if self.count == 1 or client is None:
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator may be gone by now
            client.key_value_set(_PREEMPTED, "", allow_overwrite=True)
            client.wait_at_barrier("gpt2_jax/leaving", _LEAVING_MILLISECONDS)

    def stop_watching(self) -> None:
        """See `watch`."""
        self._unwatched.set()

    def watch(self) -> None:
        """Passes the SIGTERM of another process on to this one, until `stop_watching`."""
        client = distributed.global_state.client
        if client is None or self.count == 1:
            return
        look_up = client.key_value_try_get

        def look() -> None:
            while not self._unwatched.wait(1.0):
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # not there
                    look_up(_PREEMPTED)
                    self._unwatched.set()
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

        threading.Thread(target=look, daemon=True).start()


@contextlib.contextmanager
def joined(options: HostOptions) -> Iterator[Hosts]:
    """The processes of the run, connected for the length of the block; all leave it together.

    After an error in one process that the others do not share, the others may never come: see `end_process`.

    Raises:
      UsageError: options or a cluster that cannot be used.
      Gpt2JaxError: not all processes came in time.
    """
    hosts = _join(options)
    hosts.watch()
    try:
        yield hosts
        hosts.gather("")  # Some have more to do at the end than others, and the shutdown waits for seconds only.
    except BaseException as error:
        hosts.stop_watching()
        if isinstance(error, PreemptedError):
            hosts.leave_together()
        # In a thread, because it may wait in vain.
        shutdown = threading.Thread(target=_shut_down_if_possible, daemon=True)
        shutdown.start()
        shutdown.join(_PATIENCE_SECONDS)
        if isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in str(error):
            raise Gpt2JaxError(f"host {hosts.index}: another host has ended: {_shortened(error)}") from error
        raise
    _shut_down()


def end_process(code: int) -> None:
    """Ends the process at once, with `code`, where an orderly end would wait for others; else does nothing."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _interruptibly(call: Callable[[], None]) -> None:
    """Waits for a call into C++ so that a signal is handled meanwhile."""
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():  # not at once, since a wait without an end is not always left for a signal
        thread.join(0.2)
    if outcome:
        raise outcome[0]


def code_version() -> str:
    """The version of this package, with a hash of its sources, which an edit on one host changes."""
    root = pathlib.Path(gpt2_jax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(file.read_bytes() + b"\0")
    return f"{gpt2_jax.__version__} ({digest.hexdigest()[:12]})"


def _join(options: HostOptions) -> Hosts:
    if not options.distributed:
        return Hosts(0, 1)
    address, count, index, device_ids = _place(options)
    if count == 1:
        address = _own_address()
        jax.config.update("jax_check_proxy_envs", False)  # nothing leaves this machine
    else:
        meet(address, count, index, options.initialization_timeout)
    jax.config.update("jax_enable_preemption_service", False)  # until training begins: see leaving.py
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            device_ids,
            cluster_detection_method="deactivate",  # done
            initialization_timeout=options.initialization_timeout,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            coordinator_bind_address=address if is_loopback(address) else None,
        )
    except (RuntimeError, ValueError) as error:
        if count == 1 and "must be called before" in str(error):  # a program that has used JAX before, as a notebook
            return Hosts(0, 1)
        raise Gpt2JaxError(f"host {index} of {count} at {address}: {_shortened(error)}; {_ALONE}") from error
    if count > 1:
        devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
        print(f"host {index} of {count}: {socket.gethostname()}, {devices}", file=sys.stderr, flush=True)
    return Hosts(index, count)


def _place(options: HostOptions) -> tuple[str, int, int, list[int] | None]:
    """Coordinator, number of processes, number of this one, and its devices if it may not have all."""
    address = options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        address, count, index, device_ids = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, options.num_processes, options.process_id, None, None, options.initialization_timeout
        )
    except Exception as error:  # each kind of cluster has its own
        raise Gpt2JaxError(
            f"the cluster cannot be read: {_shortened(error)}; {_ALONE}, or --coordinator_address, --num_processes and "
            "--process_id"
        ) from error
    if (address, count, index) == (None, None, None):
        return "", 1, 0, None
    if address is None or count is None or index is None or not 0 <= index < count:
        raise UsageError(
            f"coordinator {address}, {count} processes, process {index}: give all of --coordinator_address, "
            "--num_processes and --process_id, with a number less than that of the processes"
        )
    return address, count, index, None if device_ids is None else [*device_ids]


def _own_address() -> str:
    try:
        return free_address()
    except OSError as error:
        raise Gpt2JaxError(f"the loopback address cannot be used ({error.strerror}); {_ALONE}") from None


def _shut_down() -> None:
    try:
        jax.distributed.shutdown()
    finally:
        forget_connection()


def _shut_down_if_possible() -> None:
    # What fails here is a consequence of the error that is being raised.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _shut_down()


def _shortened(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
