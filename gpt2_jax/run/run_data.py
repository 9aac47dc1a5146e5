"""The data of a run: found or prepared, checked against what the run began with, and cut into batches."""

import dataclasses
import pathlib

import jax

from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import EvaluationBatches, TrainBatches
from gpt2_jax.data.prepare import ensure_prepared
from gpt2_jax.data.token_store import TokenStore, open_token_store
from gpt2_jax.data.windows import PackedWindows, PaddedWindows
from gpt2_jax.errors import DataError, UsageError
from gpt2_jax.run.run_folder import holds_run, read_data


def open_data(config: RunConfig, folder: pathlib.Path) -> TokenStore:
    """The token store that the run in `folder` began with, if it is still there; else the configured one.

    Raises:
      DataError: the data is damaged, or no longer what the run began with.
    """
    known = read_data(folder) if holds_run(folder) else None
    if known is not None and (pathlib.Path(known["folder"]) / "manifest.json").is_file():
        store = open_token_store(pathlib.Path(known["folder"]))
        if store.fingerprint == known["fingerprint"]:
            return store
    store = ensure_prepared(
        source=config.data.source,
        text_field=config.data.text_field,
        tokenizer_name=config.tokenizer.name,
        tokenizer_path=config.tokenizer.path,
        normalization=config.tokenizer.normalization,
        lowercase=config.tokenizer.lowercase,
        held_out=config.data.held_out,
        cache_dir=pathlib.Path(config.data.cache_dir).expanduser(),
    )
    _check_tokenizer(config, store)
    if known is not None and store.fingerprint != known["fingerprint"]:
        raise DataError(
            f"{folder} was trained on data {known['fingerprint'][:12]}, {config.data.source} now gives "
            f"{store.fingerprint[:12]}: bring the old data back, or use another --workdir"
        )
    return store


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """The config with `model.vocab_size` filled in. Raises UsageError when the configured one is too small."""
    chosen = config.model.vocab_size
    if chosen and chosen < vocab_size:
        raise UsageError(
            f"model.vocab_size={chosen} is less than the {vocab_size} ids of tokenizer.name={config.tokenizer.name}; "
            f"allowed: {vocab_size} or more, or 0 for as many as the tokenizer has"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=chosen or vocab_size))


def cut_batches(config: RunConfig, store: TokenStore) -> tuple[TrainBatches, EvaluationBatches]:
    """This host's rows of the training batches, and of the evaluation batches (as large as a microbatch)."""
    train, length = config.train, config.context_length
    train_stream, held_out_stream = store.split("train"), store.split("held_out")
    train_windows: PackedWindows | PaddedWindows
    held_out_windows: PackedWindows | PaddedWindows
    if config.data.windows == "packed":
        train_windows = PackedWindows(train_stream, length)
        held_out_windows = PackedWindows(held_out_stream, length, include_tail=True)
    else:
        end_of_text = store.tokenizer.end_of_text
        if end_of_text is None:
            raise UsageError(
                f"data.windows=padded pads with end-of-text, which tokenizer.name={store.tokenizer.name} has not; "
                "use data.windows=packed"
            )
        train_windows = PaddedWindows(train_stream, length, end_of_text)
        held_out_windows = PaddedWindows(held_out_stream, length, end_of_text)
    microbatch = train.batch_size // train.microbatches
    return (
        TrainBatches(
            train_windows,
            batch_size=train.batch_size,
            seed=config.seed,
            context_lengths=train.context_lengths,
            rows=_own_rows(train.batch_size),
        ),
        EvaluationBatches(held_out_windows, microbatch, max_windows=train.eval_windows, rows=_own_rows(microbatch)),
    )


def _check_tokenizer(config: RunConfig, store: TokenStore) -> None:
    """A store that was prepared apart must have been made with the tokenizer that the config names."""
    for key in ("name", "normalization", "lowercase"):
        wanted, found = getattr(config.tokenizer, key), getattr(store.tokenizer, key)
        if wanted != found:
            raise DataError(
                f"{store.folder} was made with tokenizer.{key}={found}, the config has tokenizer.{key}={wanted}; "
                f"give --config.tokenizer.{key}={found}, or prepare the text again"
            )


def _own_rows(batch_size: int) -> slice:
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
