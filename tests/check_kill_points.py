"""All kill points: a script, run now and then.

    python tests/check_kill_points.py [--seed=7]

Forty times a tiny run gets SIGKILL at a seeded point, inside its saves too, ten of them one of two processes; each run
then ends, and its state, losses and batches must be those of a run that was left alone, bit for bit. Ends with an
AssertionError where they are not.
"""

import argparse
import pathlib
import tempfile
import time

import fault_runs
from tiny_run import Workshop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    flags = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        (folder := pathlib.Path(base) / "workshop").mkdir()
        tiny = Workshop(folder)
        for number, (kills, processes) in enumerate([(10, 1), (10, 1), (10, 1), (5, 2), (5, 2)]):
            plans = fault_runs.kill_plans(kills, flags.seed + number)
            (place := pathlib.Path(base) / str(number)).mkdir()
            fault_runs.check_kills(tiny, place, plans, processes)
            print(f"{processes} process(es), {', '.join(plans)}: equal, bit for bit", flush=True)
    print(f"40 kill points in {time.monotonic() - began:.0f} s: all runs ended as if they had been left alone")


if __name__ == "__main__":
    main()
