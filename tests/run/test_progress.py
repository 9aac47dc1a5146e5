"""What a person sees, on a terminal and elsewhere."""

import io

from gpt2_jax.run.progress import Progress

VALUES = {
    "loss": 2.34567,
    "learning_rate": 6e-4,
    "grad_norm": 0.812,
    "tokens_per_second": 41234.0,
    "mfu": 0.384,
    "memory_gib": 1.26,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_per_interval_without_a_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(0, 200, stream)
    progress.advance(50)
    progress.report(100, VALUES, 62.0)
    progress.say("hello")
    progress.close()
    assert stream.getvalue() == (
        "step 100/200  loss 2.3457  lr 6.00e-04  grad norm 0.81  41,234 tokens/s  MFU 38%  1.3 GiB  ETA 01:02\nhello\n"
    )


def test_unknown_peak_is_left_out() -> None:
    stream = io.StringIO()
    Progress(0, 200, stream).report(100, {k: v for k, v in VALUES.items() if k != "mfu"}, 1.0)
    assert "MFU" not in stream.getvalue()


def test_bar_on_a_terminal_starts_where_the_run_resumes() -> None:
    stream = Terminal()
    progress = Progress(150, 200, stream)
    assert "75%" in stream.getvalue()
    progress.report(160, VALUES, 1.0)
    progress.advance(200)
    progress.say("a sample")
    progress.close()
    assert "100%" in stream.getvalue()
    assert "200/200" in stream.getvalue()
    assert "loss 2.3457" in stream.getvalue()
    assert "a sample\n" in stream.getvalue()
