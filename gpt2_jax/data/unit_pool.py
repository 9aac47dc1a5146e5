"""Runs units of work in worker processes, or in this one where a second would not help."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

from gpt2_jax.data.unit_writer import UnitResult, UnitTask, write_unit


def run_units(tasks: list[UnitTask], workers: int | None) -> Iterator[UnitResult]:
    """The results of the tasks, in their order; `workers` None: one per processor.

    Raises what a task raises, and BrokenProcessPool if a worker dies.
    """
    workers = min(workers or _processors(), len(tasks))
    if workers == 1:
        yield from map(write_unit, tasks)
        return
    # Spawned, not forked: a fork of a process with threads (JAX, tokenizers) may hang.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    others = set(multiprocessing.active_children())
    try:
        yield from pool.map(write_unit, tasks)
    except BaseException:
        # What they work on is begun again the next time; one that is asked to leave must not wait for it.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """A worker ends with Ctrl-C, and with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
