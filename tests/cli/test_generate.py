"""The command `gpt2-jax generate`, on a tiny run of the real train.py."""

import contextlib
import io
import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_run import Finished, finished_run, kept_settings, workshop

import gpt2_jax
from gpt2_jax.cli.main import main
from gpt2_jax.decoding.generate import Completion

RUN = "import sys; from gpt2_jax.cli.main import main; sys.exit(main())"
COMPILED = os.environ["GPT2_JAX_TEST_COMPILE_CACHE"]
GREEDY = "--temperature=0"
# Until someone stops it.
ENDLESS = ("--beyond_context=slide", "--max_new_tokens=1000000", "--ignore_end_of_text", "--prompt=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return finished_run(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.getbasetemp()


def here(*arguments: object, stdin: bytes = b"") -> Finished:
    """The command in this process."""
    out, err, inward = (io.TextIOWrapper(io.BytesIO(content), "utf-8") for content in (b"", b"", stdin))
    before, sys.stdin = sys.stdin, inward
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_settings():
            code = main(["generate", f"--compile_cache={COMPILED}", *map(str, arguments)])
            out.flush(), err.flush()
    finally:
        sys.stdin = before
    return Finished(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def refused(done: Finished, *fragments: str) -> None:
    assert (done.code, done.out) == (2, ""), done
    assert done.err.count("\n") == 1
    assert done.err.startswith("gpt2-jax: error: ")
    assert all(fragment in done.err for fragment in fragments), done.err


def start(base: pathlib.Path, *arguments: object, **options: Any) -> subprocess.Popen:
    """The command as a process of its own."""
    tiny = workshop(base)
    command = [sys.executable, "-c", RUN, "generate", f"--compile_cache={COMPILED}", *map(str, arguments)]
    pipes = {name: options.pop(name, subprocess.PIPE) for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(command, env={**tiny.environment(), **options.pop("env", {})}, **pipes, **options)


def expected(model: pathlib.Path, prompts: list[Any], **asked: Any) -> list[Completion]:
    config, params, tokenizer = gpt2_jax.load(model)
    return gpt2_jax.Generator(config.model, params, tokenizer).generate(prompts, **asked)


@pytest.mark.smoke
def test_one_text_is_printed_after_its_prompt(model: pathlib.Path) -> None:
    done = here("--model", model, "--prompt", "12 plus", "--max_new_tokens=8", GREEDY)
    stopping, sampling = gpt2_jax.Stopping(max_new_tokens=8), gpt2_jax.Sampling(temperature=0)
    (want,) = expected(model, ["12 plus"], stopping=stopping, sampling=sampling)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"12 plus{want.text}\n"


def test_the_end_of_the_context_is_told(model: pathlib.Path) -> None:
    done = here("--model", model, "--prompt", "12 plus one", GREEDY, "--ignore_end_of_text")
    assert done.code == 0
    assert done.err == (
        "gpt2-jax: prompt 1: the text ended after 6 tokens, since the context of 16 is full; "
        "--beyond_context=slide goes on\n"
    )
    slid = here("--model", model, "--prompt=1", GREEDY, "--beyond_context=slide", "--max_new_tokens=40")
    assert (slid.code, slid.err) == (0, "")
    assert len(slid.out) > 35


def test_json_lines(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("12 plus\r\nné\n\n7".encode())
    flags = ("--top_k=9", "--seed=4", "--max_new_tokens=6", "--num_samples=2", "--alternatives=2", "--stop=e.")
    done = here("--model", model, "--prompts", tmp_path / "prompts.txt", "--json", *flags)
    assert done.code == 0
    assert done.err == "gpt2-jax: the prompt is empty: the text starts from end-of-text\n"
    want = expected(
        model,
        ["12 plus", "né", "", "7"],
        sampling=gpt2_jax.Sampling(top_k=9),
        stopping=gpt2_jax.Stopping(max_new_tokens=6, strings=("e.",)),
        seed=4,
        num_samples=2,
        alternatives=2,
    )
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert len(lines) == len(want) == 8
    for line, completion in zip(lines, want, strict=True):
        assert line["prompt"] == ["12 plus", "né", "", "7"][completion.prompt]
        for name in ("sample", "text", "finish_reason", "stopped_by"):
            assert line[name] == getattr(completion, name)
        assert line["prompt_ids"] == list(completion.prompt_ids)
        assert line["ids"] == list(completion.ids)
        assert line["log_probs"] == pytest.approx(completion.log_probs)
        assert [[token for token, _, _ in place] for place in line["alternatives"]] == [
            [token for token, _ in place] for place in completion.alternatives
        ]
    assert lines[5]["prompt_ids"] == [256]


def test_several_texts_have_heads(model: pathlib.Path) -> None:
    done = here("--model", model, "--prompt_ids=49,50", "--prompt_ids=55", "--num_samples=2", "--max_new_tokens=3")
    want = expected(model, [[49, 50], [55]], num_samples=2, stopping=gpt2_jax.Stopping(max_new_tokens=3))
    heads = [f"--- prompt {c.prompt + 1}, sample {c.sample + 1}\n{['12', '7'][c.prompt]}{c.text}\n" for c in want]
    assert done.out == "".join(heads)


def test_the_same_seed_gives_the_same_text_whatever_else_is_there(model: pathlib.Path) -> None:
    def text(*prompts: str, seed: int = 1) -> str:
        done = here(
            *("--model", model, "--prompts=-", "--json", "--max_new_tokens=8", f"--seed={seed}"),
            stdin="\n".join(prompts).encode(),
        )
        return {line["prompt"]: line["text"] for line in map(json.loads, done.out.splitlines())}["2 plus"]

    assert text("2 plus") == text("1", "one", "2 plus", "") == text("2 plus", *"abcdefghij")
    assert text("2 plus") != text("2 plus", seed=2)


def test_scores(model: pathlib.Path) -> None:
    config, params, tokenizer = gpt2_jax.load(model)
    want = gpt2_jax.Generator(config.model, params, tokenizer).score("12 plus")
    done = here("--model", model, "--prompt=12 plus", "--score")
    assert done.out == f"prompt 1: log-likelihood {want.total:.4f} nats over 7 tokens\n"
    (line,) = map(json.loads, here("--model", model, "--prompt=12 plus", "--score", "--json").out.splitlines())
    assert line["log_probs"] == pytest.approx(want.log_probs)
    assert line["log_likelihood"] == pytest.approx(want.total)
    refused(here("--model", model, "--prompt=12", "--prompt=0123456789abcdefg", "--score"), "the text has 17 tokens")


def test_a_mesh(model: pathlib.Path) -> None:
    flags = ("--model", model, "--prompt=12 plus", "--prompt=3", "--max_new_tokens=8", GREEDY)
    assert here(*flags, "--data=4", "--tensor=2").out == here(*flags).out
    assert here(*flags, "--data=2", "--tensor=4").out == here(*flags).out  # two heads on four devices
    refused(here(*flags, "--tensor=7"), "n_embd = ", "mesh.tensor = 7")
    refused(here(*flags, "--data=64"), "64 devices asked for; 8 here")


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--prompt=x", "--temperature=-0.5"), ["temperature=-0.5", "from 0"]),
        (("--prompt=x", "--temperature=nan"), ["temperature=nan"]),
        (("--prompt=x", "--temperature=hot"), ["--temperature", "'hot'"]),
        (("--prompt=x", "--top_p=0"), ["top_p=0", "above 0, up to 1"]),
        (("--prompt=x", "--top_p=1.5"), ["top_p=1.5"]),
        (("--prompt=x", "--top_k=-1"), ["top_k=-1"]),
        (("--prompt=x", "--logit_bias=9"), ["--logit_bias=9", "ID=NUMBER"]),
        (("--prompt=x", "--logit_bias=9999=1"), ["logit_bias of id 9999", "0 to 256"]),
        (("--prompt=x", "--stop_id=257"), ["stop id 257"]),
        (("--prompt=x", "--stop="), ["stop strings"]),
        (("--prompt=x", "--max_new_tokens=0"), ["max_new_tokens=0"]),
        (("--prompt=x", "--num_samples=0"), ["num_samples=0"]),
        (("--prompt=x", "--seed=-3"), ["seed=-3"]),
        (("--prompt=x", "--beyond_context=wrap"), ["'wrap'", "stop, slide"]),
        (("--prompt=x", "--dtype=int8"), ["dtype=int8", "bfloat16"]),
        (("--prompt=x", "--batch_size=0"), ["batch_size=0"]),
        (("--prompt=x", "--chunk=0"), ["chunk=0"]),
        (("--prompt=x", "--alternatives=-1"), ["alternatives=-1"]),
        (("--prompt=0123456789abcdefg",), ["the prompt has 17 tokens", "allowed: 16"]),
        (("--prompt_ids=1,257",), ["prompt id 257", "0 to 256"]),
        (("--prompt_ids=1,x",), ["--prompt_ids=1,x"]),
        (("--prompt=\udcff",), ["--prompt", "not UTF-8"]),
        (("--prompt=x", "--stop=\udcff"), ["--stop", "not UTF-8"]),
        (("--prompts=nowhere.txt",), ["--prompts=nowhere.txt", "No such file"]),
        (("--prompts=.",), ["--prompts=.", "Is a directory"]),
        (("--prompt=x", "--prompts=y"), ["--prompt and --prompts given"]),
        ((), ["none of them given"]),
        (("--interactive", "--score"), ["--interactive and --score"]),
        (("--prompt=x", "--step=7"), ["no checkpoint of step 7"]),
    ],
)
def test_bad_input(model: pathlib.Path, flags: tuple[str, ...], fragments: list[str]) -> None:
    done = here("--model", model, *flags)
    if "--step=7" in flags:  # what is saved is data
        assert done.code == 3
        done = Finished(2, done.out, done.err)
    refused(done, *fragments)


def test_files_that_are_not_utf8(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused(here("--model", model, "--prompts", tmp_path / "latin.txt"), "latin.txt", "byte 3 is not UTF-8")
    refused(here("--model", model, "--prompts=-", stdin=b"\xff"), "standard input", "byte 0 is not UTF-8")
    refused(here("--model", model, "--prompts=-", stdin=b""), "standard input", "no prompts")


def test_models_that_are_not_there(tmp_path: pathlib.Path) -> None:
    refused(here("--model", tmp_path / "nowhere", "--prompt=x"), "nowhere", "no such folder")
    done = here("--model", tmp_path, "--prompt=x")
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "not a run folder" in done.err


def test_an_empty_prompt_without_end_of_text(base: pathlib.Path) -> None:
    folder = base / "chars"
    settings = {"tokenizer.name": "chars", "train.steps": 10, "checkpoint.every": 10, "optimizer.warmup_steps": 1}
    assert workshop(base).run(folder, settings, quick=True).code == 0
    refused(here("--model", folder, "--prompt="), "the prompt is empty", "chars")
    done = here("--model", folder, "--prompt=1", "--max_new_tokens=5")
    assert (done.code, len(done.out)) == (0, 7)


def test_the_reader_goes_away(base: pathlib.Path, model: pathlib.Path) -> None:
    with start(base, "--model", model, *ENDLESS) as process:
        assert process.stdout.read(20)
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_killed_while_it_writes(base: pathlib.Path, model: pathlib.Path, sent: signal.Signals, code: int) -> None:
    with start(base, "--model", model, *ENDLESS) as process:
        assert process.stdout.read(20)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, b"")
    assert b"Traceback" not in out


def test_text_is_utf8_whatever_the_locale(base: pathlib.Path, model: pathlib.Path) -> None:
    flags = ("--model", model, "--prompt=né", "--max_new_tokens=1")
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    out, err = start(base, *flags, env=environment).communicate(timeout=60)
    assert out.decode("utf-8").startswith("né")
    assert err == b""


def test_a_conversation_through_a_pipe(base: pathlib.Path, model: pathlib.Path) -> None:
    talk = start(base, "--model", model, "--interactive", "--max_new_tokens=3", GREEDY)
    out, err = talk.communicate(b"12\n0123456789abcdefghijk\n\n7\n", timeout=60)
    stopping, sampling = gpt2_jax.Stopping(max_new_tokens=3), gpt2_jax.Sampling(temperature=0)
    twelve, empty, seven = expected(model, ["12", "", "7"], stopping=stopping, sampling=sampling)
    assert out.decode() == f"12{twelve.text}\n{empty.text}\n7{seven.text}\n"
    assert talk.returncode == 0
    assert err.decode().splitlines() == [
        "gpt2-jax: error: the prompt has 21 tokens; allowed: 16, by the model's context; shorten it",
        "gpt2-jax: the prompt is empty: the text starts from end-of-text",
    ]


@pytest.fixture
def terminal(base: pathlib.Path, model: pathlib.Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """An endless conversation on a terminal."""
    ours, theirs = pty.openpty()
    process = start(
        *(base, "--model", model, "--interactive", *ENDLESS[:3]),
        **{"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True},
    )
    os.close(theirs)
    yield process, ours
    process.kill()
    process.wait()
    os.close(ours)


def read_until(terminal: int, awaited: bytes, seconds: float = 60) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while awaited not in seen:
        assert time.monotonic() < end, seen
        seen += os.read(terminal, 1000)
    return seen


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_conversation(terminal: tuple[subprocess.Popen, int]) -> None:
    process, screen = terminal
    read_until(screen, b"> ")
    os.write(screen, b"12\n")
    while len(read_until(screen, b"1")) < 20:
        pass
    process.send_signal(signal.SIGINT)
    read_until(screen, b"> ")
    os.write(screen, b"0123456789abcdefghijk\n")
    assert b"allowed: 16" in read_until(screen, b"\n> ")
    os.write(screen, b"\x04")
    assert process.wait(60) == 0


def test_the_run_folder_is_not_changed(model: pathlib.Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in model.rglob("*")}
    here("--model", model, "--prompt=1", "--max_new_tokens=2")
    assert {file: file.stat().st_mtime_ns for file in model.rglob("*")} == before
