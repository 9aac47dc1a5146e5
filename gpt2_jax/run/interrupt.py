"""Ctrl-C at a moment that suits."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def interrupt_held_back() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back until the block ends or the function that it gives is called; a second one acts at once.

    A KeyboardInterrupt at any moment would tear the event loops in which Orbax saves, or be lost in a callback of JAX.
    Outside the main thread, which alone gets Ctrl-C, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received:
            signal.default_int_handler(number, frame)
        received = True

    def act() -> None:
        if received:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield act
        act()
    finally:
        signal.signal(signal.SIGINT, before)
