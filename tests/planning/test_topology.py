"""TPU slices by name: what there is, what there is not, and devices to compile for."""

import importlib.util
import os
import subprocess
import sys

import pytest

from gpt2_jax.errors import UsageError
from gpt2_jax.planning.topology import Topology, devices, parse_topologies


def test_names_become_topologies() -> None:
    one, two, three, four = parse_topologies("v5e:4x4, v5p:8x8x16,v4:2x2x2,tpu7x:1x1x1*3")
    assert one == Topology("v5e:4x4", "tpu", "v5e", (4, 4), 1, 1)
    assert (two.dims, two.chips, two.num_devices) == ((8, 8, 16), 1024, 1024)
    assert (three.chips, three.num_devices) == (8, 8)
    assert (four.slices, four.chips, four.num_devices) == (3, 3, 6)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("v5e:3x4", "nearest: v5e:4x4"),
        ("v5e:16x32", "nearest: v5e:16x16"),  # libtpu would end the process
        ("v5e:32x2", "nearest: v5e:16x2"),
        ("v5e:4x4x4", "nearest: v5e:4x4"),
        ("v4:2x2", "nearest: v4:2x2x1"),
        ("v5p:3x8x3", "nearest: v5p:4x8x3"),
        ("v5p:40x3x40", "nearest: v5p:20x4x28"),
        ("tpu7x:0x2x2", "nearest: tpu7x:2x2x2"),
        ("v4:1x1", "nearest: v4:1x1x1"),
        ("v5lite:4x4", "did you mean v5e?"),
        ("h100:8", "known: v4, v5e, v5p, v6e, tpu7x"),
        ("v5e", "write v5e:4x4"),
        ("v4:axb", "write v4:4x4x4"),
        ("v6e:4x4*0", "0 slices; allowed: 1 to 1024"),
        ("v5e:4x4,", "unknown TPU ''"),
    ],
)
def test_what_there_is_not_is_one_line_with_the_nearest(name: str, part: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_topologies(name)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5e:16x16", "v5p:2x2x3", "v6e:2x4*2", "tpu7x:2x2x1"])
def test_the_compiler_takes_them(name: str) -> None:
    (topology,) = parse_topologies(name)
    found = devices(topology)
    assert len(found) == topology.num_devices
    assert len({tuple(device.coords) for device in found}) == topology.chips // topology.slices
    assert len({getattr(device, "slice_index", 0) for device in found}) == topology.slices


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'gpt2-jax\[tpu\]'"):
        devices(parse_topologies("v5e:4x4")[0])


PROGRAM = """
from gpt2_jax.planning.topology import devices, parse_topologies
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
mesh = Mesh(np.array(devices(parse_topologies("v5e:2x2")[0])), "x")
rows = jax.ShapeDtypeStruct((1024, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
compiled = jax.jit(lambda a: a.T @ a).lower(rows).compile()
print("all-reduce" in compiled.as_text(), flush=True)
input()
"""


@pytest.mark.tpu
def test_two_processes_compile_at_once_and_quietly() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "TF_", "ALLOW_"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, "-c", PROGRAM]
    with (
        subprocess.Popen(command, env=plain, text=True, **pipes) as one,
        subprocess.Popen(command, env=plain, text=True, **pipes) as other,
    ):
        # Each holds libtpu until both have compiled.
        assert [process.stdout.readline() for process in (one, other) if process.stdout] == ["True\n", "True\n"]
        assert [process.communicate("\n", timeout=60)[0] for process in (one, other)] == ["", ""]
