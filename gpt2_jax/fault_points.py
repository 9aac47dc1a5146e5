"""Points in a run at which a test makes something go wrong; without GPT2_JAX_FAULT in the environment they do nothing.

GPT2_JAX_FAULT=NAME[#COUNT][+SECONDS]=ACTION: when the point NAME is reached for the COUNT-th time (the first, if left
out), and SECONDS later (at once, if left out), the process

    kill   gets SIGKILL      term   gets SIGTERM      interrupt   gets SIGINT
    raise  raises RuntimeError, only at once
    hang   sleeps for good, only at once
"""

import os
import re
import signal
import threading
import time

_VARIABLE = "GPT2_JAX_FAULT"
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
_count = 0


def reach(name: str) -> None:
    """Says that the point `name` is reached."""
    if _VARIABLE in os.environ:
        _reach(name, os.environ[_VARIABLE])


def _reach(name: str, plan: str) -> None:
    global _count
    parts = re.fullmatch(
        r"(?P<name>[a-z._]+)(#(?P<count>\d+))?(\+(?P<seconds>[\d.]+))?=(?P<action>kill|term|interrupt|raise|hang)",
        plan,
    )
    if parts is None:
        raise ValueError(f"{_VARIABLE}={plan}: write NAME[#COUNT][+SECONDS]=ACTION")
    if name != parts["name"]:
        return
    _count += 1
    if _count != int(parts["count"] or 1):
        return
    action = parts["action"]
    if action == "raise":
        raise RuntimeError(f"fault point {name}")
    if action == "hang":
        time.sleep(10**9)
    timer = threading.Timer(float(parts["seconds"] or 0), os.kill, (os.getpid(), _SIGNALS[action]))
    timer.daemon = True
    timer.start()
    if not parts["seconds"]:
        timer.join()
