"""How processes find one another, what is compared, and which devices they may leave unused."""

import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from tiny_run import REPOSITORY, Workshop, workshop

from gpt2_jax.errors import Gpt2JaxError, OtherHostError, UsageError
from gpt2_jax.run import hosts
from gpt2_jax.run.accelerators import check_accelerator_is_used, visible_accelerator
from gpt2_jax.run.hosts import HostOptions, Hosts, joined
from gpt2_jax.run.rendezvous import free_address, is_loopback, meet


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


# Meeting


def meet_in_threads(address: str, count: int, indices: list[int], timeout: float) -> dict[int, str]:
    """What each was told; empty for those that met all."""
    told: dict[int, str] = {}

    def come(index: int) -> None:
        try:
            meet(address, count, index, timeout)
            told[index] = ""
        except Gpt2JaxError as error:
            told[index] = str(error)

    threads = [threading.Thread(target=come, args=(index,)) for index in indices]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout + 10)
    return told


def test_all_meet_in_whatever_order_they_come() -> None:
    for order in ([0, 1, 2], [2, 1, 0]):
        assert meet_in_threads(free_address(), 3, order, 20) == {0: "", 1: "", 2: ""}


def test_those_that_are_missing_are_told_to_all_that_came() -> None:
    told = meet_in_threads(free_address(), 4, [0, 2], 1)
    for index in (0, 2):
        assert "2 of 4 hosts came" in told[index], told
        assert "missing: 1, 3" in told[index]
    alone = meet_in_threads(free_address(), 2, [1], 0.5)
    assert "no answer from host 0" in alone[1]
    assert "1 of 2 hosts seen" in alone[1]


def test_strangers_at_the_port_do_not_count() -> None:
    address = free_address()
    host, port = address.split(":")
    told: dict[int, str] = {}
    meeting = threading.Thread(target=lambda: told.update(meet_in_threads(address, 3, [0, 1], 3)))
    meeting.start()
    time.sleep(0.3)
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"2/4\n", b"7/3\n", b"0/3\n", b"\xff\xfe\n"):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(greeting)
    meeting.join(20)
    assert "2 of 3 hosts came" in told[0]
    assert "missing: 2" in told[0]


def test_a_port_in_use_is_told() -> None:
    address = free_address()
    host, port = address.split(":")
    with socket.create_server((host, int(port))), pytest.raises(UsageError, match="name a free port"):
        meet(address, 2, 0, 1)


def test_what_is_no_address() -> None:
    for address in ("node1", "node1:x", ":80", "node1:70000"):
        with pytest.raises(UsageError, match="give HOST:PORT"):
            meet(address, 2, 0, 1)
    assert is_loopback("localhost:1") and is_loopback("127.0.0.1:1") and is_loopback("[::1]:1")
    assert not is_loopback("node1:1") and not is_loopback("10.0.0.1:1")


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--num_processes=2"], "--coordinator_address, --process_id missing"),
        (["--coordinator_address=a:1", "--process_id=0"], "--num_processes missing"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "allowed are 0 to 1"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=-1"], "give an integer from 0"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=0", "--no_distributed"], "--no_distributed"),
        (["--initialization_timeout=0"], "give an integer from 1"),
    ],
)
def test_half_given_flags_are_refused(tiny: Workshop, tmp_path: pathlib.Path, flags: list[str], fragment: str) -> None:
    tiny.run_here(tmp_path / "run", None, *flags).says(2, fragment)
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_says_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node1:1234")
    with pytest.raises(UsageError, match="give all of --coordinator_address"), joined(HostOptions()):
        pass


def test_slurm_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[007-009]",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    address, count, index, _ = hosts._place(HostOptions())
    assert (address, count, index) == ("node007:61441", 3, 1)  # job number modulo 2^12, above 61440


# Alone

ALONE = """
import sys
import jax
from gpt2_jax.run.hosts import HostOptions, joined

with joined(HostOptions(distributed=sys.argv[1] == "joined")) as hosts:
    print(jax.distributed.is_initialized(), hosts.index, hosts.count, jax.device_count())
    if sys.argv[1] == "joined":
        from jax._src import distributed
        print(distributed.global_state.coordinator_address)
print(jax.distributed.is_initialized())
"""


@pytest.mark.slow
def test_one_process_binds_the_loopback_address(tiny: Workshop) -> None:
    done = tiny.python(ALONE, "joined")
    lines = done.out.splitlines()
    assert lines[0] == "True 0 1 1", done.err
    assert lines[1].startswith("127.0.0.1:")
    assert lines[2] == "False"
    done = tiny.python(ALONE, "not")
    assert done.out.splitlines() == ["False 0 1 1", "False"], done.err


TWO_RUNS = """
import sys
from gpt2_jax.cli.train import main

for folder in "ab":
    assert main([f"--workdir={sys.argv[1]}/{folder}", *sys.argv[2:]]) == 0
"""


@pytest.mark.faults
def test_one_program_trains_twice(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    """Orbax would talk to the coordinator of the first run, which is gone."""
    settings = {"train.steps": 6, "train.eval_every": 0, "train.sample_every": 0}
    arguments = [word for word in tiny.arguments(tmp_path, settings) if not word.startswith("--workdir")]
    done = tiny.python(TWO_RUNS, tmp_path, *arguments)
    assert done.code == 0, done.err
    assert (tmp_path / "b" / "checkpoints" / "6").is_dir()


def test_one_host_agrees_with_itself() -> None:
    alone = Hosts(0, 1)
    assert alone.first and alone.gather("x") == ["x"]
    alone.check_equal({"a": "1"})
    with pytest.raises(DataProblem), alone.together():
        raise DataProblem
    assert OtherHostError("host 1: no", 3).exit_code == 3


class DataProblem(Exception):
    """Some failure."""


def test_the_code_version_changes_with_the_code(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2_jax" / "run").mkdir(parents=True)
    (tmp_path / "gpt2_jax" / "__init__.py").write_text("")
    file = tmp_path / "gpt2_jax" / "run" / "x.py"
    monkeypatch.setattr(hosts.gpt2_jax, "__file__", str(tmp_path / "gpt2_jax" / "__init__.py"))
    versions = set()
    for content in ("a = 1\n", "a = 2\n", "a = 1\n"):
        file.write_text(content)
        versions.add(hosts.code_version())
    assert len(versions) == 2
    file.rename(file.with_name("y.py"))
    assert hosts.code_version() not in versions


# Devices that are left unused


def make(root: pathlib.Path, *files: str) -> pathlib.Path:
    for file in files:
        path, _, content = file.partition("=")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


def test_accelerators_are_seen(tmp_path: pathlib.Path) -> None:
    def kind(name: str, *files: str) -> str:
        found = visible_accelerator(make(tmp_path / name, *files))
        return "" if found is None else f"{found[0]} {found[2]}"

    google = "sys/bus/pci/devices/0000:00:04.0/vendor=0x1ae0\n"
    intel = "sys/bus/pci/devices/0000:00:05.0/vendor=0x8086\n"
    assert kind("nvidia", "dev/nvidia0") == "GPU cuda13"
    assert kind("driver", "proc/driver/nvidia/gpus/0000:01:00.0/information") == "GPU cuda13"
    assert kind("accel", "dev/accel0") == "TPU tpu"
    assert kind("vfio", "dev/vfio/0", google, intel) == "TPU tpu"
    # A laptop's own accelerator, a network card of a Google machine, another card that is handed out.
    assert kind("npu", "dev/accel/accel0", "dev/nvidiactl") == ""
    assert kind("network", "dev/vfio/vfio", google) == ""
    assert kind("other", "dev/vfio/12", intel) == ""
    assert kind("nothing", "dev/null") == ""


def test_the_cpu_beside_a_gpu_is_refused_unless_it_is_asked_for(tmp_path: pathlib.Path) -> None:
    root = make(tmp_path, "dev/nvidia0")
    asked_for = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        with pytest.raises(UsageError, match=r"gpt2-jax\[cuda13\].*JAX_PLATFORMS=cpu") as raised:
            check_accelerator_is_used(root)
        assert raised.value.exit_code == 2
        check_accelerator_is_used(make(tmp_path / "empty", "dev/null"))
        jax.config.update("jax_platforms", "cpu")
        check_accelerator_is_used(root)
    finally:
        jax.config.update("jax_platforms", asked_for)


@pytest.mark.slow
def test_the_package_needs_no_network_to_be_alone() -> None:
    """The flags' own errors come before JAX is imported."""
    script = "import sys; from gpt2_jax.cli.train import main; main(['--process_id=0']); print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"
