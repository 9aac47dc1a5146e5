"""What a person sees: a bar on a terminal, one line per interval elsewhere."""

import sys
from typing import TextIO

import tqdm

_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
    "memory_gib": "{:.1f} GiB",
}

_BAR_FORMAT = "{percentage:3.0f}%|{bar:12}| {n}/{total} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Shows how far training is."""

    def __init__(self, start: int, steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._steps = steps
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=steps, initial=start, file=self._stream, dynamic_ncols=True, bar_format=_BAR_FORMAT
            )

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, values: dict[str, float], seconds_left: float) -> None:
        """Shows the numbers of an interval."""
        shown = [form.format(values[name]) for name, form in _SHOWN.items() if name in values]
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(shown), refresh=False)
        else:
            eta = tqdm.tqdm.format_interval(seconds_left)
            self.say("  ".join([f"step {step}/{self._steps}", *shown, f"ETA {eta}"]))

    def say(self, text: str) -> None:
        """Prints text above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
