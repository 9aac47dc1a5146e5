"""Plans that take long: a script, run now and then on a machine that has nothing else to do.

    pip install -e '.[tpu]'
    python tests/check_plan.py --out=plans.md [--only=1558m]

Compiles the train step of GPT-2's four sizes for three TPU slices, and that of GPT-3's largest for one, and compares
the compile times of 48 layers and of 12. Ends with 1 where a compile takes more than five minutes, the largest GPT-2
does not fit 16 chips of v5e, or 48 layers take more than 1.25 times as long as 12. Writes a table in Markdown.
"""

import argparse
import pathlib
import sys

from gpt2_jax.atomic_file import write_text_atomically
from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import load_config
from gpt2_jax.planning.chips import GIB, make_machine
from gpt2_jax.planning.compile import compile_program
from gpt2_jax.planning.plan import Plan, make_plan, with_known_vocabulary
from gpt2_jax.planning.prices import PRICES

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
# Of each slice: the mesh, and a batch of 16, 4 and 4 rows on a device.
SLICES = {
    "v5e:4x4": {"mesh.data": "1", "mesh.fsdp": "16", "train.batch_size": "256"},
    "v6e:16x16": {"mesh.data": "16", "mesh.fsdp": "16", "train.batch_size": "1024"},
    "v5p:8x8x8": {"mesh.data": "8", "mesh.fsdp": "64", "train.batch_size": "2048"},
}
COMMON = {"train.microbatches": "1", "model.remat": "full"}
SIZES = ("gpt2_124m", "gpt2_355m", "gpt2_774m", "gpt2_1558m")
MOST_SECONDS, MOST_RATIO = 300.0, 1.25

HEADER = (
    "| config | topology | mesh | batch | compile | state | temporaries | peak of limit | sent | step | MFU |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def config(name: str, overrides: dict[str, str]) -> RunConfig:
    return with_known_vocabulary(load_config(str(CONFIGS / f"{name}.py"), overrides))


def compiled_plan(run: RunConfig, topology: str) -> Plan:
    machine = make_machine(topology)
    price = PRICES.get(machine.chip.name)
    make_plan(run, machine, price)  # refuses what cannot be, before the compiler is asked
    return make_plan(run, machine, price, compile_program(run, topology))


def row(name: str, plan: Plan) -> str:
    assert plan.compiled is not None
    memory, compiled = plan.memory, plan.compiled
    state = memory.parameters + memory.optimizer
    cells = (
        name,
        plan.machine.name,
        "x".join(str(size) for size in plan.mesh.values()),
        f"{plan.config.train.batch_size} in {plan.config.train.microbatches}",
        f"{compiled.lower_seconds:.0f} + {compiled.compile_seconds:.0f} s",
        f"{state / GIB:.2f}",
        f"{memory.temporaries / GIB:.2f}",
        f"{memory.peak / GIB:.2f} of {memory.limit / GIB:.2f} GiB{'' if plan.fits else ', does NOT fit'}",
        f"{sum(item.wire for item in plan.traffic) / GIB:.2f} GiB",
        f"{plan.roofline.step:.3g} s",
        f"{plan.mfu:.0%}",
    )
    return f"| {' | '.join(cells)} |"


def seconds(plan: Plan) -> float:
    assert plan.compiled is not None
    return plan.compiled.compile_seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="Markdown file to write")
    parser.add_argument("--only", default="", help="cases whose name and topology contain this")
    flags = parser.parse_args()

    cases = [(size, slice_, config(size, COMMON | SLICES[slice_])) for size in SIZES for slice_ in SLICES]
    cases += [("gpt3_175b", "v5p:8x8x8", config("gpt3_175b", {}))]
    short = COMMON | SLICES["v5e:4x4"] | {"model.n_layer": "12"}
    cases += [("gpt2_1558m, 12 layers", "v5e:4x4", config("gpt2_1558m", short))]
    lines, plans, failures = [HEADER], {}, []
    for name, topology, run in cases:
        if flags.only not in f"{name} {topology}":
            continue
        plan = plans[name, topology] = compiled_plan(run, topology)
        lines.append(row(name, plan))
        print(lines[-1], flush=True)
        if seconds(plan) > MOST_SECONDS:
            failures.append(f"{name} on {topology}: compiled in {seconds(plan):.0f} s")
        if (name, topology) == ("gpt2_1558m", "v5e:4x4") and not plan.fits:
            failures.append(f"{name} does not fit {topology}")
    long, twelve = plans.get(("gpt2_1558m", "v5e:4x4")), plans.get(("gpt2_1558m, 12 layers", "v5e:4x4"))
    if long is not None and twelve is not None:
        ratio = seconds(long) / seconds(twelve)
        lines += ["", f"Compile time of 48 layers : 12 layers, width 1600, v5e:4x4: {ratio:.2f}"]
        if ratio > MOST_RATIO:
            failures.append(f"48 layers take {ratio:.2f} times as long to compile as 12")
    write_text_atomically(flags.out, "\n".join([*lines, ""]))
    print("\n".join(failures) or f"all good; {flags.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
