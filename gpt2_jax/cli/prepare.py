"""`gpt2-jax prepare`: tokenize a corpus into a folder of token shards."""

import argparse
import shlex

from gpt2_jax.data.documents import KINDS
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.token_store import SPLITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--source", required=True, metavar="SPEC", help=", ".join(KINDS))
    parser.add_argument("--tokenizer", required=True, metavar="NAME", help="gpt2, bytes, chars or bpe:N")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--tokenizer_path",
        default="",
        metavar="DIR",
        help="folder of a saved tokenizer; for gpt2 one with vocab.bpe or merges.txt",
    )
    parser.add_argument(
        "--text_field",
        default="text",
        metavar="NAME",
        help="field with the text in jsonl, parquet, tfds (%(default)s)",
    )
    parser.add_argument(
        "--held_out", default=0.1, type=float, metavar="SHARE", help="share kept for evaluation (%(default)s)"
    )
    parser.add_argument(
        "--normalization",
        default="none",
        metavar="FORM",
        help="Unicode form: none, nfc or nfkc (%(default)s)",
    )
    parser.add_argument("--lowercase", action="store_true", help="lower-case the text first")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one per processor)")


def run(arguments: argparse.Namespace) -> int:
    """Prepare the store and print what it holds."""
    store = prepare(
        source=arguments.source,
        text_field=arguments.text_field,
        tokenizer_name=arguments.tokenizer,
        tokenizer_path=arguments.tokenizer_path,
        normalization=arguments.normalization,
        lowercase=arguments.lowercase,
        held_out=arguments.held_out,
        out=arguments.out,
        workers=arguments.workers,
    )
    manifest = store.manifest
    for split in SPLITS:
        documents = store.num_documents(split)
        counted = "" if documents is None else f" in {documents:,} documents"
        print(f"{split:<12} {len(store.split(split)):,} tokens{counted}")
    if manifest.empty_documents:
        print(f"{'skipped':<12} {manifest.empty_documents:,} empty documents")
    print(f"{'vocabulary':<12} {manifest.vocab_size:,} ids ({manifest.tokenizer}), stored as {manifest.dtype}")
    print(f"{'fingerprint':<12} {store.fingerprint}")
    flags = [f"--config.data.source=tokens:{store.folder}", f"--config.tokenizer.name={manifest.tokenizer}"]
    if arguments.normalization != "none":
        flags.append(f"--config.tokenizer.normalization={arguments.normalization}")
    if arguments.lowercase:
        flags.append("--config.tokenizer.lowercase=true")
    print(f"train on it with {shlex.join(flags)}")
    return 0
