"""`gpt2-jax import`: another program's model as a Hugging Face folder, which all commands read."""

import argparse

from gpt2_jax.cli.quiet_logs import quiet_logs

# Names only, as in export.py, of `exchange.export.IMPORTS`.
FORMATS = ("npz", "nanogpt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--from", required=True, metavar="F", dest="form", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--model", required=True, metavar="PATH", help="a folder, or for nanogpt its ckpt.pt")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")


def run(arguments: argparse.Namespace) -> int:
    """Read the model, and write it as a Hugging Face folder."""
    quiet_logs()
    from gpt2_jax.exchange.export import check_request, export, import_bundle

    check_request("huggingface", arguments.out, "float32")
    bundle = import_bundle(arguments.form, arguments.model)
    parity = export(bundle, "huggingface", arguments.out)
    print(f"{arguments.out}: huggingface, float32, from {arguments.form}; {parity}")
    return 0
