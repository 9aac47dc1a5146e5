"""The script for Cloud TPU slices: what it asks gcloud for, and what its command does on a host."""

import pathlib
import subprocess

import pytest
from fake_programs import LAUNCH, FakePrograms, refused

CREATED = ["create", "run-7", "--node-id=run-7", "--accelerator-type=v5litepod-16", "--spot"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
# describe: the next of the states, of which the last stays; ssh: its command is run here, as on a host.
GCLOUD = """
case "$3 $4" in
  "queued-resources describe")
    read -r state < states
    sed -i '1{$!d}' states
    if [[ $state == NOT_FOUND ]]; then exit 1; fi
    echo "$state" ;;
  "tpu-vm scp") cp "$5" host ;;
  "tpu-vm ssh") cd host && exec bash -c "${7#--command=}" ;;
esac
"""


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> FakePrograms:
    (tmp_path / "launch").symlink_to(LAUNCH)
    return FakePrograms(tmp_path)


def queued(programs: FakePrograms) -> list[list[str]]:
    """The calls that change something."""
    calls = programs.calls("gcloud")
    assert all(call[:4] == QUEUED for call in calls)
    return [call[4:] for call in calls if call[4] != "describe"]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["NOT_FOUND", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], [CREATED]),
        (["SUSPENDED", "ACTIVE"], [["delete", "run-7", "--force", "--quiet"], CREATED]),
        (["ACTIVE"], []),
    ],
    ids=("new", "preempted", "there"),
)
def test_create_asks_for_what_is_not_there_and_waits(
    programs: FakePrograms, states: list[str], expected: list[list[str]]
) -> None:
    programs.add("gcloud", GCLOUD)
    programs.add("sleep")
    (programs.folder / "states").write_text("\n".join(states) + "\n")
    done = programs.bash("launch/tpu_vm.sh", "create", "run-7", *CREATED[3:])
    assert (done.returncode, done.stderr) == (0, "")
    assert queued(programs) == expected


def test_create_ends_when_the_request_has_failed(programs: FakePrograms) -> None:
    programs.add("gcloud", GCLOUD)
    programs.add("sleep")
    (programs.folder / "states").write_text("ACCEPTED\nFAILED\n")
    done = programs.bash("launch/tpu_vm.sh", "create", "run-7")
    assert (done.returncode, queued(programs)) == (1, [])
    assert "run-7 is FAILED" in done.stderr


def test_train_starts_the_commit_that_is_checked_out_on_all_hosts(programs: FakePrograms) -> None:
    here, host = programs.folder, programs.folder / "host"
    host.mkdir()
    (here / "train.py").write_text("committed")
    for words in (["init", "-q"], ["add", "train.py"], ["commit", "-q", "-m", "a commit"]):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=here, check=True)
    (here / "train.py").write_text("edited since")
    programs.add("gcloud", GCLOUD)
    for name in ("python3", "sudo"):
        programs.add(name)
    flags = ["--config=c.py", "--config.data.source=text:a b/*.txt", '--workdir=gs://it\'s/"$HOME"', "--x=$(touch x);#"]
    done = programs.bash("launch/tpu_vm.sh", "train", "run-7", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    copied, started = programs.calls("gcloud")
    assert copied[1:5] + copied[6:] == ["compute", "tpus", "tpu-vm", "scp", "run-7:", "--worker=all"]
    assert started[1:7] == ["compute", "tpus", "tpu-vm", "ssh", "run-7", "--worker=all"]
    assert (host / "gpt2-jax" / "train.py").read_text() == "committed"
    unit = programs.calls("sudo")[-1]
    assert unit[1:3] == ["systemd-run", "--unit=gpt2-jax"]
    assert {
        "--property=Restart=on-failure",
        "--property=RestartForceExitStatus=75",
        "--property=RestartPreventExitStatus=2 3 4",
        "--property=StartLimitBurst=4",
    } <= {*unit}
    # systemd makes $ of $$.
    assert unit[-6:] == [f"{host}/gpt2-jax/.venv/bin/python", "train.py", *(flag.replace("$", "$$") for flag in flags)]
    assert not (host / "x").exists()


def test_what_is_not_a_command_is_refused(programs: FakePrograms) -> None:
    programs.add("gcloud")
    refused(programs.bash("launch/tpu_vm.sh", "start", "run-7"), "create, train, logs, stop or delete")
    refused(programs.bash("launch/tpu_vm.sh", "train"), "usage")
    assert programs.calls() == []
