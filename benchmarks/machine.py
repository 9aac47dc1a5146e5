"""What the machine gives at the moment: memory bandwidth, and how much of it goes to other programs."""

import os
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

BUSY_CORES = 0.1  # what other programs may take while something is measured


def keep_to_cores(number: int) -> None:
    """Restricts this process to `number` cores; call it before JAX computes anything. Linux only."""
    allowed = sorted(os.sched_getaffinity(0))
    if number > len(allowed):
        raise SystemExit(f"--threads {number}; allowed: 1 to {len(allowed)}, the cores of this process")
    os.sched_setaffinity(0, allowed[:number])


class Bandwidth:
    """Bytes per second that reach the cores from memory, by 340 MB of float32 weights, more than caches hold."""

    def __init__(self) -> None:
        width, layers = 1024, 80
        self._layers = [jnp.full((width, width), 1 / width) for _ in range(layers)]
        self._x = jnp.ones((1, width))
        self._bytes = layers * width * width * 4
        self.of_products()
        self.of_reads()

    def of_products(self) -> float:
        """While a chain of products of a vector and a matrix is computed, as decoding does."""
        return self._bytes / _median_seconds(lambda: _products(self._x, self._layers))

    def of_reads(self) -> float:
        """While the largest element of each matrix is found, one per core at a time."""
        return self._bytes / _median_seconds(lambda: _reads(self._layers))


@jax.jit
def _products(x: jax.Array, layers: list[jax.Array]) -> jax.Array:
    for kernel in layers:
        x = x @ kernel
    return x


@jax.jit
def _reads(layers: list[jax.Array]) -> list[jax.Array]:
    return [kernel.max(axis=1) for kernel in layers]


def _median_seconds(compute: Callable[[], object], times: int = 9) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(compute())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def peak_memory() -> int:
    """The largest resident size of this process until now, in bytes. Linux only."""
    with open("/proc/self/status") as status:  # not getrusage, which begins with the parent's
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


class OtherPrograms:
    """Processor time of all but this process and the children it waited for, from when this is made. Linux only.

    Children count as its own if they start and end in between.
    """

    def __init__(self) -> None:
        self._began, self._others = time.perf_counter(), _seconds_of_others()

    def cores(self) -> float:
        """How many cores they kept busy on average until now."""
        return (_seconds_of_others() - self._others) / (time.perf_counter() - self._began)


def _seconds_of_others() -> float:
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    ours = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(used.ru_utime + used.ru_stime for used in ours)
