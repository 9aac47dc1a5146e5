"""`gpt2-jax data`: what a run read. `data blame` shows the texts of the batch behind a step."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from gpt2_jax.cli.quiet_logs import quiet_logs
from gpt2_jax.errors import UsageError
from gpt2_jax.remote_folder import address_of
from gpt2_jax.run.run_folder import folder_to_read, read_config, read_data, read_skipped
from gpt2_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpt2_jax.data.origins import Row

_CHARACTERS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="blame")
    summary = "show the texts of the training batch with which a run made a step, and which documents they are of"
    blame = actions.add_parser("blame", help=summary, description=summary, allow_abbrev=False)
    blame.add_argument("--workdir", required=True, metavar="RUN", help="run folder, here or at gs://")
    blame.add_argument("--step", required=True, type=int, metavar="N", help="the step, from 1 to train.steps")
    blame.add_argument(
        "--rows", default="", metavar="FIRST:LAST", help="these rows only, counted from 0 (default: all)"
    )
    blame.add_argument(
        "--chars",
        type=int,
        metavar="N",
        help=f"characters shown of each text; 0: all (default: {_CHARACTERS}, with --json all)",
    )
    blame.add_argument(
        "--data",
        default="",
        metavar="DIR",
        help="token store of the run, here or at gs:// (default: where the run found it)",
    )
    blame.add_argument("--json", action="store_true", help="one JSON object per row, with the token ids")


def run(arguments: argparse.Namespace) -> int:
    """Print the rows."""
    quiet_logs()
    # Imported late, so that `--help` loads no JAX.
    from gpt2_jax.data.origins import Documents, rows_of_batch
    from gpt2_jax.run.run_data import cut_train_batches, data_of_run

    if arguments.chars is not None and arguments.chars < 0:
        raise UsageError(f"--chars={arguments.chars}: give 0 (all) or more")
    folder = folder_to_read(arguments.workdir)
    read_data(folder)  # which says so, if it is no run folder
    config, skips = read_config(folder), read_skipped(folder)
    step, steps = arguments.step, config.train.steps
    if not 1 <= step <= steps:
        raise UsageError(f"--step={step}: the run in {address_of(folder)} has the steps 1 to {steps}")
    store = data_of_run(folder, arguments.data)
    batches = cut_train_batches(config, store, skips=skips)
    documents = None if store.num_documents("train") is None else Documents(store.split("train"))
    index = step - 1  # batches count from 0
    rows = rows_of_batch(batches, index, documents)
    first, last = _rows(arguments.rows, len(rows))
    number = batches.batch_number(index)
    if not arguments.json:
        skipped = f" ({number - index} batches skipped)" if number > index else ""
        print(f"step {step}: batch {number}, counted from 0{skipped}; {len(rows)} rows; {store.folder}")
        if documents is None:
            print("where its documents begin is not recorded in this data (nanoGPT's files)")
    for row in range(first, last + 1):
        shown = _as_json if arguments.json else _as_text
        print(shown(step, number, row, rows[row], store.tokenizer, arguments.chars))
    sys.stdout.flush()
    return 0


def _as_json(step: int, batch: int, number: int, row: "Row", tokenizer: Tokenizer, chars: int | None) -> str:
    pieces = None
    if row.pieces is not None:
        pieces = [{"document": part.document, "offset": part.offset, "tokens": part.tokens} for part in row.pieces]
    line: dict[str, Any] = {
        "step": step,
        "batch": batch,
        "row": number,
        "window": row.window,
        "ids": row.ids.tolist(),
        "documents": pieces,
        "text": tokenizer.decode(row.ids)[: chars or None],
    }
    return json.dumps(line, ensure_ascii=False)


def _as_text(step: int, batch: int, number: int, row: "Row", tokenizer: Tokenizer, chars: int | None) -> str:
    places = ""
    if row.pieces:
        listed = ", ".join(
            f"{part.document} (tokens {part.offset} to {part.offset + part.tokens - 1})" for part in row.pieces
        )
        places = f", {'document' if len(row.pieces) == 1 else 'documents'} {listed}"
    text = _cut(tokenizer.decode(row.ids), _CHARACTERS if chars is None else chars)
    return f"row {number}: window {row.window}, {len(row.ids)} tokens{places}\n    {_visible(text)}"


def _rows(asked: str, count: int) -> tuple[int, int]:
    if not asked:
        return 0, count - 1
    first, colon, last = asked.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < count):
        raise UsageError(
            f"--rows={asked}: give the first and the last row, from 0 to {count - 1}, as in --rows=0:{count - 1}"
        )
    return int(first), int(last)


def _cut(text: str, chars: int) -> str:
    return text if not chars or len(text) <= chars else text[:chars] + "..."


def _visible(text: str) -> str:
    """The text on one line that no terminal takes for a command."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
