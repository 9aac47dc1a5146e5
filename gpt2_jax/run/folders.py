"""Which folders the processes of a run share, and who writes where."""

import contextlib
import dataclasses
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator

from etils import epath

from gpt2_jax.errors import UsageError
from gpt2_jax.folder_lock import FolderInUseError, folder_lock
from gpt2_jax.remote_folder import address_of, is_remote, pull
from gpt2_jax.run.hosts import Hosts
from gpt2_jax.run.lease import RHYTHM, Lease, Rhythm, held, in_use
from gpt2_jax.run.lease_file import BucketLeaseFile, LeaseFile, LocalLeaseFile
from gpt2_jax.run.run_folder import checkpoints_folder, folder_to_read, make_folder
from gpt2_jax.user_paths import expand_user

_LOOK_SECONDS = 5.0  # network file systems show a new file late


@dataclasses.dataclass(frozen=True)
class RunFolders:
    """Where a run writes.

    Attributes:
      run: the run folder, or the mirror of one at gs://; only process 0 writes there.
      checkpoints: the saved steps, which all processes write.
      check_held: raises LeaseLostError, in process 0, where another job may have taken the folders: to be asked before
        anything is written there. Cheap.
    """

    run: pathlib.Path
    checkpoints: epath.Path
    check_held: Callable[[], None] = lambda: None


@contextlib.contextmanager
def run_folders(
    hosts: Hosts, workdir: str, checkpoints: str, *, steal: bool = False, rhythm: Rhythm = RHYTHM
) -> Iterator[RunFolders]:
    """Makes the folders and holds them, by process 0 for all, for the length of the block; `steal`: whoever has them.

    Without `checkpoints` they are in the run folder, which all processes must see. With it, the run folder, which is
    then needed by process 0 alone, has a link to it.

    Raises:
      UsageError: a folder cannot be made or is in use, or the processes do not share it.
    """
    with contextlib.ExitStack() as stack:
        leases: list[Lease] = []

        def hold(lock: pathlib.Path, file: LeaseFile, place: str) -> None:
            try:
                stack.enter_context(folder_lock(lock, wait=False))
            except FolderInUseError:
                if not steal:
                    raise in_use(place, file.read()) from None
            leases.append(stack.enter_context(held(file, place, steal=steal, rhythm=rhythm)))

        with hosts.together():
            if checkpoints and is_remote(workdir):
                raise UsageError(f"--checkpoints={checkpoints}: leave it out, --workdir={workdir} is seen by all hosts")
            shared = expand_user(checkpoints)  # which refuses gs://
            folder = make_folder(workdir) if hosts.first else folder_to_read(workdir)
            if hosts.first:
                real = folder.resolve()
                file = BucketLeaseFile(workdir) if is_remote(workdir) else LocalLeaseFile(real)
                hold(real / "run", file, f"--workdir={address_of(real)}")
                pull(folder)
            if hosts.first and checkpoints:
                target = make_folder(checkpoints).resolve()
                if target != real:
                    hold(target, LocalLeaseFile(target), f"--checkpoints={target}")
                _link(folder / "checkpoints", target)
        if not is_remote(workdir):
            _check_shared(hosts, shared if checkpoints else folder, checkpoints)

        def check_held() -> None:
            for lease in leases:
                lease.check()

        yield RunFolders(folder, epath.Path(shared) if checkpoints else checkpoints_folder(folder), check_held)


def _link(link: pathlib.Path, target: pathlib.Path) -> None:
    """Lets the run folder hold its checkpoints, for whatever reads it, wherever they are."""
    if link.resolve() == target:
        return
    if link.is_symlink() or link.exists():
        raise UsageError(f"--checkpoints={target}: the run has its checkpoints in {link.resolve()}; go on with those")
    link.symlink_to(target, target_is_directory=True)


def _check_shared(hosts: Hosts, folder: pathlib.Path, checkpoints: str) -> None:
    if hosts.count == 1:
        return
    token = hosts.gather(secrets.token_hex(8))[0]
    probe = folder / f".shared.{token}"
    with hosts.together():
        if hosts.first:
            probe.touch()
    with hosts.together():
        seen = _appears(probe)
    seen_by = hosts.gather("seen" if seen else "")
    if hosts.first:
        probe.unlink()
    for host, answer in enumerate(seen_by):
        if not answer:
            flag = "--checkpoints" if checkpoints else "--workdir"
            raise UsageError(
                f"{flag}={folder}: host {host} does not see what host 0 writes there; name a folder that all hosts "
                "share, or with disks of their own only --checkpoints=DIR in a shared place"
            )


def _appears(file: pathlib.Path) -> bool:
    end = time.monotonic() + _LOOK_SECONDS
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
