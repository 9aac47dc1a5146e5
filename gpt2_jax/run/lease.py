"""A run folder is held by one job, wherever the jobs run, by a lease that its holder renews.

The holder raises the counter in the lease each minute. Who finds a lease takes it over at once if its process ran on
this machine and is gone; any other is watched: one that changes is held, one that does not change for two and a half
renewals is taken over. Only intervals are measured, each by one machine for itself; clocks are never compared.

A holder that finds another lease than its own (after hours of suspension, say) has lost the folder, and must not write
there any more.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator

from gpt2_jax.errors import Gpt2JaxError, UsageError
from gpt2_jax.run.lease_file import LeaseFile
from gpt2_jax.run.lease_holder import Holder, is_gone, lease_text, read_holder, this_process

_PATIENCE_SECONDS = 10.0  # with a look that is under way
_REMEDY = "stop that job, or name another folder; --steal_lock takes this one from it"


class LeaseLostError(UsageError):
    """The folder is no longer this job's; what it would write there could spoil what another one writes."""


@dataclasses.dataclass(frozen=True)
class Rhythm:
    """Seconds.

    Attributes:
      renew: between renewals.
      lapse: without a renewal, after which a lease is no longer worth anything.
      look: between two looks of a holder, whether its lease is still there.
      pause: between two looks of one who watches; and from taking a lease to reading it again, which shows who has it
        of those who took it at once.
    """

    renew: float = 60.0
    lapse: float = 150.0
    look: float = 5.0
    pause: float = 1.0


RHYTHM = Rhythm()


class Lease:
    """A lease that is held; see `held`."""

    def __init__(self, file: LeaseFile, place: str, rhythm: Rhythm = RHYTHM) -> None:
        """Of `file`; messages call its folder `place`. To be taken by `take`."""
        self._file, self._place, self._rhythm = file, place, rhythm
        self._own = this_process()
        self._token = self._own.token.encode()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._lost = ""
        self._failing = self._written = self._confirmed = False
        self._renewed = self._looked = 0.0

    def check(self) -> None:
        """Raises LeaseLostError where the folder may be another job's. Cheap: a thread asks the storage."""
        if not self._confirmed:
            time.sleep(max(0.0, self._renewed + self._rhythm.pause - _now()))
        if not self._lost and (not self._confirmed or _now() - self._looked > self._rhythm.renew):
            # The background has slept, as all of this process or machine may have, or the storage does not answer.
            if self._lock.acquire(timeout=max(_PATIENCE_SECONDS, self._renewed + self._rhythm.lapse - _now())):
                try:
                    self._look()
                finally:
                    self._lock.release()
            else:
                self._lose(f"could not be renewed for {self._rhythm.lapse:g} s: the storage does not answer")
        self._confirmed = True
        if self._lost:
            raise LeaseLostError(f"{self._place}: {self._lost}; this job writes nothing more there")

    def take(self, *, steal: bool = False) -> None:
        """Takes the lease, and keeps it until `release`, which is due where this raises too; see `held`."""
        while not self._taken(steal):
            pass
        self._thread.start()

    def release(self) -> None:
        """Takes the lease away, if it is still this job's."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_SECONDS)
        try:
            if self._written:
                self._file.remove(self._is_ours)
        except (OSError, Gpt2JaxError) as error:
            _say(f"{self._place}: its lease cannot be removed ({error}); the next job on it may have to wait")

    def _taken(self, steal: bool) -> bool:
        """Whether the lease is ours now; not where what was found has gone meanwhile."""
        found = self._file.read()
        if found is None:
            return self._made()
        holder = read_holder(found)
        if steal:
            _say(f"{self._place}: taken from {_called(holder)} by --steal_lock")
        elif holder is not None and is_gone(holder):
            _say(f"{self._place}: {_called(holder)} is gone; taken over")
        elif not self._lapsed(found, holder):
            return False
        if not self._file.remove(lambda data: steal or data == found):
            self._refuse_if_there()
            return False
        if not self._made():
            return False
        # Another one may have judged the same lease at the same time: better known now than at the first `check`.
        time.sleep(self._rhythm.pause)
        if not self._is_there():
            self._refuse_if_there()
            return False
        return True

    def _made(self) -> bool:
        self._renewed = self._looked = _now()
        self._written = True
        # What a network repeats may find its own work done.
        if self._file.create(lease_text(self._own)) or self._is_there():
            return True
        self._refuse_if_there()
        return False

    def _lapsed(self, found: bytes, holder: Holder | None) -> bool:
        """Watches a lease. True: it is not renewed; False: it has gone. Raises UsageError when it changes."""
        _say(f"{self._place}: held by {_called(holder)}; watching for {self._rhythm.lapse:g} s whether it is renewed")
        end = time.monotonic() + self._rhythm.lapse
        while True:
            over = time.monotonic() >= end  # before the last look
            now = self._file.read()
            if now is None:
                return False
            if now != found:
                raise in_use(self._place, now)
            if over or (holder is not None and is_gone(holder)):
                _say(f"{self._place}: not renewed; taken over from {_called(holder)}")
                return True
            time.sleep(self._rhythm.pause)

    def _refuse_if_there(self) -> None:
        found = self._file.read()
        if found is not None:
            raise in_use(self._place, found)

    def _keep(self) -> None:
        while not self._stopped.wait(self._rhythm.look):
            with self._lock:
                self._look()
            if self._lost:
                return

    def _look(self) -> None:
        """Looks whether the lease is ours, and renews it if it is time; under the lock."""
        if self._lost:
            return
        started = _now()
        try:
            if not self._kept(started):
                # One that was taken away in error is back in a moment.
                time.sleep(self._rhythm.pause)
                if not self._kept(started):
                    found = self._file.read()
                    self._lose("its lease is gone" if found is None else f"{_called(read_holder(found))} has taken it")
        except (OSError, Gpt2JaxError) as error:
            if not self._failing:
                _say(f"{self._place}: its lease cannot be renewed ({error}); trying on for {self._rhythm.lapse:g} s")
            self._failing = True
            if _now() - self._renewed > self._rhythm.lapse:
                self._lose(f"its lease could not be renewed for {self._rhythm.lapse:g} s ({error})")
        self._looked = _now()

    def _kept(self, started: float) -> bool:
        if started - self._renewed < self._rhythm.renew:
            return self._is_there()
        renewed = dataclasses.replace(self._own, renewals=self._own.renewals + 1)
        if not self._file.renew(self._is_ours, lease_text(renewed)):
            return False
        if _now() - started > self._rhythm.lapse - self._rhythm.renew:
            # Between reading and writing another one may have taken it over, and lost it by this.
            self._lose("this process stood still while it renewed its lease")
        self._own, self._renewed, self._failing = renewed, started, False
        return True

    def _lose(self, why: str) -> None:
        self._lost = self._lost or why

    def _is_there(self) -> bool:
        found = self._file.read()
        return found is not None and self._is_ours(found)

    def _is_ours(self, data: bytes) -> bool:
        return self._token in data


@contextlib.contextmanager
def held(file: LeaseFile, place: str, *, steal: bool = False, rhythm: Rhythm = RHYTHM) -> Iterator[Lease]:
    """Holds the lease for the length of the block, which must ask it before it writes: see `Lease.check`.

    Args:
      file: where the lease is.
      place: how messages call its folder, with the flag that named it.
      steal: take it at once, whoever holds it.
      rhythm: for tests.

    Raises:
      UsageError: another job holds it.
    """
    lease = Lease(file, place, rhythm)
    try:
        lease.take(steal=steal)
        yield lease
    finally:
        lease.release()


def in_use(place: str, found: bytes | None) -> UsageError:
    """The error that another job works there, whose lease was `found`."""
    holder = None if found is None else read_holder(found)
    return UsageError(f"{place}: {_called(holder)} works there; {_REMEDY}")


def _called(holder: Holder | None) -> str:
    return "another job" if holder is None else f"the job of {holder}"


def _say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def _now() -> float:
    """Seconds, those included in which the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
