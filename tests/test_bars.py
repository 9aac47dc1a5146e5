"""The table of bars: which figures count, and which are said to have missed theirs."""

import json
import pathlib
import sys

import pytest

from benchmarks import bars

MACHINE = {"cpu": "a processor", "versions": {"jax": "0.12"}}
BEGIN, END = (bars.MARK.format(machine="C", place=place) for place in ("begin", "end"))


def line(python: str, benchmark: str, **figures: object) -> str:
    return json.dumps({"benchmark": benchmark, **figures, "machine": {**MACHINE, "python": python}})


def spread(median: float) -> dict[str, float]:
    return {"median": median, "min": median - 1, "max": median + 1}


def train(python: str, **sides: float) -> str:
    times = {side: {"ours_times_as_fast": spread(value)} for side, value in sides.items()}
    return line(python, "train", config="configs/gpt2_124m.py", tokens_per_step=512, sides=times)


def rows_of(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """Cells by the first one."""
    text = bars.table({python: bars.read_figures(lines) for python, lines in columns.items()})
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_others_than_the_newest_are_asked_nine_tenths() -> None:
    for median, expected in (
        (1.9, ["1.9 (0.9 to 2.9)", "1.9 (0.9 to 2.9), missed"]),
        (1.8, ["1.8 (0.8 to 2.8), missed"] * 2),
    ):
        columns = {"3.9.1": [train("3.9.1", torch=median)], "3.13.0rc1": [train("3.13.0rc1", torch=median)]}
        assert rows_of(columns)["train, 124M, 2 x 256, times torch eager"][:2] == expected


def test_less_may_be_better() -> None:
    for ratio, expected in ((1.6, ["1.6", "1.6, missed"]), (1.7, ["1.7, missed", "1.7, missed"])):
        columns = {python: [line(python, "memory", ratio=ratio)] for python in ("3.11.7", "3.13.0")}
        row = rows_of(columns)["loss in chunks, temporary bytes, 50,304 ids over 1,024"]
        assert row == [*expected, "at most 1.5", "1.2"]


def test_of_several_runs_the_last_counts_for_each_side() -> None:
    lines = ["a table", train("3.13.0", torch=1.0), train("3.13.0", **{"torch": 3.0, "torch-compile": 4.0})]
    lines.append(train("3.13.0", **{"torch-compile": 5.0}))
    rows = rows_of({"3.13.0": lines})
    assert rows["train, 124M, 2 x 256, times torch eager"][0] == "3 (2 to 4)"
    assert rows["the same, times torch.compile"][0] == "5 (4 to 6)"
    assert rows["the same, times torch.compile in bfloat16"][0] == ""


def test_other_sizes_than_the_bar_names_do_not_count() -> None:
    other = train("3.13.0", torch=3.0).replace('"tokens_per_step": 512', '"tokens_per_step": 8192')
    on_two_cores = line("3.13.0", "loader", threads=2, tokens_per_second=spread(6e6))
    rows = rows_of({"3.13.0": [other, on_two_cores]})
    assert rows["train, 124M, 2 x 256, times torch eager"] == ["", "2.1", "2.8"]
    assert rows["loader on one core, times 0.5 million tokens/s"] == ["", "10", "40"]
    on_one = rows_of({"3.13.0": [line("3.13.0", "loader", threads=1, tokens_per_second=spread(6e6))]})
    assert on_one["loader on one core, times 0.5 million tokens/s"][0] == "12 (12 to 12)"


def test_only_what_is_between_the_marks_is_replaced(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, figures = tmp_path / "numbers.md", tmp_path / "figures"
    figures.write_text(train("3.13.0", torch=3.0))
    monkeypatch.setattr(sys, "argv", ["bars", "--machine=C", str(document), str(figures)])
    document.write_text("no marks")
    with pytest.raises(SystemExit, match="bars of machine C: begin"):
        bars.main()
    assert document.read_text() == "no marks"
    document.write_text(f"before\n{BEGIN}\nan old table\n{END}\nafter\n")
    bars.main()
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n| what |") and text.endswith(f"|\n\n{END}\nafter\n")
    assert "an old table" not in text and "3 (2 to 4)" in text
    monkeypatch.setattr(sys, "argv", [*sys.argv, str(figures)])
    with pytest.raises(SystemExit, match=r"a second file of Python 3\.13\.0"):
        bars.main()
    assert document.read_text() == text
