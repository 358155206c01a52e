"""The command `smoot-hf`: names its subcommands at once, and imports what one of them needs when it is called."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__

# Subcommand -> what it does. The module of this package that does it has its name, with underscores for hyphens.
SUBCOMMANDS = {
    "train": "Train an image classifier with SMOOT, SGT or in the standard way.",
    "evaluate": "Measure how faithful the saliency of a trained checkpoint is.",
    "compare": "Train and compare the methods over several seeds, and write one report.",
    "campaign": "Run many short trainings of many settings and seeds, each judged, in a queue.",
    "explain": "Draw what a trained model looks at over images of your own.",
    "demo": "Open a page that shows what trained models look at.",
    "fetch-backbone": "Write a pretrained model for photographs into a folder, without the Hub.",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser that finds the subcommand and leaves its flags as they are."""
    width = max(map(len, SUBCOMMANDS)) + 2
    parser = argparse.ArgumentParser(
        prog="smoot-hf",
        usage="smoot-hf SUBCOMMAND [--config FILE] [flags]",
        description="Saliency Guided Mask Optimized Online Training (SMOOT) of image classifiers.\n\nsubcommands:\n"
        + "\n".join(f"  {name:{width}}{what}" for name, what in SUBCOMMANDS.items()),
        epilog="`smoot-hf SUBCOMMAND --help` explains the flags of a subcommand. A training on several processes:\n"
        "`accelerate launch -m smoot_hf.experiments.train [flags]`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"smoot-hf {__version__}")
    parser.add_argument("subcommand", choices=SUBCOMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        argv: the command line without the name of the program; default: that of the process.

    Raises:
        SystemExit: with code 2 for a wrong command line; a subcommand exits with its own codes.
    """
    options = make_parser().parse_args(argv)
    sys.argv[0] = f"smoot-hf {options.subcommand}"
    module = options.subcommand.replace("-", "_")
    importlib.import_module(f".{module}", __package__).main(argv=options.flags)
