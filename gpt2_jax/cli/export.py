"""`gpt2-jax export`: a model in another program's format."""

import argparse

from gpt2_jax.cli.quiet_logs import quiet_logs
from gpt2_jax.errors import UsageError
from gpt2_jax.run.run_folder import folder_to_read

# Names only, so that --help is quick; tests/cli/test_export.py holds them to `exchange.export.FORMATS`.
FORMATS = ("huggingface", "npz", "nanogpt", "gguf", "stablehlo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, metavar="DIR", help="run folder, or Hugging Face GPT-2 folder")
    parser.add_argument("--step", type=int, metavar="N", help="saved step of a run (default: the best one)")
    parser.add_argument(
        "--format", default=FORMATS[0], metavar="F", help=f"one of {', '.join(FORMATS)} (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="TYPE",
        help="type of the weights: float32; float16; bfloat16 (huggingface, nanogpt); q8_0 (gguf) "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--accept_erf",
        action="store_true",
        help="nanogpt: write a model with GPT-2's tanh GELU all the same, for a program that computes it by erf; the "
        "difference of the logits is printed",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, and print how far the files are from the model."""
    folder = folder_to_read(arguments.model)
    if not folder.is_dir():
        raise UsageError(f"--model={arguments.model}: no such folder; name a run folder or a Hugging Face GPT-2 folder")
    quiet_logs()
    from gpt2_jax.exchange.export import check_request, export
    from gpt2_jax.run.bundle import load_bundle

    check_request(arguments.format, arguments.out, arguments.dtype)
    bundle = load_bundle(folder, arguments.step)
    parity = export(bundle, arguments.format, arguments.out, arguments.dtype, accept_erf=arguments.accept_erf)
    print(f"{arguments.out}: {arguments.format}, {arguments.dtype}; {parity}")
    return 0
