"""A run that goes on with other settings, data or tokenizer: refused, or allowed by name and recorded; by train.py."""

import json
import pathlib
import shutil
from typing import Any

import pytest
from tiny_run import Finished, Workshop, contents, finish, workshop

from gpt2_jax.run.metrics import read_reports
from gpt2_jax.run.rendezvous import free_address
from gpt2_jax.run.run_folder import read_config

FEW = {
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 1,
    "train.steps": 4,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.sample_every": 0,
    "checkpoint.every": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return workshop(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def four_steps(tiny: Workshop) -> pathlib.Path:
    folder = tiny.folder / "four_steps"
    done = tiny.run(folder, FEW, quick=True)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def run(four_steps: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(four_steps, tmp_path / "run")


def changes(run: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads((run / "run.json").read_text()).get("changes", [])


def goes_on(tiny: Workshop, run: pathlib.Path, settings: dict[str, Any], *flags: str) -> str:
    """Trains with the real command; what it said."""
    done = tiny.run(run, {**FEW, **settings}, *flags, quick=True)
    assert done.code == 0, done.err
    return done.err


def refused(tiny: Workshop, run: pathlib.Path, settings: dict[str, Any], code: int, *said: str, flags: Any = ()) -> str:
    """Looks that nothing in the run folder has changed; the error."""
    before = contents(run)
    failed = tiny.run_here(run, {**FEW, **settings}, *flags)
    failed.says(code, *said)
    after = contents(run)
    assert {name: after[name] for name in before} == before
    return failed.err


def fingerprint(run: pathlib.Path) -> str:
    return json.loads((run / "run.json").read_text())["data"]["fingerprint"]


@pytest.mark.faults
def test_settings_are_allowed_by_the_flag_that_the_error_names_and_recorded(tiny: Workshop, run: pathlib.Path) -> None:
    other = {"optimizer.learning_rate": 0.5, "seed": 7, "train.steps": 6}
    error = refused(tiny, run, other, 2, "optimizer.learning_rate 0.01 -> 0.5", "seed 0 -> 7")
    flag = error.split()[-1]
    assert flag == "--allow_change=optimizer.learning_rate,seed"
    said = goes_on(tiny, run, other, flag, "--allow_change=train.batch_size")
    assert "changed   optimizer.learning_rate 0.01 -> 0.5, seed 0 -> 7" in said
    recorded = [
        {"step": 4, "key": "optimizer.learning_rate", "before": 0.01, "after": 0.5},
        {"step": 4, "key": "seed", "before": 0, "after": 7},
    ]
    assert changes(run) == recorded
    reports = [report for report in read_reports(run / "metrics.jsonl") if "learning_rate" in report]
    assert [round(report["learning_rate"], 6) for report in reports] == [0.01] * 4 + [0.5] * 2

    # The flag is needed once; what was recorded stays, and a further change comes after it.
    said = goes_on(tiny, run, {**other, "train.steps": 7})
    assert "changed   " not in said
    assert changes(run) == recorded
    goes_on(tiny, run, {**other, "train.steps": 8, "optimizer.b1": 0.8}, "--allow_change=optimizer.b1")
    assert changes(run) == [*recorded, {"step": 7, "key": "optimizer.b1", "before": 0.9, "after": 0.8}]
    assert read_config(run).optimizer.b1 == 0.8


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model.n_layer": 3}, "model.n_layer 2 -> 3 (it decides the shapes"),
        ({"model.n_head": 4}, "model.n_head 2 -> 4 (the saved weights would compute something else"),
        ({"optimizer.ema_decay": 0}, "optimizer.ema_decay 0.9 -> 0.0 (the saves hold a moving average"),
        ({"model.dtype": "float16"}, "model.dtype 'float32' -> 'float16' (the saves hold a loss scale"),
    ],
    ids=["n_layer", "n_head", "ema", "float16"],
)
def test_what_the_saves_cannot_take_is_refused_whatever_is_allowed(
    tiny: Workshop, run: pathlib.Path, settings: dict[str, Any], reason: str
) -> None:
    (key,) = settings
    refused(tiny, run, settings, 2, reason, "another --workdir", flags=[f"--allow_change={key}"])


def test_a_name_that_is_none(tiny: Workshop, run: pathlib.Path) -> None:
    flags = ["--allow_change=learning_rate"]
    refused(tiny, run, {}, 2, "--allow_change=learning_rate", "did you mean optimizer.learning_rate?", flags=flags)


@pytest.mark.faults
def test_other_data_are_allowed_by_name_and_a_run_that_saved_nothing_since_still_goes_on(
    tiny: Workshop, run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("quite another text, as long as it has to be. " * 100)
    other = {"data.source": f"text:{text}"}
    before = fingerprint(run)
    error = refused(tiny, run, other, 2, f"data {before[:12]}", "bring the old data back", "another --workdir")
    assert error.split()[-1] == "--allow_change=data"

    # What is refused for another reason is not recorded either.
    refused(tiny, run, {**other, "seed": 3}, 2, "add --allow_change=seed", flags=["--allow_change=data"])
    assert changes(run) == []

    # All four steps are done: this saves nothing, and the newest save still carries the old fingerprint.
    said = goes_on(tiny, run, other, "--allow_change=data")
    after = fingerprint(run)
    assert after != before
    assert f"changed   data '{before[:12]}' -> '{after[:12]}'" in said
    recorded = [{"step": 4, "key": "data", "before": before, "after": after}]
    assert changes(run) == recorded
    goes_on(tiny, run, {**other, "train.steps": 6})
    assert changes(run) == recorded

    # The old data are another change by now.
    refused(tiny, run, {"train.steps": 6}, 2, f"data {after[:12]}", "--allow_change=data")


@pytest.mark.faults
def test_a_save_of_data_that_nobody_allowed_is_refused(
    tiny: Workshop, run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("quite another text, as long as it has to be. " * 100)
    other = {"data.source": f"text:{text}"}
    goes_on(tiny, run, other, "--allow_change=data")
    about = json.loads((run / "run.json").read_text())
    before = about.pop("changes")[0]["before"]
    (run / "run.json").write_text(json.dumps(about))
    refused(tiny, run, {**other, "train.steps": 6}, 3, "step 4 was saved with data_fingerprint", before[:12])


@pytest.mark.faults
def test_a_text_that_was_rewritten_is_read_anew_where_data_is_allowed(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the first text, as long as it has to be. " * 100)
    settings, run = {"data.source": f"text:{text}"}, tmp_path / "run"
    goes_on(tiny, run, settings)
    first = fingerprint(run)
    text.write_text("the second text, as long as it has to be, too. " * 100)
    # Its own store is there still, and nobody asked for another.
    goes_on(tiny, run, settings)
    assert (fingerprint(run), changes(run)) == (first, [])
    goes_on(tiny, run, settings, "--allow_change=data")
    assert fingerprint(run) != first
    assert [change["key"] for change in changes(run)] == ["data"]


def test_another_tokenizer_is_allowed_by_name_if_the_token_table_has_room(tiny: Workshop, run: pathlib.Path) -> None:
    needed = "--allow_change=tokenizer.name,tokenizer,data"
    error = refused(tiny, run, {"tokenizer.name": "chars"}, 2, "tokenizer.name 'bytes' -> 'chars'")
    assert error.split()[-1] == needed
    names = needed.removeprefix("--allow_change=").split(",")
    for missing in names:
        flags = ["--allow_change=" + ",".join(name for name in names if name != missing)]
        assert refused(tiny, run, {"tokenizer.name": "chars"}, 2, flags=flags).split()[-1].endswith(f"={missing}")
    more = {"tokenizer.name": "bpe:20"}
    refused(tiny, run, more, 2, "model.vocab_size=257 is less than the 277 ids", flags=[needed])

    goes_on(tiny, run, {"tokenizer.name": "chars", "train.steps": 6}, needed)
    assert [change["key"] for change in changes(run)] == ["tokenizer.name", "data", "tokenizer"]
    assert json.loads((run / "tokenizer" / "gpt2_jax_tokenizer.json").read_text())["name"] == "chars"
    assert read_config(run).model.vocab_size == 257


@pytest.mark.faults
def test_a_learned_tokenizer_can_be_kept_for_another_text(tiny: Workshop, tmp_path: pathlib.Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text, words in zip(texts, ("red green blue ", "one two three four "), strict=True):
        text.write_text(words * 400)
    first, second = ({"data.source": f"text:{text}", "tokenizer.name": "bpe:9"} for text in texts)
    run = tmp_path / "run"
    goes_on(tiny, run, first)
    error = refused(tiny, run, second, 2, "on data", "and tokenizer")
    assert error.split()[-1] == "--allow_change=data,tokenizer"
    kept = next(word for word in error.split() if word.startswith("--config.tokenizer.path="))
    goes_on(tiny, run, {**second, "train.steps": 6}, "--allow_change=data", kept)
    assert [change["key"] for change in changes(run)] == ["data"]


def two_hosts(tiny: Workshop, run: pathlib.Path, settings: dict[str, Any], *flags: list[str]) -> list[Finished]:
    """As many processes of one run as lists of flags, done."""
    place = (f"--coordinator_address={free_address()}", f"--num_processes={len(flags)}", "--heartbeat_timeout=20")
    processes = [
        tiny.start(run, {**FEW, **settings}, *place, f"--process_id={index}", *own, quick=True)
        for index, own in enumerate(flags)
    ]
    return [finish(process) for process in processes]


@pytest.mark.faults
def test_two_hosts_allow_the_same(tiny: Workshop, run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("quite another text, as long as it has to be. " * 100)
    settings = {"data.source": f"text:{text}", "seed": 2, "train.steps": 6}
    allow = "--allow_change=data,seed"
    for done in two_hosts(tiny, run, settings, [allow], []):
        assert done.code == 2, done.err
        assert "has --allow_change nothing, host 0" in done.err
    assert changes(run) == []
    for done in two_hosts(tiny, run, settings, [allow], ["--allow_change=seed", "--allow_change=data"]):
        assert done.code == 0, done.err
    assert [(change["step"], change["key"]) for change in changes(run)] == [(4, "seed"), (4, "data")]
