"""`gpt2-jax plan` as a command: its text, JSON and picture, and its refusals."""

import importlib.util
import json
import pathlib
from collections.abc import Iterator

import pytest
from tiny_run import kept_settings

from gpt2_jax.cli.main import main
from gpt2_jax.planning.prices import PRICES

CONFIG = """
from gpt2_jax.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt2_jax.config_file import config_dict


def get_config():
    model = ModelConfig(n_layer=2, n_head=4, n_embd=128, n_positions=128, dtype="bfloat16")
    train = TrainConfig(steps=100, batch_size=64)
    return config_dict(RunConfig(model=model, optimizer=OptimizerConfig(warmup_steps=1), train=train))
"""


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with kept_settings():
        yield


@pytest.fixture
def config(tmp_path: pathlib.Path) -> str:
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return f"--config={file}"


def test_estimates_as_text_json_and_picture(
    config: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("v5e = 2.0\nh100 = 3\n")
    picture, file = tmp_path / "plan.png", tmp_path / "plan.json"
    flags = ["--analytic", "--topology=v5e:4x4,h100:8", f"--prices={prices}", f"--picture={picture}", f"--json={file}"]
    assert main(["plan", config, "--config.mesh.fsdp", "2", *flags]) == 0
    text = capsys.readouterr().out
    assert text.count("estimate, not compiled") == 2
    assert "mesh          data 8 x fsdp 2 x tensor 1" in text
    assert "MFU" in text and "(16 chips at 2 an hour)" in text
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first, second = json.loads(file.read_text())["plans"]
    assert first["source"] == "estimate" and first["config"]["model"]["vocab_size"] == 50257
    assert first["dollars"] == pytest.approx(first["hours"] * 16 * 2.0)
    assert second["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert sorted(tmp_path.iterdir()) == sorted([picture, file, prices, tmp_path / "tiny.py"])


def test_prices_can_be_edited(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], config: str) -> None:
    assert main(["plan", "--print_prices"]) == 0
    table = capsys.readouterr().out
    file = tmp_path / "prices.toml"
    file.write_text(table.replace(f"v5e = {PRICES['v5e']:.2f}", "v5e = 7.5"))
    assert main(["plan", config, "--analytic", "--topology=v5e:2x2", "--json=-", f"--prices={file}"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["dollars_per_chip_hour"] == 7.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v9:4x4"], "unknown chip 'v9'"),
        (["--topology=v5e:5x4"], "v5e:6x4"),
        (["--topology=v5e:4x4", "--config.mesh.fsdp=3"], "make 3 devices of 16"),
        (["--topology=v5e:4x4", "--config.train.batch_size=40"], "the nearest that can: 32 or 48"),
        (["--topology=v5e:4x4", "--config.tokenizer.name=chars"], "--config.model.vocab_size=NUMBER"),
        (["--topology=v5e:4x4", "--config.model.layers=3"], "unknown config key model.layers"),
        (["--topology=v5e:4x4", "--pictures=x.png"], "did you mean --picture?"),
        (["--topology=v5e:4x4", "--picture=no/such/place.png"], "no such folder"),
        (["--topology=v5e:4x4", "--picture=plan.jpg"], "ends in .png"),
        (["--topology=v5e:4x4", "--prices=none.toml"], "No such file"),
        ([], "--topology is needed"),
    ],
)
def test_refusals_are_one_line(config: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--analytic", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_without_libtpu_it_says_so(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert main(["plan", config, "--topology=v5e:4x4"]) == 2
    assert "pip install 'gpt2-jax[tpu]'" in capsys.readouterr().err
    assert main(["plan", config, "--topology=h100:8"]) == 0  # which is only estimated anyway


def test_search_without_a_compiler(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--analytic", "--search", "--topology=h100:8", "--json=-"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert len(plans) == 3
    steps = [plan["roofline_seconds"]["step"] for plan in plans]
    assert steps == pytest.approx(sorted(steps), rel=0.05)
