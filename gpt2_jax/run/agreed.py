"""What the processes of a run settle before anything is built: config, data, what has changed, what is left out."""

import dataclasses
import json
import pathlib
from typing import Any

from jax.sharding import Mesh

from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import from_json, to_json
from gpt2_jax.data.batches import EvaluationBatches, TrainBatches
from gpt2_jax.data.skipped import Skip, skips_from_json, skips_to_json
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.model.gpt2 import padded_vocab_size
from gpt2_jax.remote_folder import address_of
from gpt2_jax.run.changes import DATA, TOKENIZER, Change, check_changes
from gpt2_jax.run.hosts import Hosts
from gpt2_jax.run.rewind import Rewind, skips_of_run
from gpt2_jax.run.run_data import cut_batches, data_changes, open_data, with_vocabulary, with_vocabulary_of_source
from gpt2_jax.run.run_folder import holds_run, read_changes, read_config
from gpt2_jax.sharding import check_divisible


@dataclasses.dataclass(frozen=True)
class Agreed:
    """The same in all processes, but for `earlier`, `changes` and `rewind`, which process 0 alone has.

    Attributes:
      config: with the vocabulary filled in.
      store: the tokens.
      train_batches: this process's rows.
      held_out_batches: likewise.
      fingerprints: of data and tokenizer, as saves carry them.
      left_fingerprints: those that the run was allowed to leave.
      skips: the batches that are left out.
      rewind: back to a saved step, if that is still to be done.
      earlier: what the run was allowed to change before, as `run.json` has it.
      changes: what it is allowed to change now.
    """

    config: RunConfig
    store: TokenStore
    train_batches: TrainBatches
    held_out_batches: EvaluationBatches
    fingerprints: dict[str, str]
    left_fingerprints: dict[str, list[str]]
    skips: tuple[Skip, ...]
    rewind: Rewind | None
    earlier: list[dict[str, Any]]
    changes: list[Change]

    def all_changes(self, step: int) -> list[dict[str, Any]]:
        """For `run.json`, where the run goes on after `step`."""
        return [*self.earlier, *({"step": step, **vars(change)} for change in self.changes)]

    def notes(self) -> list[str]:
        """Lines for the start of the run."""
        lines = []
        if self.skips:
            told = ", ".join(f"{skip.batches} after step {skip.at}" for skip in self.skips)
            lines.append(f"skipped   batches {told}: recorded in run.json")
        if self.changes:
            lines.append(f"changed   {', '.join(map(str, self.changes))}: allowed, and recorded in run.json")
        return lines


def agree(
    config: RunConfig,
    hosts: Hosts,
    folder: pathlib.Path,
    mesh: Mesh,
    allow_change: frozenset[str],
    rewind: Rewind | None,
) -> Agreed:
    """Opens the data, which may have to be prepared first, and settles the rest; nothing is written to `folder`.

    All processes must call this together.

    Raises:
      UsageError, DataError: settings, data or a record that cannot be used.
      OtherHostError: those of another process.
    """
    changes: list[Change] = []
    with hosts.together():
        if hosts.first:
            config, changes = _settled(config, folder, allow_change)
    config = from_json(hosts.gather(to_json(config))[0])
    skips: tuple[Skip, ...] = ()
    with hosts.together():
        store = open_data(config, folder, allow_change)
        config = with_vocabulary(config, store.tokenizer.vocab_size)
        check_divisible(config, mesh, padded_vocab_size(config.model.vocab_size))
        if hosts.first:
            skips, rewinds = skips_of_run(folder, rewind)
            rewind = rewind if rewinds else None
    skips = skips_from_json(json.loads(hosts.gather(json.dumps(skips_to_json(skips)))[0]), "skipped")
    with hosts.together():
        train_batches, held_out_batches = cut_batches(config, store, mesh, skips)
    fingerprints = {"data_fingerprint": store.fingerprint, "tokenizer_fingerprint": store.tokenizer.fingerprint}
    hosts.check_equal(fingerprints)
    earlier: list[dict[str, Any]] = []
    with hosts.together():
        if hosts.first and holds_run(folder):
            earlier = read_changes(folder)
            changes += data_changes(folder, store)
    left = json.loads(hosts.gather(json.dumps(_left_fingerprints(earlier, changes)))[0])
    return Agreed(config, store, train_batches, held_out_batches, fingerprints, left, skips, rewind, earlier, changes)


def _settled(config: RunConfig, folder: pathlib.Path, allowed: frozenset[str]) -> tuple[RunConfig, list[Change]]:
    """The config as the run in `folder` has it, or the model that it starts from; and what is allowed to change."""
    if not holds_run(folder):
        return with_vocabulary_of_source(config), []
    stored = read_config(folder)
    if not config.model.vocab_size:
        config = with_vocabulary(config, stored.model.vocab_size)
    return config, check_changes(stored, config, allowed, address_of(folder))


def _left_fingerprints(earlier: list[dict[str, Any]], changes: list[Change]) -> dict[str, list[str]]:
    """The fingerprints that the run was allowed to leave, by the names under which saves carry them."""
    left: dict[str, list[str]] = {f"{name}_fingerprint": [] for name in (DATA, TOKENIZER)}
    for change in [*earlier, *map(vars, changes)]:
        if change["key"] in (DATA, TOKENIZER):
            left[f"{change['key']}_fingerprint"].append(change["before"])
    return left
