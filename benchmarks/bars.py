"""The table of bars in docs/numbers.md, from what the other benchmarks printed.

    python -m benchmarks.train ... | tee -a figures.txt          # and the others
    python -m benchmarks.bars --machine=A docs/numbers.md figures.txt [figures-of-another-python.txt]

Each file holds what one Python printed; of several runs of one benchmark the last counts. Of Pythons that are not the
newest nine tenths of a bar are asked (where less is better, a ninth more is allowed). Between the two marks of the
machine in the document the table is written anew; what was not measured is left empty.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

_OTHERS = 0.9  # of a bar, for a Python that is not the newest
MARK = "<!-- bars of machine {machine}: {place} -->"
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure, and what it must be.

    Attributes:
      name: what is measured.
      benchmark: which one prints it; for `train` with the config's name and the tokens of a step, for
        `loader` with its cores.
      figure: from its JSON line.
      bar: at least (or at most).
      strive: better still.
      at_most: whether less is better.
    """

    name: str
    benchmark: str
    figure: Callable[[Figures], Any]
    bar: float
    strive: float
    at_most: bool = False


def _against(side: str, name: str = "ours_times_as_fast") -> Callable[[Figures], Any]:
    return lambda found: found["sides"][side][name]


def _inverse(value: dict[str, float]) -> dict[str, float]:
    turned = {"median": 1 / value["median"], "min": 1 / value["max"], "max": 1 / value["min"]}
    return {name: round(one, 3) for name, one in turned.items()}


def _decoded(rows: int) -> Callable[[Figures], Any]:
    return lambda found: next(
        one["times_as_fast"]["tokens_per_second"] for one in found["results"] if one["batch_size"] == rows
    )


_CPU, _CHAR, _GPT2 = "train shakespeare_char_cpu 768", "train shakespeare_char 4096", "train gpt2_124m 512"
BARS = (
    Bar("train with AdamW, nanoGPT's CPU shape, times torch eager", _CPU, _against("torch"), 1.45, 2.2),
    Bar("train, nanoGPT's GPU shape for characters, batch 16, times torch eager", _CHAR, _against("torch"), 1.5, 2.1),
    Bar("train, 124M, 2 x 256, times torch eager", _GPT2, _against("torch"), 2.1, 2.8),
    Bar("the same, times torch.compile", _GPT2, _against("torch-compile"), 2.1, 2.8),
    Bar("the same, times torch.compile in bfloat16", _GPT2, _against("torch-compile-bf16"), 1.5, 2.0),
    Bar(
        "the same, share of the matrix-product rate",
        _GPT2,
        lambda found: found["sides"]["gpt2_jax"]["share_of_matmul_rate"],
        0.68,
        0.8,
    ),
    Bar(
        "the same with dropout 0.1, share of the rate without",
        _GPT2,
        lambda found: _inverse(_against("gpt2_jax-dropout")(found)),
        0.82,
        0.92,
    ),
    Bar(
        "the same, peak memory over torch eager's, default allocator",
        _GPT2,
        lambda found: found["system_malloc_memory_over_torch"],
        1.15,
        0.8,
        at_most=True,
    ),
    Bar("decode, 124M, one row, times transformers", "decode", _decoded(1), 1.9, 2.4),
    Bar("decode, 124M, eight rows, times transformers", "decode", _decoded(8), 1.8, 2.5),
    Bar(
        "loss in chunks, temporary bytes, 50,304 ids over 1,024",
        "memory",
        lambda found: round(found["ratio"], 2),
        1.5,
        1.2,
        at_most=True,
    ),
    Bar("compile, 48 layers over 12", "compile", lambda found: found["48_over_12"], 1.25, 1.1, at_most=True),
    Bar(
        "compile part of a second start over the first",
        "compile",
        lambda found: found["second_over_first"],
        0.3,
        0.1,
        at_most=True,
    ),
    Bar("steps of train.py over bare steps", "loop", lambda found: found["over_bare"], 1.03, 1.005, at_most=True),
    Bar(
        "loader on one core, times 0.5 million tokens/s",
        "loader 1",
        lambda found: {name: round(rate / 5e5, 1) for name, rate in found["tokens_per_second"].items()},
        10,
        40,
    ),
    Bar(
        "save in the background, blocked over waited for",
        "checkpoint",
        lambda found: found["124m"]["blocked_over_waited"],
        0.1,
        0.03,
        at_most=True,
    ),
    Bar(
        "time to torch's last loss, times as fast",
        "time_to_loss",
        lambda found: found["gpt2_jax"]["times_as_fast"],
        2.5,
        4,
    ),
    Bar(
        "held-out loss after the preset's 2,000 steps, mean of the seeds",
        "time_to_loss",
        lambda found: found["gpt2_jax"]["mean_last_loss"],
        1.78,
        1.70,
        at_most=True,
    ),
)


def read_figures(lines: Iterable[str]) -> dict[str, Figures]:
    """By benchmark, the last JSON line of each."""
    found = {}
    for line in lines:
        if line.startswith('{"benchmark"'):
            figures = json.loads(line)
            name = figures["benchmark"]
            if name == "train":
                name += f" {pathlib.Path(figures['config']).stem} {figures['tokens_per_step']}"
            if name == "loader":
                name += f" {figures['threads']}"
            # One run may ask only for some sides.
            if "sides" in figures and name in found:
                figures["sides"] = found[name]["sides"] | figures["sides"]
            found[name] = {**found.get(name, {}), **figures}
    return found


def table(columns: dict[str, dict[str, Figures]]) -> str:
    """Markdown; `columns` are figures by the version of a Python."""
    newest = max(columns, key=lambda version: [int(part) for part in version.split(".")[:2]])
    names = [f"Python {version}, jax {_machine(figures)['versions']['jax']}" for version, figures in columns.items()]
    rows = [["what", *names, "bar", "strive"], ["---"] * (len(columns) + 3)]
    for bar in BARS:
        sign = "at most " if bar.at_most else ""
        cells = [_cell(bar, figures, 1.0 if version == newest else _OTHERS) for version, figures in columns.items()]
        rows.append([bar.name, *cells, f"{sign}{bar.bar:g}", f"{bar.strive:g}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _machine(figures: dict[str, Figures]) -> dict[str, Any]:
    return next(one["machine"] for one in figures.values() if "machine" in one)


def _cell(bar: Bar, figures: dict[str, Figures], share: float) -> str:
    try:
        value = bar.figure(figures[bar.benchmark])
    except (KeyError, StopIteration):
        return ""
    median = value["median"] if isinstance(value, dict) else value
    met = median <= bar.bar / share if bar.at_most else median >= bar.bar * share
    spread = f" ({value['min']:g} to {value['max']:g})" if isinstance(value, dict) else ""
    return f"{median:g}{spread}" + ("" if met else ", missed")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="its letter in the document")
    parser.add_argument("document", type=pathlib.Path)
    parser.add_argument("figures", type=pathlib.Path, nargs="+")
    flags = parser.parse_args()
    columns = {}
    for file in flags.figures:
        found = read_figures(file.read_text("utf-8").splitlines())
        version = _machine(found)["python"]
        if version in columns:
            raise SystemExit(f"{file}: a second file of Python {version}; one per Python: put both into one file")
        columns[version] = found
    text = flags.document.read_text("utf-8")
    first, last = (MARK.format(machine=flags.machine, place=place) for place in ("begin", "end"))
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"{flags.document}: no {first} and {last} in it")
    flags.document.write_text(f"{before}{begin}\n\n{table(columns)}\n\n{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
