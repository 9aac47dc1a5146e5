"""Being asked to leave: by SIGTERM, from a cluster that wants the room, or by Ctrl-C.

Before training there is nothing to save, and the run ends at once. In training all processes save the same step, one
that none of them has reached yet, and leave after it; so does one process alone.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax._src import distributed  # to take over SIGTERM later than at the start is not public
from jax.experimental import multihost_utils

from gpt2_jax.errors import InterruptedRunError, PreemptedError
from gpt2_jax.run.hosts import Hosts

# Asked after each step; gives what is to be raised once that step is saved.
Leave = Callable[[int], PreemptedError | None]
_HINT = b"\nCtrl-C: this step is saved, then the run ends; once more to end at once\n"


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises PreemptedError, once. In other threads than the main one, which alone gets signals, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if not received:
            received = True
            raise PreemptedError("SIGTERM asked for room before training had begun; the same command begins again")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def leaving(hosts: Hosts) -> Iterator[Leave]:
    """For training: what the loop asks after each step. All processes must enter together.

    Ctrl-C is held back until a step is done, since at any other moment it would tear the event loops in which Orbax
    saves, or be lost in a callback of JAX; a second one acts at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return
    asked = interrupted = False
    connected = jax.distributed.is_initialized()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    def note_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            signal.default_int_handler(number, frame)
        interrupted = True
        os.write(2, _HINT)  # print might be interrupting itself
        signal.raise_signal(signal.SIGTERM)  # so that all processes agree on the step

    def leave(step: int) -> PreemptedError | None:
        if not (multihost_utils.reached_preemption_sync_point(step) if connected else asked):
            return None
        if interrupted:
            return InterruptedRunError(f"interrupted: step {step} is saved; the same command goes on from it")
        return PreemptedError(f"SIGTERM asked for room: step {step} is saved; the same command goes on from it")

    before = signal.getsignal(signal.SIGTERM)
    if connected:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()  # takes SIGTERM
        hosts.training_begins()
    else:
        signal.signal(signal.SIGTERM, note)
    before_interrupt = signal.signal(signal.SIGINT, note_interrupt)
    try:
        yield leave
        if interrupted:  # after the last step
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before_interrupt)
        if not connected:
            signal.signal(signal.SIGTERM, before)
