"""Compiler settings: what is set for which devices, what the user has set wins, and why TPUs get none."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest

from gpt2_jax.run import xla_flags


@dataclasses.dataclass
class Chip:
    platform: str


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = jax.config.jax_optimization_level
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    jax.config.update("jax_optimization_level", "UNKNOWN")
    yield
    jax.config.update("jax_optimization_level", before)


def set_flags(platform: str, devices: int) -> list[str]:
    return xla_flags.set_compiler_flags([Chip(platform)] * devices)  # type: ignore[list-item]


@pytest.mark.parametrize(("platform", "devices"), [("cpu", 8), ("tpu", 16), ("gpu", 1)])
def test_nothing_is_set_where_nothing_helps(platform: str, devices: int) -> None:
    assert set_flags(platform, devices) == []
    assert jax.config.jax_optimization_level == "UNKNOWN"


def test_several_gpus_overlap_their_collectives() -> None:
    assert set_flags("gpu", 8) == ["jax_optimization_level=O1 (collectives overlap with compute)"]
    assert jax.config.jax_optimization_level == "O1"


def test_the_users_own_flags_win_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    own = [
        "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=false (from the environment)",
        "LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=65536 (from the environment)",
    ]
    assert set_flags("gpu", 8) == set_flags("tpu", 8) == own
    assert jax.config.jax_optimization_level == "UNKNOWN"


def test_the_users_own_level_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O3")
    jax.config.update("jax_optimization_level", "O3")  # as JAX does with the variable when it is imported
    assert set_flags("gpu", 8) == ["JAX_OPTIMIZATION_LEVEL=O3 (from the environment)"]
    assert jax.config.jax_optimization_level == "O3"


# The gradients of two scanned layers whose weights and batch are split over four chips.
TPU_PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

def loss(w_LDD, x_BD):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0].astype(jnp.float32).sum()

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = topologies.make_mesh(chips, (4,), ("fsdp",))
whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), ("fsdp",)))
w_LDD = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.bfloat16, sharding=whole)
x_BD = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=split)
lowered = jax.jit(jax.grad(loss), out_shardings=whole).lower(w_LDD, x_BD)
print(json.dumps([lowered.compile(compiler_options=options or None).as_text() for options in json.loads(sys.argv[1])]))
"""
FLAGS_HANDED_ON = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
    "xla_tpu_enable_data_parallel_all_reduce_opt",
    "xla_tpu_data_parallel_opt_different_sized_ops",
)


@pytest.mark.tpu
def test_the_flags_handed_on_for_tpus_are_its_defaults() -> None:
    on = dict.fromkeys(FLAGS_HANDED_ON, "true")
    off = {"xla_tpu_enable_async_collective_fusion": "false", "xla_enable_async_all_gather": "false"}
    ahead = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5e-4"}
    ahead |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", TPU_PROGRAM, json.dumps([{}, on, off])]
    done = subprocess.run(command, env=os.environ | ahead, capture_output=True, text=True, timeout=600, check=True)
    plain, with_flags, without = json.loads(done.stdout.splitlines()[-1])
    assert "all-gather" in plain or "collective-permute" in plain
    assert with_flags == plain
    assert without != plain  # so the comparison would see a flag that does something
