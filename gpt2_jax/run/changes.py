"""Which settings a resumed run may change: freely, where it is allowed by name, or never."""

import dataclasses
import difflib
from collections.abc import Collection, Iterable
from typing import Any

from gpt2_jax.config import RunConfig
from gpt2_jax.config_file import fields_by_key, values_by_key
from gpt2_jax.errors import UsageError

# What can be allowed besides the keys of the config: a token store, or a tokenizer, with another fingerprint.
DATA, TOKENIZER = "data", "tokenizer"

# Keys that decide how long and how a run runs, not what the done steps computed.
_FREE = (
    *("train.log_every", "train.eval_every", "train.eval_windows", "train.sample_every", "train.max_skipped_steps"),
    "train.spike_sigmas",
    # Memory and speed; equal up to rounding.
    *("train.loss_chunk", "model.remat", "model.scan_unroll", "model.attention"),
    *("data.source", "data.text_field", "data.held_out", "data.cache_dir", "tokenizer.path"),  # see run_data.py
)
_FREE_SECTIONS = ("checkpoint.", "mesh.")

_SHAPES = ("model.n_layer", "model.n_embd", "model.n_positions", "model.vocab_size", "model.bias")
_MEANING = ("model.n_head", "model.activation")
_MOMENTS = ("optimizer.name", "optimizer.mu_dtype")
_IDS = ("tokenizer.name", "tokenizer.normalization", "tokenizer.lowercase")


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that was allowed to change: a key of the config with its values, or data or tokenizer with hashes."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        before, after = (value[:12] if self.key in (DATA, TOKENIZER) else value for value in (self.before, self.after))
        return f"{self.key} {before!r} -> {after!r}"


def allowed_names(texts: Iterable[str]) -> frozenset[str]:
    """The names in the values of `--allow_change`, each "NAME" or "NAME,NAME". Raises UsageError for an unknown one."""
    known = (*fields_by_key(), DATA, TOKENIZER)
    names = [name.strip() for text in texts for name in text.split(",")]
    for name in names:
        if name not in known:
            elsewhere = [key for key in known if key.split(".")[-1] == name.split(".")[-1]]
            near = elsewhere or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "see --print_config for all keys"
            raise UsageError(f"--allow_change={name}: not a key of the config, nor {DATA} or {TOKENIZER}; {hint}")
    return frozenset(names)


def check_changes(stored: RunConfig, wanted: RunConfig, allowed: Collection[str], where: str) -> list[Change]:
    """What `wanted` changes, by leave of `allowed`, in the run in `where` that has the settings `stored`.

    Raises UsageError for what changes the numbers and is not allowed, or cannot be.
    """
    before, after = values_by_key(stored), values_by_key(wanted)
    changes = [
        Change(key, before[key], after[key])
        for key in before
        if before[key] != after[key] and not _is_free(key, stored, wanted)
    ]
    fixed = [f"{change} ({reason})" for change in changes if (reason := _why_fixed(change))]
    if fixed:
        raise UsageError(
            f"--workdir={where} holds a run with other settings, which no flag lets it change: {', '.join(fixed)}; "
            "use the stored settings to resume, or another --workdir for a new run"
        )
    missing = [change for change in changes if change.key not in allowed]
    if missing:
        # Another way from text to ids makes another tokenizer, and with it other data.
        ids = [name for name in (TOKENIZER, DATA) if name not in allowed and any(c.key in _IDS for c in missing)]
        raise UsageError(
            f"--workdir={where} holds a run with other settings: {', '.join(map(str, missing))}; "
            "use the stored settings to resume, or another --workdir for a new run or a fine-tuned one, or, to go on "
            f"with the new ones, add --allow_change={','.join([*(change.key for change in missing), *ids])}"
        )
    return changes


def _is_free(key: str, stored: RunConfig, wanted: RunConfig) -> bool:
    if key == "train.steps":  # a longer run continues a shorter one, unless the rate depends on the length
        return stored.optimizer.schedule == wanted.optimizer.schedule and wanted.optimizer.schedule in (
            "constant",
            "inverse_sqrt",
        )
    if key == "train.microbatches":  # each draws its own dropout
        return not any((wanted.model.embd_pdrop, wanted.model.attn_pdrop, wanted.model.resid_pdrop))
    return key in _FREE or key.startswith(_FREE_SECTIONS)


def _why_fixed(change: Change) -> str:
    """Why a key can't be allowed to change so; empty where it can."""
    if change.key in _SHAPES:
        return "it decides the shapes of what is saved"
    if change.key in _MEANING:
        return "the saved weights would compute something else"
    if change.key in _MOMENTS:
        return "the saved state of the optimizer is of another kind"
    if change.key == "optimizer.ema_decay" and not (change.before and change.after):
        return "the saves hold a moving average, or none"
    if change.key == "optimizer.clip_norm" and not (change.before and change.after):
        return "the saved state of the optimizer has a place for clipping, or none"
    if change.key == "model.dtype" and "float16" in (change.before, change.after):
        return "the saves hold a loss scale for float16, or none"
    return ""
