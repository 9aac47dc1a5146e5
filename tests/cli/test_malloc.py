"""The allocator that keeps memory: who gets it, and that it does."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from gpt2_jax.cli import malloc

glibc = pytest.mark.skipif(
    os.confstr("CS_GNU_LIBC_VERSION") is None if "CS_GNU_LIBC_VERSION" in os.confstr_names else True,
    reason="needs glibc",
)

# What a step does: takes much memory, writes it, gives it back.
PROGRAM = """
import ctypes, json, resource, sys
from gpt2_jax.cli.malloc import VARIABLE, keep_memory
import os
told = keep_memory(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, faults = 1 << 28, []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    libc.free(place)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({"told": told, "faults": faults, "variable": os.environ.get(VARIABLE), "arguments": sys.argv[1:]}))
"""


def run(program: pathlib.Path, *arguments: str, **environment: str) -> dict:
    clean = {name: value for name, value in os.environ.items() if name != malloc.VARIABLE}
    command = [sys.executable, "-X", "faulthandler", str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, check=True)
    return json.loads(done.stdout)


@pytest.fixture(name="program")
def _program(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


@glibc
def test_memory_that_is_kept_is_cleared_once(program: pathlib.Path) -> None:
    kept = run(program, "keep", "and this", JAX_PLATFORMS="cpu")
    assert kept["told"].startswith("keeps freed memory")
    assert kept["faults"][0] > 0
    assert max(kept["faults"][1:]) < 10
    assert kept["arguments"] == ["keep", "and this"]
    assert kept["variable"] is None  # not for the programs that this one starts


@glibc
@pytest.mark.parametrize("wanted", ["system", "auto"])
def test_otherwise_it_is_cleared_each_time(program: pathlib.Path, wanted: str) -> None:
    freed = run(program, wanted, JAX_PLATFORMS="cpu" if wanted == "system" else "cuda,cpu", **_plugin(program.parent))
    assert freed["told"] == "system"
    assert min(freed["faults"]) > 100  # 128 where Linux gives large pages unasked


def _plugin(folder: pathlib.Path) -> dict[str, str]:
    """An environment in which JAX may find an accelerator."""
    (folder / "jax_plugins").mkdir()
    package = pathlib.Path(malloc.__file__).parents[2]
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(package)])}


@glibc
def test_where_the_setting_is_taken_away_it_starts_once_more_and_not_again(
    program: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """As the loader does to programs with privileges."""
    (tmp_path / "sitecustomize.py").write_text(f"import os\nos.environ.pop({malloc.VARIABLE!r}, None)\n")
    path = os.pathsep.join([str(tmp_path), str(pathlib.Path(malloc.__file__).parents[2])])
    told = run(program, "keep", JAX_PLATFORMS="cpu", PYTHONPATH=path)["told"]
    assert told == "system (GLIBC_TUNABLES is taken away from programs here)"


@glibc
def test_settings_of_the_user_are_left_alone(program: pathlib.Path) -> None:
    told = run(program, "keep", JAX_PLATFORMS="cpu", **{malloc.VARIABLE: "glibc.malloc.arena_max=2"})["told"]
    assert told == "GLIBC_TUNABLES=glibc.malloc.arena_max=2 (from the environment)"


def test_without_glibc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    assert malloc.keep_memory("keep") == "system (only glibc can be told to keep memory)"
