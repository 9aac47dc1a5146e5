"""Being told to make room: SIGTERM, after which a cluster waits a while before it kills."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption_noticed() -> Iterator[Callable[[int], bool]]:
    """A function to be asked after every step: whether this is the step after which all processes save and leave.

    Where JAX has connected the processes, it has taken over SIGTERM: when one process gets it, all agree on a step that
    none of them has reached yet. (A handler of our own would switch that off.)
    """
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield lambda step: False
        return
    received = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: received
    finally:
        signal.signal(signal.SIGTERM, before)
