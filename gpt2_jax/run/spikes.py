"""Tells a loss spike from the noise of a run: pure, from one loss after another."""

import collections
import dataclasses

import numpy as np

WINDOW = 128  # steps that say what is usual
LEAST = 32  # steps before anything can be unusual, and spikes in a row that are a new level


@dataclasses.dataclass(frozen=True)
class Spike:
    """A loss, in nats per token, that is far above the mean of those before it; `deviation` is what "far" counts in."""

    step: int
    loss: float
    mean: float
    deviation: float


class Spikes:
    """Compares each loss with the last ones that were no spikes.

    A spike is a loss above mean + `sigmas` * deviation of the last `window` such losses, of which there must be 32.
    What stood out early in a run, when all losses differed, must hide nothing later: mean and deviation leave out what
    is more than 3 deviations above the mean. The deviation is at least 1% of the mean and 0.001 nats: losses that
    hardly differ would make a spike of each rounding. After 32 spikes in a row the level is a new one, and only losses
    from there on are compared with. Nothing is stored: a resumed run has to see 32 losses first. With `sigmas` 0 there
    are no spikes.
    """

    def __init__(self, sigmas: float, window: int = WINDOW) -> None:
        if sigmas < 0 or window < LEAST:
            raise ValueError(f"sigmas={sigmas}, window={window}: allowed are 0 or more, and {LEAST} or more")
        self._sigmas = sigmas
        self._usual: collections.deque[float] = collections.deque(maxlen=window)
        self._in_a_row: list[float] = []

    def observe(self, step: int, loss: float) -> Spike | None:
        """Takes the finite loss of the next step, and says if it is a spike."""
        if not self._sigmas:
            return None
        if len(self._usual) >= LEAST:
            mean, deviation = _mean_and_deviation(np.array(self._usual))
            if loss > mean + self._sigmas * deviation:
                self._in_a_row.append(loss)
                if len(self._in_a_row) == LEAST:
                    self._usual.clear()
                    self._usual.extend(self._in_a_row)
                    self._in_a_row.clear()
                return Spike(step, loss, mean, deviation)
        self._in_a_row.clear()
        self._usual.append(loss)
        return None


def _mean_and_deviation(losses: np.ndarray) -> tuple[float, float]:
    while True:
        mean = float(losses.mean())
        deviation = max(float(losses.std()), 0.01 * abs(mean), 0.001)
        kept = losses[losses <= mean + 3 * deviation]
        if len(kept) == len(losses):
            return mean, deviation
        losses = kept
