"""The command line of the recipes: flags, recipe defaults, and configuration files that hold the same names."""

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from transformers import HfArgumentParser

from smoot_hf import SmootTrainingArguments

DEFAULTS: dict[str, Any] = {
    "output_dir": None,
    "per_device_train_batch_size": 256,
    "per_device_eval_batch_size": 256,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "report_to": "none",
    "remove_unused_columns": False,
    # Pinning without a GPU does nothing but warn.
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class RecipeArguments:
    """What a recipe needs beside `SmootTrainingArguments`."""

    dataset: str = field(
        default="digits", metadata={"help": 'Hub id, local directory (Parquet or imagefolder), or "digits".'}
    )
    model: str = field(
        default="cnn",
        metadata={"help": '"cnn", "deit-tiny", or a Hub id or local directory of transformers or timm.'},
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Take the architecture of --model with random weights ('cnn' always does)."}
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "Patch side in pixels, for patch-based models with --from_scratch."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, where it is ambiguous."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, where it is ambiguous."})
    convert_rgb: bool = field(
        default=False, metadata={"help": "Three channels for grey images, which pretrained models expect."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many images, drawn at random, always the same ones."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many images, drawn at random, always the same ones."}
    )
    card_samples: int = field(
        default=500,
        metadata={"help": "Measure the saliency for the model card on this many test images; 0: do not."},
    )
    optimizer: Literal["trainer", "adadelta"] = field(
        default="trainer",
        metadata={"help": "trainer: what --optim says. adadelta: the paper's; takes --learning_rate, --weight_decay."},
    )
    crop_padding: int = field(
        default=0, metadata={"help": "Augmentation: random crops after padding each side by this many black pixels."}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "Augmentation: mirror half of the images."})


class OneLineParser(HfArgumentParser):
    """An `HfArgumentParser` whose errors are one line: the usage of two hundred flags would bury them."""

    def error(self, message: str, code: int = 2) -> NoReturn:
        """Print `message` to stderr, in one line, and exit with `code`."""
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(code)


def make_parser(defaults: Mapping[str, Any], description: str) -> OneLineParser:
    """The parser of all flags, with a recipe's defaults."""
    parser = OneLineParser(
        (SmootTrainingArguments, RecipeArguments),
        description=description,
        usage="%(prog)s [FILE] [--flag VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of flags; may be the first argument.")
    parser.set_defaults(**{**DEFAULTS, **defaults})
    return parser


def parse(parser: OneLineParser, argv: list[str]) -> tuple[SmootTrainingArguments, RecipeArguments]:
    """Read flags and configuration file; exits with one line where they are wrong."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    path = parser.parse_known_args(argv)[0].config
    flags = argv if path is None else [*config_flags(parser, path), *argv]
    known, unknown = parser.parse_known_args(flags)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}{near(parser, unknown[0].lstrip('-').split('=')[0])}")
    if known.output_dir is None:
        dataset, model = Path(known.dataset).name, Path(known.model).name
        # Runs that differ in their seed alone have folders of their own; the usual seed needs no mention.
        seed = "" if known.seed == parser.get_default("seed") else f"-seed{known.seed}"
        flags += ["--output_dir", f"runs/{dataset}-{model}-{known.method}{seed}"]
    try:
        args, recipe, _ = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    return args, recipe


def config_flags(parser: OneLineParser, path: str) -> list[str]:
    """A configuration file as flags, so that both are checked in the same way."""
    try:
        # JSON is YAML.
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read the configuration file {path!r}: {' '.join(str(error).split())}")
    if not isinstance(config, dict):
        parser.error(f"the configuration file {path!r} must map names of flags to values")
    names = {action.dest for action in parser._actions}
    for key in config:
        if key not in names:
            parser.error(f"unknown key {key!r} in {path}{near(parser, str(key))}")
    return [part for key, value in config.items() if value is not None for part in as_flag(key, value)]


def as_flag(key: str, value: Any) -> list[str]:
    """One entry of a configuration file as command line arguments."""
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def near(parser: OneLineParser, name: str) -> str:
    """ ", did you mean ..." where a flag has a similar name."""
    names = [action.dest for action in parser._actions]
    matches = difflib.get_close_matches(name.replace("-", "_"), names, n=3)
    return f": did you mean {', '.join(matches)}?" if matches else ""
