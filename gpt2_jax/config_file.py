"""From config files, flags and JSON to a checked `RunConfig`, and back.

A config file returns `config_dict(RunConfig(...))`, an `ml_collections.ConfigDict`; `load_config` applies the overrides
of the command line to it. Every failure is a `UsageError` of one line with the nearest key. No JAX is imported.
"""

import dataclasses
import difflib
import importlib.util
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from gpt2_jax.config import RunConfig, allowed_values
from gpt2_jax.errors import UsageError


def config_dict(config: RunConfig) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the values of `config`: assigning to an unknown key raises."""
    return ml_collections.ConfigDict(dataclasses.asdict(config)).lock()


def run_config(values: Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """A checked RunConfig from nested values; keys that are absent keep their default.

    Raises:
      UsageError: an unknown key, a wrong type, a value out of range, or keys that contradict each other.
    """
    tree = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else dict(values)
    return _build(RunConfig, tree, "")


def to_json(config: RunConfig) -> str:
    """The resolved config as JSON, as a run folder stores it."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> RunConfig:
    """The inverse of `to_json`. Raises UsageError on anything that is not a config."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"config is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"config is {type(values).__name__}, not a JSON object")
    return run_config(values)


def load_config(path: str, overrides: Mapping[str, str]) -> RunConfig:
    """Runs `get_config()` of the Python file `path`, applies `{"model.n_layer": "4", ...}`, and checks the result.

    An empty path stands for the defaults.
    """
    tree = _values_of_file(path) if path else config_dict(RunConfig()).to_dict()
    for key, text in overrides.items():
        _override(tree, key, text)
    return run_config(tree)


def fields_by_key() -> dict[str, dataclasses.Field]:
    """Every dotted key with its dataclass field, in order."""
    keys: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.type):
            for inner in dataclasses.fields(field.type):
                keys[f"{field.name}.{inner.name}"] = inner
        else:
            keys[field.name] = field
    return keys


def values_by_key(config: RunConfig) -> dict[str, Any]:
    """Every dotted key with its value, in order."""
    tree = dataclasses.asdict(config)
    return {key: _look_up(tree, key) for key in fields_by_key()}


def describe(config: RunConfig) -> str:
    """The resolved config as lines of `key = value  # meaning (what is allowed)`."""
    fields = fields_by_key()
    lines = []
    for key, value in values_by_key(config).items():
        metadata = fields[key].metadata
        allowed = allowed_values(fields[key])
        lines.append(f"{key + ' = ' + _as_text(value):<46} # {metadata['meaning']} ({allowed})")
    return "\n".join(lines)


def _values_of_file(path: str) -> dict[str, Any]:
    file = pathlib.Path(path)
    if not file.is_file():
        beside = sorted(str(p) for p in file.parent.glob("*.py") if p.is_file())
        near = difflib.get_close_matches(path, beside, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there: {', '.join(beside)}" if beside else ""
        raise UsageError(f"--config={path}: no such file{hint}")
    spec = importlib.util.spec_from_file_location(f"gpt2_jax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--config={path} is not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's config file may raise
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UsageError(f"--config={path}: {type(error).__name__}: {first_line}") from error
    if not isinstance(values, ml_collections.ConfigDict):
        raise UsageError(f"--config={path}: get_config() returned {type(values).__name__}, not a ConfigDict")
    return values.to_dict()


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        field = fields.get(name)
        if field is None:
            raise UsageError(_unknown_key(f"{prefix}{name}", value))
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, Mapping):
                raise UsageError(f"{prefix}{name}={value!r}: it is a section, give its keys as {prefix}{name}.KEY")
            value = _build(field.type, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif field.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif field.type == tuple[int, ...] and isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    return cls(**arguments)


def _unknown_key(key: str, value: Any) -> str:
    keys = list(fields_by_key())
    elsewhere = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    near = elsewhere[:1] or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    hint = "see --print_config for all keys"
    if near:
        hint = f"did you mean {near[0]} ({allowed_values(fields_by_key()[near[0]])})?"
    return f"unknown config key {key} (given {value!r}); {hint}"


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    field = fields_by_key().get(key)
    if field is None:
        sections = {name.split(".")[0] for name in fields_by_key() if "." in name}
        if key in sections:
            raise UsageError(f"--config.{key} is a section: give one of its keys, as in --config.{key}.KEY=VALUE")
        raise UsageError(_unknown_key(key, text))
    *path, name = key.split(".")
    node = tree
    for part in path:
        node = node.setdefault(part, {})
    node[name] = _parse(key, text, field)


def _parse(key: str, text: str, field: dataclasses.Field) -> Any:
    try:
        if field.type is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if field.type is int:
            return int(text)
        if field.type is float:
            return float(text)
        if field.type == tuple[int, ...]:
            return tuple(int(item) for item in text.strip("()").split(",") if item.strip())
    except (KeyError, ValueError):
        raise UsageError(f"{key}={text!r}: {field.metadata['meaning']}; allowed: {allowed_values(field)}") from None
    return text


def _look_up(tree: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
