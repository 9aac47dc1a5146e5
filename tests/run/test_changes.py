"""Which settings a resumed run may change: freely, where they are allowed by name, or never."""

import dataclasses
from typing import Any

import jax
import pytest

from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import fields_by_key, run_config, values_by_key
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.run.changes import Change, allowed_names, check_changes
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.train_state import init_state

# Another value for every key, such that the whole stays valid.
OTHER = {
    "model": {
        **{"n_layer": 3, "n_head": 6, "n_embd": 144, "n_positions": 2048, "vocab_size": 999, "embd_pdrop": 0.2},
        **{"attn_pdrop": 0.2, "resid_pdrop": 0.2, "layer_norm_epsilon": 1e-6, "initializer_range": 0.03},
        **{"dtype": "bfloat16", "remat": "full", "scan_unroll": 2, "activation": "gelu_erf", "bias": False},
        "attention": "xla",
    },
    "tokenizer": {"name": "bytes", "path": "/merges", "normalization": "nfc", "lowercase": True},
    "data": {"source": "text:x", "text_field": "body", "held_out": 0.2, "windows": "padded", "cache_dir": "/tokens"},
    "optimizer": {
        **{"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 7, "decay_steps": 5, "end_fraction": 0.5},
        **{"b1": 0.8, "b2": 0.8, "eps": 1e-6, "weight_decay": 0.2, "clip_norm": 2.0, "ema_decay": 0.5},
        **{"name": "muon", "mu_dtype": "bfloat16"},
    },
    "train": {
        **{"steps": 2000, "batch_size": 64, "context_length": 512, "context_lengths": [256], "microbatches": 2},
        **{"loss_chunk": 128, "log_every": 3, "eval_every": 3, "eval_windows": 3, "sample_every": 3},
        **{"max_skipped_steps": 3, "spike_sigmas": 3.0},
    },
    "checkpoint": {"every": 3, "keep_last": 3, "keep_best": 3, "export_best": False},
    "mesh": {"data": 2, "fsdp": -1, "tensor": 2, "dcn_data": 2},
    "seed": 5,
    "init_from": "/run",
}
WITH = {  # what else a value needs
    "tokenizer.normalization": {"tokenizer": {"name": "bytes"}},
    "tokenizer.lowercase": {"tokenizer": {"name": "bytes"}},
    "optimizer.decay_steps": {"optimizer": {"schedule": "wsd"}},
    "mesh.fsdp": {"mesh": {"data": 1}},
}
STORED = {**WITH, "optimizer.decay_steps": {"optimizer": {"schedule": "wsd", "decay_steps": 9}}}
FREE = {
    *("train.log_every", "train.eval_every", "train.eval_windows", "train.sample_every", "train.loss_chunk"),
    *("train.max_skipped_steps", "train.spike_sigmas"),
    *("model.remat", "model.scan_unroll", "model.attention"),
    *("data.source", "data.text_field", "data.held_out", "data.cache_dir", "tokenizer.path"),
    *("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_best", "checkpoint.export_best"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.dcn_data"),
}


def changed(key: str) -> RunConfig:
    *path, name = key.split(".")
    values: dict[str, Any] = {section: dict(keys) for section, keys in WITH.get(key, {}).items()}
    source, target = OTHER, values
    for part in path:
        source, target = source[part], target.setdefault(part, {})
    target[name] = source[name]
    return run_config(values)


@pytest.mark.parametrize("key", list(fields_by_key()))
def test_only_what_does_not_change_the_numbers_may_change(key: str) -> None:
    if key in FREE:
        check_changes(RunConfig(), changed(key), (), "RUN")
        return
    with pytest.raises(UsageError) as raised:
        check_changes(RunConfig(), changed(key), (), "RUN")
    message = str(raised.value)
    assert f" {key} " in message
    assert "--workdir=RUN " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("schedule", "allowed"),
    [("constant", True), ("inverse_sqrt", True), ("cosine", False), ("linear", False)],
)
def test_more_steps_where_the_rate_does_not_depend_on_them(schedule: str, allowed: bool) -> None:
    stored = run_config({"optimizer": {"schedule": schedule}})
    longer = dataclasses.replace(stored, train=dataclasses.replace(stored.train, steps=5000))
    if allowed:
        check_changes(stored, longer, (), "RUN")
    else:
        with pytest.raises(UsageError, match="train.steps 1000 -> 5000"):
            check_changes(stored, longer, (), "RUN")


def state_shapes(config: RunConfig) -> Any:
    """What a save holds: structure, shapes and types of the state."""
    small = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 300, remat="none")
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    ema = config.optimizer.ema_decay > 0
    return jax.eval_shape(lambda: init_state(GPT2(small), optimizer, 0, ema=ema))


SAME_SHAPES_OTHER_MEANING = {"model.n_head", "model.activation"}
SWITCHES = [  # keys of which only some values change what is saved
    ("optimizer.ema_decay", {"ema_decay": 0.5}, {"ema_decay": 0.9}, True),
    ("optimizer.ema_decay", {"ema_decay": 0.5}, {"ema_decay": 0.0}, False),
    ("optimizer.ema_decay", {"ema_decay": 0.0}, {"ema_decay": 0.5}, False),
    ("optimizer.clip_norm", {"clip_norm": 1.0}, {"clip_norm": 0.0}, False),
    ("optimizer.clip_norm", {"clip_norm": 0.0}, {"clip_norm": 1.0}, False),
    ("optimizer.clip_norm", {"clip_norm": 1.0}, {"clip_norm": 0.5}, True),
    ("model.dtype", {"dtype": "float32"}, {"dtype": "bfloat16"}, True),
    ("model.dtype", {"dtype": "float32"}, {"dtype": "float16"}, False),
    ("model.dtype", {"dtype": "float16"}, {"dtype": "bfloat16"}, False),
]


def allowable(key: str, stored: RunConfig, wanted: RunConfig) -> bool:
    """Whether the flag helps; looks that the message says so, or why not."""
    change = Change(key, values_by_key(stored)[key], values_by_key(wanted)[key])
    others = sorted({*fields_by_key(), "data", "tokenizer"} - {key})
    with pytest.raises(UsageError) as raised:
        check_changes(stored, wanted, others, "RUN")
    message = str(raised.value)
    assert str(change) in message
    if "no flag lets it change" in message:
        with pytest.raises(UsageError, match="no flag lets it change"):
            check_changes(stored, wanted, [key], "RUN")
        return False
    assert message.endswith(f"add --allow_change={key}")
    assert change in check_changes(stored, wanted, list(fields_by_key()), "RUN")
    return True


@pytest.mark.parametrize("key", sorted(set(fields_by_key()) - FREE))
def test_what_a_save_cannot_hold_is_never_allowed_and_the_rest_is_by_name(key: str) -> None:
    stored, wanted = run_config(STORED.get(key, {})), changed(key)
    assert allowable(key, stored, wanted) == (
        state_shapes(stored) == state_shapes(wanted) and key not in SAME_SHAPES_OTHER_MEANING
    )


@pytest.mark.parametrize(("key", "before", "after", "can_be"), SWITCHES)
def test_switches_of_the_state(key: str, before: dict[str, Any], after: dict[str, Any], can_be: bool) -> None:
    section = key.split(".")[0]
    stored, wanted = run_config({section: before}), run_config({section: after})
    assert (state_shapes(stored) == state_shapes(wanted)) == can_be
    assert allowable(key, stored, wanted) == can_be


def test_the_message_names_all_that_is_needed_and_no_more() -> None:
    stored = run_config({"tokenizer": {"name": "bytes"}})
    wanted = run_config({"tokenizer": {"name": "chars"}, "seed": 1, "train": {"batch_size": 64, "log_every": 3}})
    with pytest.raises(UsageError) as raised:
        check_changes(stored, wanted, ["seed", "optimizer.b1"], "RUN")
    flag = str(raised.value).rpartition("--allow_change=")[2]
    assert set(flag.split(",")) == {"tokenizer.name", "train.batch_size", "tokenizer", "data"}
    changes = check_changes(stored, wanted, allowed_names(["seed", flag]), "RUN")
    assert changes == [
        Change("tokenizer.name", "bytes", "chars"),
        Change("train.batch_size", 32, 64),
        Change("seed", 0, 1),
    ]


def test_what_is_allowed_and_has_not_changed_is_no_change() -> None:
    assert check_changes(RunConfig(), RunConfig(), ["seed", "model.n_layer", "data"], "RUN") == []


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("dta", "data"),
        ("tokeniser", "tokenizer"),
        ("model", "model."),
        ("seed,,data", "--allow_change=:"),
        ("zzzzzz", "--print_config"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(UsageError) as raised:
        allowed_names([text])
    assert str(raised.value).startswith("--allow_change=")
    assert near in str(raised.value)


def test_names_come_repeated_or_with_commas() -> None:
    assert allowed_names(["seed,data", "optimizer.b1", " tokenizer "]) == {"seed", "data", "optimizer.b1", "tokenizer"}
    assert allowed_names([]) == frozenset()
