"""The command line of a training as arguments: what flags.py lets pass, and the checks of the arguments themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from ..training import SmootTrainingArguments
from . import flags
from .flags import USAGE, OneLineParser, RecipeArguments

__all__ = ["DEFAULTS", "OneLineParser", "RecipeArguments", "RecipeParser", "make_parser", "parse"]

# Pinning without a GPU does nothing but warn.
DEFAULTS: dict[str, Any] = {**flags.DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()}


class RecipeParser(HfArgumentParser, OneLineParser):
    """An `HfArgumentParser` whose errors are one line."""


def make_parser(defaults: Mapping[str, Any], description: str) -> RecipeParser:
    """The parser of all flags; without defaults of its own, --recipe names them."""
    parser = RecipeParser(
        (SmootTrainingArguments, RecipeArguments),  # type: ignore[arg-type]  # of HfArgumentParser, which mypy skips
        description=description,
        usage=USAGE,
        allow_abbrev=False,
    )
    flags.add_config(parser)
    flags.add_preset(parser)
    flags.add_former_flags(parser)
    if not defaults:
        flags.add_recipe(parser)
    parser.set_defaults(**{**DEFAULTS, **defaults})
    return parser


def parse(parser: RecipeParser, argv: list[str]) -> tuple[SmootTrainingArguments, RecipeArguments]:
    """Read flags and configuration file; exits with one line where they are wrong."""
    given, known = flags.expand_flags(parser, argv)
    if known.output_dir is None:
        dataset = Path(flags.data_name(known.dataset, known.planted)).name
        model = Path(known.model).name
        # Runs that differ in their seed alone have folders of their own; the usual seed needs no mention.
        seed = "" if known.seed == parser.get_default("seed") else f"-seed{known.seed}"
        given += ["--output_dir", f"runs/{dataset}-{model}-{known.method}{seed}"]
    try:
        args, recipe, _ = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    return args, recipe
