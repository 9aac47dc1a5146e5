"""A soak: the quick start, killed at random again and again for as long as it takes.

    python tests/check_soak.py [--minutes=15]

The steps of the quick start are raised until a clean run takes so many minutes, with a save after every 25; it is run
once undisturbed, then killed every 20 to 60 seconds and started anew, until it is done. Both must end with the same
state, bit for bit. Ends with 1 else.
"""

import argparse
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from gpt2_jax.run.state_hashes import state_hashes

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRIAL_STEPS = 400


def start(folder: pathlib.Path, steps: int) -> subprocess.Popen:
    settings = {"train.steps": steps, "checkpoint.every": 25, "checkpoint.export_best": False, "train.sample_every": 0}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT / 'configs' / 'quickstart.py'}"]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen([*command, f"--workdir={folder}", *flags], stdout=log, stderr=log, cwd=ROOT)


def finish(folder: pathlib.Path, steps: int) -> float:
    began = time.monotonic()
    if start(folder, steps).wait():
        sys.exit(f"a run failed: see {folder}.log")
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    rng, base = random.Random(flags.seed), pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    finish(base / "warm", 100)  # data, tokenizer and programs are made
    seconds = finish(base / "trial", TRIAL_STEPS)
    steps = round(TRIAL_STEPS * 60 * flags.minutes / seconds)
    print(f"{TRIAL_STEPS} steps took {seconds:.0f} s; {steps} steps, in {base}", flush=True)
    print(f"undisturbed: {finish(base / 'clean', steps):.0f} s", flush=True)
    began, kills = time.monotonic(), 0
    while True:
        process = start(base / "soaked", steps)
        try:
            code = process.wait(timeout=rng.uniform(20, 60))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if code:
            sys.exit(f"a run failed: see {base / 'soaked'}.log")
        break
    print(f"killed {kills} times, done after {time.monotonic() - began:.0f} s", flush=True)
    clean, soaked = state_hashes(base / "clean"), state_hashes(base / "soaked")
    differ = [name for name in clean if soaked.get(name) != clean[name]]
    print(f"{len(clean)} arrays, {len(differ)} differ{': ' + ', '.join(differ) if differ else ''}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
