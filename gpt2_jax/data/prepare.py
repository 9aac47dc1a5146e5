"""Makes a token store from a corpus: resumable, parallel, and whole or not there at all.

Work happens in a folder beside the result, with the suffix `.partial`, which is renamed at the end. What is
done there is noted unit by unit, so that a killed run loses one unit at most.
"""

import concurrent.futures.process
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from gpt2_jax.config import TokenizerConfig
from gpt2_jax.data.document_formats import SPAN_BYTES
from gpt2_jax.data.documents import DocumentSource, open_source
from gpt2_jax.data.held_out import HeldOutSplit
from gpt2_jax.data.local_copy import copy_token_store
from gpt2_jax.data.nanogpt import DTYPE, nanogpt_files, nanogpt_shard, nanogpt_signature
from gpt2_jax.data.token_store import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    TokenStore,
    open_token_store,
    write_json,
)
from gpt2_jax.data.unit_pool import run_units
from gpt2_jax.data.unit_writer import UnitTask
from gpt2_jax.errors import DataError, Gpt2JaxError, UsageError
from gpt2_jax.fault_points import reach
from gpt2_jax.folder_lock import folder_lock
from gpt2_jax.remote_folder import is_remote
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from gpt2_jax.user_paths import expand_user

_PROGRESS = "progress"


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What decides the ids of a token store, and where GPT-2's merges may be found."""

    source: str
    text_field: str
    tokenizer_name: str
    tokenizer_path: str
    normalization: str
    lowercase: bool
    held_out: float
    signature: str
    saved_tokenizer: str

    @property
    def key(self) -> str:
        """sha256, in hexadecimal, over the inputs. Where a tokenizer's files lie is none: what they hold is."""
        content = dataclasses.asdict(self) | {
            "tokenizer_path": "",
            "format": FORMAT_VERSION,
            "span": SPAN_BYTES,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prepare(
    *,
    source: str,
    text_field: str = "text",
    tokenizer_name: str = "gpt2",
    tokenizer_path: str = "",
    normalization: str = "none",
    lowercase: bool = False,
    held_out: float = 0.1,
    out: str | os.PathLike[str],
    workers: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """Tokenize `source` into the folder `out`, or open what an equal call made there before.

    The result does not depend on `workers` (None: as many as there are processors). Raises UsageError for
    arguments that cannot be used, before any work, and DataError for the data.
    """
    if source.startswith("tokens:"):
        raise UsageError(f"source {source!r} is prepared already: train on it as it is")
    recipe = _recipe(source, text_field, tokenizer_name, tokenizer_path, normalization, lowercase, held_out, workers)
    return _prepare(recipe, expand_user(out).absolute(), workers, progress)


def ensure_prepared(
    *,
    source: str,
    text_field: str = "text",
    tokenizer_name: str = "gpt2",
    tokenizer_path: str = "",
    normalization: str = "none",
    lowercase: bool = False,
    held_out: float = 0.1,
    cache_dir: str | os.PathLike[str],
    workers: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """Like `prepare`, into a folder of `cache_dir` named by the inputs; returns at once if it is there.

    A source `tokens:DIR` is opened where it lies, `tokens:gs://BUCKET/PATH` copied into `cache_dir` first.
    """
    if source.startswith("tokens:"):
        address = source.removeprefix("tokens:")
        if is_remote(address):
            return open_token_store(copy_token_store(address, expand_user(cache_dir).absolute()))
        folder = expand_user(address)
        if not folder.is_dir():
            raise UsageError(f"source {source!r}: no folder {folder}; make one with gpt2-jax prepare")
        return open_token_store(folder)
    recipe = _recipe(source, text_field, tokenizer_name, tokenizer_path, normalization, lowercase, held_out, workers)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{source}-{tokenizer_name}".lower()).strip("-")[-60:].strip("-")
    out = expand_user(cache_dir).absolute() / f"{slug}-{recipe.key[:16]}"
    return _prepare(recipe, out, workers, progress)


def _recipe(
    source: str,
    text_field: str,
    tokenizer_name: str,
    tokenizer_path: str,
    normalization: str,
    lowercase: bool,
    held_out: float,
    workers: int | None,
) -> _Recipe:
    TokenizerConfig(tokenizer_name, tokenizer_path, normalization, lowercase)  # refuses what cannot be used
    HeldOutSplit(held_out, 1)  # refuses a share that is none
    if workers is not None and workers < 1:
        raise UsageError(f"workers={workers}: one process or more is needed")
    folder = _nanogpt_folder(source)
    if folder is None:
        signature = open_source(source, text_field).signature
    elif tokenizer_name == "gpt2":
        signature = nanogpt_signature(folder)
    else:
        raise UsageError(f"source {source!r} holds GPT-2's ids; it needs the tokenizer gpt2, not {tokenizer_name}")
    saved = ""
    if tokenizer_path and tokenizer_name != "gpt2":
        saved = make_tokenizer(
            tokenizer_name, path=tokenizer_path, normalization=normalization, lowercase=lowercase
        ).fingerprint
    return _Recipe(
        source, text_field, tokenizer_name, tokenizer_path, normalization, lowercase, held_out, signature, saved
    )


def _nanogpt_folder(source: str) -> str | None:
    return source.removeprefix("nanogpt:") if source.startswith("nanogpt:") else None


def _prepare(recipe: _Recipe, out: pathlib.Path, workers: int | None, progress: bool) -> TokenStore:
    if (out / MANIFEST).exists():
        return _open_same(out, recipe)
    _check_writable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made ({error.strerror}: {error.filename}); name another folder") from None
    with folder_lock(out):
        if (out / MANIFEST).exists():  # made by the process that we waited for
            return _open_same(out, recipe)
        if out.exists() and any(out.iterdir()):
            raise UsageError(f"{out}: not empty, and no token store; name another folder")
        partial = out.with_name(f"{out.name}.partial")
        _start_or_resume(partial, recipe)
        try:
            _build(partial, recipe, workers, progress)
        except concurrent.futures.process.BrokenProcessPool:
            raise DataError(
                f"{partial}: a worker process died, perhaps for want of memory; "
                "run again with fewer workers, what is done is kept"
            ) from None
        except Gpt2JaxError:
            shutil.rmtree(partial)  # the next attempt has other inputs
            raise
        for leftover in partial.glob("*.tmp"):  # of a killed run
            leftover.unlink()
        os.rename(partial, out)
        shutil.rmtree(out / _PROGRESS)
    return open_token_store(out)


def _open_same(out: pathlib.Path, recipe: _Recipe) -> TokenStore:
    store = open_token_store(out)
    if store.manifest.key != recipe.key:
        raise UsageError(
            f"{out}: holds a token store made from other inputs ({store.manifest.source}, "
            f"{store.manifest.tokenizer}, or an earlier state of the files); "
            "name another folder, or delete it"
        )
    return store


def _check_writable(out: pathlib.Path) -> None:
    if not out.name:
        raise UsageError(f"{out}: cannot be a token store; name a folder in it")
    parent = next(path for path in out.parents if path.exists())
    for path in (parent, out):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{out}: cannot be made, because {path} is a file; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{out}: cannot be made, because {parent} is not writable; name another folder")


def _start_or_resume(partial: pathlib.Path, recipe: _Recipe) -> None:
    """Leave in `partial` what an interrupted run with the same inputs did; remove that of another."""
    plan = partial / _PROGRESS / "plan.json"
    if partial.exists():
        try:
            key = json.loads(plan.read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            key = None
        if key == recipe.key:
            return
        if key is None and any(path.name != _PROGRESS for path in partial.iterdir()):
            raise UsageError(f"{partial}: in the way, and no unfinished token store; move or delete it")
        shutil.rmtree(partial)
    plan.parent.mkdir(parents=True)
    write_json(plan, {"key": recipe.key})


def _build(partial: pathlib.Path, recipe: _Recipe, workers: int | None, progress: bool) -> None:
    """Fill `partial` with the tokenizer, the shards and, last, the manifest."""
    folder = _nanogpt_folder(recipe.source)
    if folder is not None:
        tokenizer = _tokenizer(partial, recipe, None)
        splits: dict[str, tuple[Shard, ...]] = {
            split: (nanogpt_shard(file, tokenizer.vocab_size),) for split, file in nanogpt_files(folder).items()
        }
        _write_manifest(partial, recipe, tokenizer, DTYPE, 0, splits)
        return

    source = open_source(recipe.source, recipe.text_field)
    if source.num_documents == 0:
        raise DataError(f"source {recipe.source!r}: there are no documents in it")
    split = HeldOutSplit(recipe.held_out, source.num_documents)
    tokenizer = _tokenizer(partial, recipe, _learning_texts(source, split, recipe.tokenizer_name))
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    reach("prepare")
    tasks = [
        UnitTask(partial, tokenizer.fingerprint, partial / _PROGRESS, source.format, unit, split, dtype)
        for unit in source.units
    ]
    results = []
    with tqdm(
        total=source.num_documents, unit=" documents", desc="tokenizing", disable=None if progress else True
    ) as bar:
        for task, result in zip(tasks, run_units(tasks, workers), strict=True):
            results.append(result)
            bar.update(task.unit.num_documents)
    splits = {name: tuple(result.shards[name] for result in results if name in result.shards) for name in SPLITS}
    for name, shards in splits.items():
        if not shards:
            raise DataError(
                f"source {recipe.source!r}: no text for the {name} split of "
                f"{source.num_documents} documents; give it more text"
            )
    if open_source(recipe.source, recipe.text_field).signature != recipe.signature:
        raise DataError(f"source {recipe.source!r}: its files changed while they were read; start again")
    empty = sum(result.empty_documents for result in results)
    _write_manifest(partial, recipe, tokenizer, dtype, empty, splits)


def _write_manifest(
    partial: pathlib.Path,
    recipe: _Recipe,
    tokenizer: Tokenizer,
    dtype: str,
    empty_documents: int,
    splits: dict[str, tuple[Shard, ...]],
) -> None:
    Manifest(
        key=recipe.key,
        source=recipe.source,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        empty_documents=empty_documents,
        splits=splits,
    ).write(partial)


def _tokenizer(partial: pathlib.Path, recipe: _Recipe, texts: Callable[[], Iterable[str]] | None) -> Tokenizer:
    """The tokenizer of an interrupted run, or else a new one, saved."""
    try:
        return load_tokenizer(partial)
    except DataError:
        pass  # not there, or not written to its end
    tokenizer = make_tokenizer(
        recipe.tokenizer_name,
        path=recipe.tokenizer_path,
        normalization=recipe.normalization,
        lowercase=recipe.lowercase,
        texts=texts,
    )
    tokenizer.save(partial)
    return tokenizer


def _learning_texts(source: DocumentSource, split: HeldOutSplit, tokenizer_name: str) -> Callable[[], Iterator[str]]:
    """What a tokenizer learns from: each character needs an id, but merges come from training text."""

    def texts() -> Iterator[str]:
        for unit in source.units:
            for number, text in enumerate(source.read(unit), start=unit.first_document):
                if tokenizer_name == "chars":
                    yield text
                elif split.num_documents == 1:
                    yield text[: split.cut(len(text))]
                elif not split.is_held_out(number):
                    yield text

    return texts
