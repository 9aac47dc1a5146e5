"""Without a network: the quick start and the commands, where there is only the loopback, or not even that."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest
from tiny_run import REPOSITORY, Finished, Workshop, workshop

pytestmark = pytest.mark.faults

NO_NETWORK = ["unshare", "-rn"]
LOOPBACK = [*NO_NETWORK, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
COMMAND = [sys.executable, "-c", "import sys; from gpt2_jax.cli.main import main; sys.exit(main())"]
SECONDS = 500

# Read by Python at its start: notes every address outside this machine that is looked up or connected to, which a
# program may do and say nothing when it fails.
SITECUSTOMIZE = """
import os, sys


def note(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        address = arguments[-1] if event == "socket.sendto" else arguments
    else:
        return
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", None, ""):
        fd = os.open(os.environ["NOTED_ADDRESSES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{event} {address}\\n".encode())
        os.close(fd)


sys.addaudithook(note)
"""


@pytest.fixture(scope="module", autouse=True)
def _permitted() -> None:
    try:
        subprocess.run([*LOOPBACK, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a network namespace cannot be made here: {error}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("offline")
    (folder / "python").mkdir()
    (folder / "python" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder


def offline(home: pathlib.Path, command: Sequence[str], prefix: Sequence[str] = LOOPBACK) -> Finished:
    """A command in a namespace of its own, with empty caches; looks that it ends well and asked nobody."""
    noted = home / "addresses.txt"
    noted.unlink(missing_ok=True)
    # No word to any library that there is no network: a user has set none either.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TF_CPP"))}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{home / 'python'}:{REPOSITORY}",
        "NOTED_ADDRESSES": str(noted),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TMPDIR": str(home),
    }
    done = subprocess.run(
        [*prefix, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert not noted.exists(), noted.read_text()
    return Finished(done.returncode, done.stdout, done.stderr)


def test_the_namespace_has_no_network_and_the_notes_work(home: pathlib.Path) -> None:
    """Else what follows would show nothing."""
    ask = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    with pytest.raises(AssertionError, match=r"socket.connect \('192.0.2.1', 80\)"):
        offline(home, [sys.executable, "-c", ask])
    interfaces = offline(home, ["cat", "/proc/net/dev"]).out.splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


def test_the_quick_start_and_what_one_does_with_its_run(home: pathlib.Path) -> None:
    run, tokens = home / "run", home / "tokens"
    shorter = {"train.steps": 4, "train.eval_windows": 16, "optimizer.warmup_steps": 1}
    overrides = [f"--config.{key}={value}" for key, value in shorter.items()]
    quickstart = "--config=configs/quickstart.py"
    for command in (
        [sys.executable, "train.py", quickstart, f"--workdir={run}", "--tensorboard", *overrides],
        [*COMMAND, "generate", f"--model={run}", "--prompt", "def ", "--max_new_tokens=8"],
        [*COMMAND, "prepare", "--source=stdlib", "--tokenizer=bytes", f"--out={tokens}"],
        [*COMMAND, "export", f"--model={run}", "--format=huggingface", f"--out={home / 'hf'}"],
        [*COMMAND, "export", f"--model={home / 'hf'}", "--format=npz", f"--out={home / 'npz'}"],
        [*COMMAND, "import", "--from=npz", f"--model={home / 'npz'}", f"--out={home / 'again'}"],
        [*COMMAND, "generate", f"--model={home / 'again'}", "--prompt", "def ", "--max_new_tokens=8"],
        [*COMMAND, "plan", quickstart, "--topology=v5e:4x4", "--analytic", "--config.model.vocab_size=2305"],
    ):
        done = offline(home, command)
        assert done.code == 0, f"{command}: {done.err}"
    assert (run / "huggingface" / "model.safetensors").is_file()


def test_without_a_loopback_train_names_the_flag_that_helps(
    home: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: pathlib.Path
) -> None:
    tiny: Workshop = workshop(tmp_path_factory.getbasetemp())
    few = {"train.steps": 3, "optimizer.warmup_steps": 1, "train.sample_every": 0}
    train = [sys.executable, "train.py", *tiny.arguments(tmp_path / "run", few)]
    refused = offline(home, train, NO_NETWORK)
    refused.says(1, "loopback", "give --no_distributed to train in this process alone")
    assert not (tmp_path / "run").exists()
    done = offline(home, [*train, "--no_distributed"], NO_NETWORK)
    assert done.code == 0, done.err
