"""The schema, config files and overrides: what is accepted, and how the rest is refused."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from gpt2_jax.cli.train import main
from gpt2_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig, TrainConfig
from gpt2_jax.config_file import (
    config_dict,
    describe,
    fields_by_key,
    from_json,
    load_config,
    run_config,
    to_json,
    values_by_key,
)
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import parameter_count

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))

pytestmark = pytest.mark.smoke


@pytest.fixture
def config_file(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "tiny.py"
    file.write_text(
        "from gpt2_jax.config import RunConfig\n"
        "from gpt2_jax.config_file import config_dict\n"
        "def get_config():\n"
        "    return config_dict(RunConfig())\n"
    )
    return file


def test_surface_is_small_and_documented() -> None:
    fields = fields_by_key()
    assert len(fields) <= 60
    for key, field in fields.items():
        assert field.metadata["meaning"], key


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_preset_loads_and_says_its_command(file: pathlib.Path) -> None:
    config = load_config(str(file), {})
    docstring = file.read_text().split('"""')[1]
    assert f"python train.py --config=configs/{file.name}" in docstring
    tokens = config.train.batch_size * config.context_length
    assert f"{tokens:,} tokens per step" in docstring, f"the docstring should say {tokens:,} tokens per step"


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2_124m", 124_439_808),
        ("gpt2_355m", 354_823_168),
        ("gpt2_774m", 774_030_080),
        ("gpt2_1558m", 1_557_611_200),
        ("distilgpt2", 81_912_576),
    ],
)
def test_presets_have_the_published_parameter_counts(preset: str, parameters: int) -> None:
    (file,) = (file for file in CONFIGS if file.stem == preset)
    assert parameter_count(load_config(str(file), {}).model) == parameters


@pytest.mark.parametrize(
    ("key", "text", "fragments"),
    [
        ("model.n_layr", "3", ["unknown config key model.n_layr", "model.n_layer"]),
        ("optimizer.n_layer", "3", ["unknown config key optimizer.n_layer", "model.n_layer"]),
        ("steps", "3", ["unknown config key steps", "train.steps"]),
        ("model", "3", ["is a section"]),
        ("model.n_layer", "three", ["model.n_layer='three'", "integer from 1"]),
        ("model.n_layer", "2.5", ["model.n_layer='2.5'", "integer from 1"]),
        ("model.n_layer", "0", ["model.n_layer=0", "integer from 1"]),
        ("model.attn_pdrop", "1.0", ["model.attn_pdrop=1.0", "below 1"]),
        ("model.dtype", "bf16", ["model.dtype='bf16'", "float32, bfloat16, float16", "did you mean bfloat16"]),
        ("model.n_head", "7", ["model.n_embd=768", "model.n_head=7", "6"]),
        ("tokenizer.lowercase", "maybe", ["tokenizer.lowercase='maybe'", "true or false"]),
        ("tokenizer.name", "bpe:50001", ["tokenizer.name='bpe:50001'", "1 to 50000"]),
        ("tokenizer.normalization", "nfc", ["tokenizer.name='gpt2'"]),
        ("optimizer.learning_rate", "nan", ["optimizer.learning_rate=nan", "number from 0"]),
        ("optimizer.learning_rate", "-1", ["optimizer.learning_rate=-1.0", "number from 0"]),
        ("optimizer.schedule", "cosin", ["optimizer.schedule='cosin'", "did you mean cosine"]),
        ("optimizer.schedule", "wsd", ["decay_steps=0", "1 or more"]),
        ("optimizer.decay_steps", "5", ["decay_steps=5", "cosine"]),
        ("optimizer.warmup_steps", "5000", ["optimizer.warmup_steps=5000", "train.steps=1000"]),
        ("train.context_length", "2048", ["train.context_length=2048", "model.n_positions=1024"]),
        ("train.context_lengths", "64,100", ["100 does not divide", "1024", "128"]),
        ("train.context_lengths", "64,x", ["train.context_lengths='64,x'"]),
        ("train.microbatches", "5", ["train.batch_size=32", "train.microbatches=5"]),
        ("train.loss_chunk", "100", ["train.loss_chunk=100", "128"]),
        ("data.windows", "pack", ["data.windows='pack'", "packed"]),
        ("data.source", "txt:a.txt", ["data.source='txt:a.txt'", "text:...", "did you mean text?"]),
        ("data.source", "tokens:", ["data.source='tokens:'"]),
        ("data.held_out", "1", ["data.held_out=1.0", "below 1"]),
        ("mesh.data", "0", ["mesh.data=0"]),
        ("mesh.fsdp", "-1", ["at most one axis"]),
        ("seed", "-1", ["seed=-1", "from 0"]),
    ],
)
def test_bad_override_is_one_line_and_exit_2(
    config_file: pathlib.Path, capsys: pytest.CaptureFixture, key: str, text: str, fragments: list[str]
) -> None:
    assert main([f"--config={config_file}", f"--config.{key}={text}", "--print_config"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for fragment in fragments:
        assert fragment in error


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        ([], "--config"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["--confg=x.py"], "--config"),
        (["--config=CONFIG", "--workdri=x"], "did you mean --workdir"),
        (["--config=CONFIG", "--config.seed"], "has no value"),
        (["--config=CONFIG", "--profile=5:2", "--workdir=/dev/null/x"], "--profile=5:2"),
    ],
)
def test_bad_flag_is_one_line_and_exit_2(
    config_file: pathlib.Path, capsys: pytest.CaptureFixture, argv: list[str], fragment: str
) -> None:
    assert main([word.replace("CONFIG", str(config_file)) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert fragment in error


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("def get_config(): return {}", "returned dict, not a ConfigDict"),
        ("x = 1", "get_config"),
        ("def get_config(): return (", "SyntaxError"),
        (
            "from gpt2_jax.config import RunConfig\nfrom gpt2_jax.config_file import config_dict\n"
            "def get_config():\n    c = config_dict(RunConfig())\n    c.model.n_layr = 3\n    return c",
            "n_layr",
        ),
        (
            "from gpt2_jax.config import RunConfig\nfrom gpt2_jax.config_file import config_dict\n"
            "def get_config():\n    c = config_dict(RunConfig())\n    c.model.n_layer = -3\n    return c",
            "model.n_layer=-3",
        ),
    ],
)
def test_bad_config_file_is_refused(tmp_path: pathlib.Path, body: str, fragment: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(body)
    with pytest.raises(UsageError) as caught:
        load_config(str(file), {})
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_take_their_types(config_file: pathlib.Path) -> None:
    config = load_config(
        str(config_file),
        {
            "model.n_layer": "3",
            "optimizer.learning_rate": "1e-3",
            "tokenizer.lowercase": "true",
            "tokenizer.name": "bytes",
            "train.context_lengths": "64,128",
            "data.source": "text:a=b.txt",
        },
    )
    assert config.model.n_layer == 3
    assert config.optimizer.learning_rate == 1e-3
    assert config.tokenizer == TokenizerConfig(name="bytes", lowercase=True)
    assert config.train.context_lengths == (64, 128)
    assert config.data.source == "text:a=b.txt"


def test_json_round_trip() -> None:
    config = dataclasses.replace(
        RunConfig(), train=TrainConfig(context_lengths=(256, 512)), mesh=MeshConfig(data=2, tensor=2), seed=7
    )
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": {"n_layer": "3"}}', '{"model": 3}', '{"nonsense": 1}'])
def test_damaged_json_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        from_json(text)


def test_config_dict_is_locked_and_complete() -> None:
    values = config_dict(RunConfig())
    with pytest.raises(AttributeError):
        values.model.n_layr = 3
    assert run_config(values) == RunConfig()
    assert set(values_by_key(RunConfig())) == set(fields_by_key())


def test_types_are_checked_without_a_config_file() -> None:
    with pytest.raises(UsageError):
        ModelConfig(n_layer=True)
    with pytest.raises(UsageError):
        ModelConfig(n_layer="3")  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        OptimizerConfig(schedule="inverse_sqrt", warmup_steps=0)


def test_print_config_shows_every_key_and_needs_no_jax(config_file: pathlib.Path) -> None:
    script = (
        "import sys; from gpt2_jax.cli.train import main\n"
        f"code = main(['--config={config_file}', '--config.model.n_layer=3', '--print_config'])\n"
        "print('jax' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr.strip() == "False"
    for key in fields_by_key():
        assert f"{key} = " in result.stdout
    assert "model.n_layer = 3 " in result.stdout
    assert describe(load_config(str(config_file), {"model.n_layer": "3"})) == result.stdout.rstrip("\n")


def test_stored_config_is_plain_json(tmp_path: pathlib.Path) -> None:
    assert json.loads(to_json(RunConfig()))["model"]["n_embd"] == 768
