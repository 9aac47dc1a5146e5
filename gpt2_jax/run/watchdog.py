"""Ends a process that is stuck, with the stacks of all its threads: what it waits for may never come.

Where one host is stuck the others wait for it in a collective, without an end and without a word; each of them then
ends by its own watchdog, and the stacks of the one that was stuck show where. The watch is a thread of the
interpreter's in C, which needs nothing of what may be stuck, not even the interpreter.
"""

import faulthandler
import time

# Compiling, evaluating, saving and sampling may take so many times as long as a step.
LONG = 10


class Watchdog:
    """Told at every step that all is well; ends the process `seconds` (0: never) after it was told last."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._told = (-1.0, 0)

    def alive(self, times: int = 1) -> None:
        """What comes now may take `times` as long as a step. Starts the watch where it has not begun."""
        now = time.monotonic()
        if self._seconds and (times != self._told[1] or now - self._told[0] > min(1.0, self._seconds / 10)):
            faulthandler.dump_traceback_later(self._seconds * times, exit=True, file=2)
            self._told = (now, times)

    def close(self) -> None:
        """Ends the watch."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
