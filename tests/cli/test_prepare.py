"""The command `gpt2-jax prepare`, run as users run it."""

import pathlib
import shlex
import subprocess
import sys
import time

import pytest

from gpt2_jax import errors
from gpt2_jax.cli.main import main
from gpt2_jax.config import TokenizerConfig
from gpt2_jax.config_file import load_config
from gpt2_jax.data.token_store import open_token_store

RUN = "import sys; from gpt2_jax.cli.main import main; sys.exit(main())"


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.fixture(autouse=True)
def subprocesses_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(errors.__file__).parents[1]))


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> str:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("Some Text. " * number)
    return f"text:{tmp_path}/*.txt"


def test_prepare(corpus: str, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "a folder" / "out"
    done = command("prepare", "--source", corpus, "--tokenizer", "bytes", "--out", out, "--lowercase")
    assert (done.returncode, done.stderr) == (0, "")
    store = open_token_store(out)
    tokens = {split: len(store.split(split)) for split in ("train", "held_out")}
    assert sum(tokens.values()) == sum(11 * number + 1 for number in range(1, 12))
    assert f"train        {tokens['train']:,} tokens" in done.stdout
    assert f"held_out     {tokens['held_out']:,} tokens" in done.stdout
    for part in ("1 empty documents", "257 ids (bytes), stored as uint16", store.fingerprint):
        assert part in done.stdout
    assert shlex.quote(f"--config.data.source=tokens:{out}") in done.stdout
    assert "--config.tokenizer.name=bytes" in done.stdout
    assert store.tokenizer.lowercase


def test_options(corpus: str, tmp_path: pathlib.Path) -> None:
    options = ["--held_out=0.5", "--normalization=nfc", "--workers=1", "--text_field=body"]
    done = command("prepare", "--source", corpus, "--tokenizer=bpe:5", f"--out={tmp_path / 'out'}", *options)
    assert (done.returncode, done.stderr) == (0, "")
    store = open_token_store(tmp_path / "out")
    assert (store.tokenizer.name, store.tokenizer.normalization) == ("bpe:5", "nfc")
    held_out = store.num_documents("held_out")
    assert held_out in (5, 6)  # one of each two documents, of which one is empty
    assert held_out + store.num_documents("train") == 11


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "command"),
        (["prepar"], 2, "invalid choice: 'prepar'"),
        (["prepare"], 2, "--source, --tokenizer, --out (see gpt2-jax prepare --help)"),
        (["prepare", "--held_out", "x"], 2, "invalid float value: 'x'"),
        (["prepare", "--source", "stdlib", "--tokenizer", "gtp2", "--out", "o"], 2, "did you mean gpt2"),
        (["prepare", "--source", "x:y", "--tokenizer", "bytes", "--out", "o"], 2, "unknown; allowed: stdlib"),
        (
            ["prepare", "--source", "text:bad.txt", "--tokenizer", "bytes", "--out", "o"],
            3,
            "not utf-8 at byte 1",
        ),
        (
            ["prepare", "--source", "tokens:.", "--tokenizer", "bytes", "--out", "o"],
            2,
            "prepared already",
        ),
        (
            ["prepare", "--source", "stdlib", "--tokenizer", "bytes", "--out", "bad.txt"],
            2,
            "bad.txt is a file",
        ),
        (["prepare", "--source", "stdlib", "--tokenizer", "bytes", "--out", "/"], 2, "cannot be a token store"),
        (["prepare", "--source", "stdlib", "--tokenizer", "bytes", "--out", "/proc/x"], 2, "cannot be made"),
        (["prepare", "--source", "text:a\nb", "--tokenizer", "bytes", "--out", "o"], 2, "no file matches"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gpt2-jax: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_failure_of_the_system_is_one_line(corpus: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    """A limit on the size of files, as a full disk would be."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); " + RUN
    arguments = ["prepare", "--source", corpus, "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "gpt2-jax: error: [Errno 27] File too large\n"
    assert not (tmp_path / "out").exists()


def test_help_is_fast_and_light() -> None:
    start = time.monotonic()
    done = command("--help")
    assert (done.returncode, done.stderr) == (0, "") and "prepare" in done.stdout
    assert time.monotonic() - start < 5
    for module, heavy in (
        ("gpt2_jax.cli.main", "numpy jax tiktoken"),
        ("gpt2_jax.cli.prepare", "jax torch tensorflow grain pyarrow"),
    ):
        probe = f"import sys; import {module}; print(set({heavy.split()}) & set(sys.modules))"
        assert subprocess.check_output([sys.executable, "-c", probe], text=True) == "set()\n"


def test_help_of_the_command() -> None:
    done = command("prepare", "--help")
    assert done.returncode == 0
    for option in (
        "--source",
        "--tokenizer_path",
        "--text_field",
        "--held_out",
        "--normalization",
        "--lowercase",
    ):
        assert option in done.stdout


def test_interrupt(corpus: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt2_jax.cli.prepare.prepare", interrupted)
    arguments = ["prepare", "--source", corpus, "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    assert main(arguments) == 130


def test_closed_pipe_is_quiet(corpus: str, tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            RUN,
            "prepare",
            "--source",
            corpus,
            "--tokenizer=bytes",
            f"--out={tmp_path / 'out'}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), error) == (141, b"")


def test_the_proposed_flags_are_those_of_the_store(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "corpus.txt").write_text("SOME Text " * 50)
    settings = ["--tokenizer", "bpe:5", "--lowercase", "--normalization", "nfc"]
    command = ["prepare", "--source", f"text:{tmp_path / 'corpus.txt'}", *settings, "--out", str(tmp_path / "tokens")]
    assert main(command) == 0
    flags = shlex.split(capsys.readouterr().out.split("train on it with ")[1])
    overrides = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)
    config = load_config("", overrides)
    assert config.tokenizer == TokenizerConfig("bpe:5", "", "nfc", True)
    assert config.data.source == f"tokens:{tmp_path / 'tokens'}"
