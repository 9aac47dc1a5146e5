"""What benchmarks print: medians with their ranges, a table for people, one line of JSON for programs."""

import json
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from typing import Any

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "transformers")


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def shown(value: Any) -> str:
    """A figure for people."""
    if isinstance(value, dict) and value.keys() == {"median", "min", "max"}:
        return f"{value['median']:,} ({value['min']:,} to {value['max']:,})"
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def print_columns(title: str, columns: dict[str, dict[str, Any]]) -> None:
    """A row for each figure, a column for each side."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    cells = {name: {row: shown(column.get(row, "")) for row in rows} for name, column in columns.items()}
    widths = {name: max(map(len, [name, *column.values()])) + 2 for name, column in cells.items()}
    first = max(map(len, [title, *rows])) + 2
    print(f"{title:<{first}}" + "".join(f"{name:<{widths[name]}}" for name in columns))
    for row in rows:
        print(f"{row:<{first}}" + "".join(f"{cells[name][row]:<{widths[name]}}" for name in columns))


def machine() -> dict[str, Any]:
    """Where it was measured, and with which versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"cpu": name, "python": platform.python_version(), "versions": versions}


def print_json(benchmark: str, **figures: Any) -> None:
    """The last line of a benchmark."""
    print(json.dumps({"benchmark": benchmark, **figures, "machine": machine()}), flush=True)
