"""The data of a run: found or prepared, checked against what the run began with, and cut into batches."""

import dataclasses
import pathlib
from collections.abc import Collection, Sequence

from jax.sharding import Mesh

from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import values_by_key
from gpt2_jax.data.batches import EvaluationBatches, TrainBatches
from gpt2_jax.data.prepare import ensure_prepared
from gpt2_jax.data.skipped import Skip
from gpt2_jax.data.token_store import MANIFEST, TokenStore, open_token_store
from gpt2_jax.data.windows import PackedWindows, PaddedWindows
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.exchange.huggingface import is_huggingface
from gpt2_jax.remote_folder import address_of, is_remote
from gpt2_jax.run.changes import DATA, TOKENIZER, Change
from gpt2_jax.run.load import load_settings
from gpt2_jax.run.run_folder import folder_to_read, holds_run, read_config, read_data
from gpt2_jax.sharding import own_rows
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer
from gpt2_jax.user_paths import cache_folder

_MODEL_KEYS = (
    *("model.n_layer", "model.n_head", "model.n_embd", "model.n_positions", "model.vocab_size"),
    *("model.activation", "model.bias", "model.layer_norm_epsilon"),
)
_TOKENIZER_KEYS = ("tokenizer.name", "tokenizer.normalization", "tokenizer.lowercase")


def open_data(config: RunConfig, folder: pathlib.Path, allowed: Collection[str] = ()) -> TokenStore:
    """The token store of the run in `folder`, prepared if need be, with every shard's hash checked.

    While the settings of the data are those that the run began with, its own store is opened, whatever has become of
    the text; else the configured one, which must have the same content. Where `allowed` has `changes.DATA` it is the
    configured one in any case, with whatever content; its tokenizer must be the run's without `changes.TOKENIZER`.

    Raises:
      UsageError: the source or tokenizer cannot be used.
      DataError: the data is damaged, or no longer what the run began with.
    """
    if not holds_run(folder):
        return _verified(_configured_store(config))
    known, stored = read_data(folder), read_config(folder)
    same_ids = all(values_by_key(stored)[key] == values_by_key(config)[key] for key in _TOKENIZER_KEYS)
    same_data = dataclasses.replace(stored.data, cache_dir="") == dataclasses.replace(config.data, cache_dir="")
    same_settings = same_ids and same_data
    own = same_settings and DATA not in allowed and not _copied(config)
    if own and (pathlib.Path(known["folder"]) / MANIFEST).is_file():
        store = open_token_store(known["folder"])
    else:
        store = _configured_store(config)
    changes = data_changes(folder, store)
    missing = [change.key for change in changes if change.key not in allowed]
    if missing:
        kept = f"--config.tokenizer.path={address_of(folder)}/tokenizer keeps the run's tokenizer; " if same_ids else ""
        found = (
            f"{address_of(folder)} was trained on {' and '.join(f'{c.key} {c.before[:12]}' for c in changes)}, "
            f"{config.data.source} now gives {' and '.join(c.after[:12] for c in changes)}: bring the old data back, "
            f"or use another --workdir; {kept if TOKENIZER in missing else ''}to go on with what is there now, add "
            f"--allow_change={','.join(missing)}"
        )
        raise DataError(found) if same_settings else UsageError(found)
    return _verified(store)


def data_changes(folder: pathlib.Path, store: TokenStore) -> list[Change]:
    """How data and tokenizer differ from those of the run in `folder`. Raises DataError where it is damaged."""
    before, after = read_data(folder)["fingerprint"], store.fingerprint
    if before == after:
        return []
    tokenizer = load_tokenizer(folder / "tokenizer").fingerprint
    changes = [Change(DATA, before, after), Change(TOKENIZER, tokenizer, store.tokenizer.fingerprint)]
    return [change for change in changes if change.before != change.after]


def data_of_run(folder: pathlib.Path, place: str = "") -> TokenStore:
    """The token store that the run in `folder` was trained on, with every shard's hash checked; none is prepared.

    Args:
      folder: of the run, whether it has saved a step or not.
      place: where the store is now, a folder or an address at gs://; empty: where the run found it.

    Raises:
      UsageError: nothing is at `place`.
      DataError: `folder` holds no run, or its data is not there, damaged, or not what the run was trained on.
    """
    known, config = read_data(folder), read_config(folder)
    here = (pathlib.Path(known["folder"]) / MANIFEST).is_file()
    if place or (_copied(config) and not here):
        source = f"tokens:{place}" if place else config.data.source
        store = ensure_prepared(source=source, cache_dir=config.data.cache_dir or cache_folder("tokens"))
    elif here:
        store = open_token_store(known["folder"])
    else:
        raise DataError(
            f"{address_of(folder)} was trained on the data in {known['folder']}, which is not there; bring it back, or "
            "name the folder that has it now with --data=DIR"
        )
    if store.fingerprint != known["fingerprint"]:
        raise DataError(
            f"{address_of(folder)} was trained on data {known['fingerprint'][:12]}, but {store.folder} holds "
            f"{store.fingerprint[:12]}; bring the old data back, or name the folder that has it with --data=DIR"
        )
    return _verified(store)


def with_vocabulary_of_source(config: RunConfig) -> RunConfig:
    """The config with `model.vocab_size`, where it is open, from `init_from`. Raises like `open_data`."""
    if not config.init_from or config.model.vocab_size:
        return config
    return with_vocabulary(config, _source_settings(config)[0].model.vocab_size)


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """The config with `model.vocab_size` filled in. Raises UsageError when the configured one is too small."""
    chosen = config.model.vocab_size
    if chosen and chosen < vocab_size:
        raise UsageError(
            f"model.vocab_size={chosen} is less than the {vocab_size} ids of tokenizer.name={config.tokenizer.name}; "
            f"allowed: {vocab_size} or more, or 0 for as many as the tokenizer has"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=chosen or vocab_size))


def cut_batches(
    config: RunConfig, store: TokenStore, mesh: Mesh, skips: Sequence[Skip] = ()
) -> tuple[TrainBatches, EvaluationBatches]:
    """This host's rows of the training batches, and of the evaluation batches (as large as a microbatch).

    `skips` are training batches left out.
    """
    train, stream = config.train, store.split("held_out")
    windows: PackedWindows | PaddedWindows
    if config.data.windows == "packed":
        windows = PackedWindows(stream, config.context_length, include_tail=True)
    else:
        windows = PaddedWindows(stream, config.context_length, store.tokenizer.end_of_text)
    microbatch = train.batch_size // train.microbatches
    return (
        cut_train_batches(config, store, own_rows(mesh, train.batch_size), skips),
        EvaluationBatches(windows, microbatch, max_windows=train.eval_windows, rows=own_rows(mesh, microbatch)),
    )


def cut_train_batches(
    config: RunConfig, store: TokenStore, rows: Sequence[int] | None = None, skips: Sequence[Skip] = ()
) -> TrainBatches:
    """The training batches, without those in `skips`; `rows` are the rows wanted of each, None: all."""
    stream = store.split("train")
    windows: PackedWindows | PaddedWindows
    if config.data.windows == "packed":
        windows = PackedWindows(stream, config.context_length)
    else:
        windows = PaddedWindows(stream, config.context_length, store.tokenizer.end_of_text)
    return TrainBatches(
        windows,
        batch_size=config.train.batch_size,
        seed=config.seed,
        context_lengths=config.train.context_lengths,
        rows=rows,
        skips=skips,
    )


def _configured_store(config: RunConfig) -> TokenStore:
    store = ensure_prepared(
        source=config.data.source,
        text_field=config.data.text_field,
        tokenizer_name=config.tokenizer.name,
        tokenizer_path=_tokenizer_path(config),
        normalization=config.tokenizer.normalization,
        lowercase=config.tokenizer.lowercase,
        held_out=config.data.held_out,
        cache_dir=config.data.cache_dir or cache_folder("tokens"),
    )
    for key in _TOKENIZER_KEYS:  # a store that was prepared apart
        wanted, found = values_by_key(config)[key], getattr(store.tokenizer, key.removeprefix("tokenizer."))
        if wanted != found:
            raise DataError(
                f"{store.folder} was made with {key}={found}, the config has {key}={wanted}; "
                f"give --config.{key}={found}, or prepare the text again"
            )
    return store


def _verified(store: TokenStore) -> TokenStore:
    store.verify()
    return store


def _copied(config: RunConfig) -> bool:
    # What is copied from gs:// is checked, and copied anew where it is damaged, by asking for it again.
    return is_remote(config.data.source.removeprefix("tokens:"))


def _tokenizer_path(config: RunConfig) -> str:
    """Where the tokenizer's files are: those of `init_from`, so that its ids mean the same."""
    if not config.init_from:
        return config.tokenizer.path
    source, tokenizer = _source_settings(config)
    check_same_model(config, source)
    if config.tokenizer.name == "bytes" or config.tokenizer.path:
        return config.tokenizer.path
    source_folder = folder_to_read(config.init_from)
    if not is_huggingface(source_folder):
        return str(source_folder / "tokenizer")
    # A Hugging Face folder has its tokenizer in other files; the data wants ours.
    folder = cache_folder("tokenizers") / tokenizer.fingerprint
    tokenizer.save(folder)
    return str(folder)


def _source_settings(config: RunConfig) -> tuple[RunConfig, Tokenizer]:
    if not (folder_to_read(config.init_from) / "config.json").is_file():
        raise UsageError(
            f"init_from={config.init_from}: no model there (no config.json); name a run folder or a Hugging Face one"
        )
    return load_settings(config.init_from)


def check_same_model(config: RunConfig, source: RunConfig) -> None:
    """Raises UsageError when the parameters of `init_from` do not fit the config's model or tokenizer."""
    wanted, found = values_by_key(config), values_by_key(source)
    differ = [key for key in (*_MODEL_KEYS, *_TOKENIZER_KEYS) if wanted[key] != found[key]]
    if wanted["model.vocab_size"] == 0:  # not filled in yet
        differ = [key for key in differ if key != "model.vocab_size"]
    if differ:
        raise UsageError(
            f"{', '.join(f'{key}={wanted[key]}' for key in differ)}, but init_from={config.init_from} has "
            f"{', '.join(str(found[key]) for key in differ)}; give "
            f"{' '.join(f'--config.{key}={found[key]}' for key in differ)}"
        )
