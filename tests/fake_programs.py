"""Programs that stand in for those of a cluster that is not here, and write down how they were called."""

import dataclasses
import os
import pathlib
import subprocess
from collections.abc import Mapping

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"


@dataclasses.dataclass(frozen=True)
class FakePrograms:
    """A folder that holds the programs, and is where commands run."""

    folder: pathlib.Path

    def add(self, name: str, script: str = "") -> None:
        """A program, by its name or path, that notes its arguments and then does what `script` says in bash."""
        file = self.folder / ("" if "/" in name else "bin") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        note = f"printf '%s\\0' {file.name} \"$@\" $'\\n' >> {self.folder / 'calls'}"
        file.write_text(f"#!/bin/bash\n{note}\n{script}\n")
        file.chmod(0o755)

    def calls(self, name: str = "") -> list[list[str]]:
        """The arguments of each call so far, of one program or of all, their names first."""
        notes = self.folder / "calls"
        lines = notes.read_text().split("\0\n\0")[:-1] if notes.exists() else []
        return [call for call in (line.split("\0") for line in lines) if name in ("", call[0])]

    def bash(self, *words: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Runs `bash WORDS` with the programs before all others."""
        return subprocess.run(
            ["bash", *map(str, words)],
            cwd=self.folder,
            env=self.environment(env),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """That of the commands."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "RESTART_SECONDS": "0", **(more or {}), "PATH": path}


def refused(done: subprocess.CompletedProcess[str], fragment: str = "use 1 to 40 of a-z") -> None:
    """Asserts that a command ended with exit code 2 and one line that holds `fragment`."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert fragment in done.stderr
