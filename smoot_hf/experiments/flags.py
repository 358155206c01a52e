"""The flags of the commands, known without the libraries that they are about: importing those takes ten seconds.

A misspelled flag and --help are answered at once. `TrainingArguments`, `SmootSettings` and `SmootTrainingArguments` are
read from their source for that, not imported; arguments.py makes the arguments themselves and has the last word.
"""

import argparse
import ast
import contextlib
import difflib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from ..presets import PRESETS
from .recipes import RECIPES

METHODS = ("standard", "sgt", "smoot")
USAGE = "%(prog)s [FILE] [--flag VALUE ...]"
# What the commands set otherwise than the classes.
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
}

# Where a flag's class is: package, file, class, and the bases it may have for all of its fields to be known. A field
# of several of them is read from the first: `SmootTrainingArguments` takes over those of `SmootSettings`, which has two
# of `TrainingArguments`.
_SOURCES: tuple[tuple[str, str, str, list[str]], ...] = (
    ("transformers", "training_args.py", "TrainingArguments", []),
    ("smoot_hf", "training/settings.py", "SmootSettings", []),
    ("smoot_hf", "training/arguments.py", "SmootTrainingArguments", ["TrainingArguments"]),
)
_NUMBERS = {"int": int, "int | None": int, "float": float, "float | None": float}


@dataclass
class RecipeArguments:
    """What a training needs beside `SmootTrainingArguments`."""

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
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Resize and crop every image to a square of this side. Default: as a pretrained model's image "
            "processor says, where sizes are mixed or larger than the model's input; else as they are."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on (default: the first of test, validation, valid, val with labels)."},
    )
    planted: Literal["plain", "block", "block-fixed", "decoy", "several"] = field(
        default="plain",
        metadata={
            "help": "Plant evidence whose place is known, for small images: each above or below a block that says "
            "nothing (block), always above it (block-fixed), with a corner patch that leaks the label in training "
            "(decoy), or up to three in one image of several labels (several). plain: do not."
        },
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
    mixup: float = field(
        default=0.0,
        metadata={"help": "Augmentation: mixup, its alpha (0.8 for DeiT). It makes the labels soft; 0: none."},
    )
    cutmix: float = field(
        default=0.0,
        metadata={"help": "Augmentation: CutMix, its alpha (1.0 for DeiT); with --mixup, one of both for each batch."},
    )
    random_erasing: float = field(
        default=0.0,
        metadata={"help": "Augmentation: erase a rectangle with this probability; with --mixup or --cutmix."},
    )

    @property
    def data_name(self) -> str:
        """What the images are called: of a path its last part alone, with the planted set, as in "digits-block"."""
        return data_name(self.dataset, self.planted)


def data_name(dataset: str, planted: str) -> str:
    """See `RecipeArguments.data_name`; the whole of a Hub id."""
    name = Path(dataset).name if Path(dataset).is_dir() else dataset
    return name if planted == "plain" else f"{name}-{planted}"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage of two hundred flags would bury them."""

    def error(self, message: str, code: int = 2) -> NoReturn:
        """Print `message` to stderr, in one line, and exit with `code`.

        torchrun, and `accelerate launch` with several processes, end with a report of their own, in which the line
        then stands as the reason.
        """
        line = f"{self.prog}: error: {' '.join(message.split())}"
        print(line, file=sys.stderr)
        report = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if report:
            # The line has been said already, whether the launcher can repeat it or not.
            with contextlib.suppress(OSError):
                Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
        raise SystemExit(code)


@dataclass(frozen=True)
class Flag:
    """A field of a class of arguments, as its source has it.

    Attributes:
        name: of the field.
        annotation: its type, as text.
        default: its default where that is a plain value, else its text.
        help: what it does.
        parsing: what else it hands to argparse: "nargs", "const", "choices".
    """

    name: str
    annotation: str
    default: Any
    help: str
    parsing: dict[str, Any]


def check_flags(defaults: Mapping[str, Any], description: str | None, argv: Sequence[str] | None = None) -> None:
    """Answer --help, and end with one line and exit code 2 at a flag that nobody knows or whose value cannot be read.

    Where the source of an argument class is not to be had, or its fields are spread over other classes, nothing is
    checked here: the full parser is next.

    Args:
        defaults: values of flags that differ from those of the classes.
        description: the command's docstring; its first paragraph is the description.
        argv: the command line; default: that of the process.
    """
    parser = quick_parser(defaults, description)
    if parser is not None:
        expand_flags(parser, list(sys.argv[1:] if argv is None else argv))


def quick_parser(defaults: Mapping[str, Any], description: str | None) -> OneLineParser | None:
    """The parser of all flags, from the sources of their classes; `None` where they cannot be known from there."""
    known = [read_flags(*source) for source in _SOURCES]
    if any(flags is None for flags in known):
        return None
    parser = OneLineParser(
        description=(description or "").split("\n\n")[0],
        usage=USAGE,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    own = read_flags_of(Path(__file__), RecipeArguments.__name__, []) or []
    flags: dict[str, Flag] = {}
    for flag in [flag for several in known for flag in several or []] + own:
        flags.setdefault(flag.name, flag)
    for flag in flags.values():
        _add_flag(parser, flag)
    add_config(parser)
    add_preset(parser)
    add_former_flags(parser)
    if not defaults:
        add_recipe(parser)
    parser.set_defaults(**{**DEFAULTS, **defaults})
    return parser


def read_flags(package: str, file: str, name: str, bases: list[str]) -> list[Flag] | None:
    """The fields of a dataclass of an installed package, which is not imported; `None` where they cannot be known."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    paths = [Path(place) / file for place in places]
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else read_flags_of(path, name, bases)


def read_flags_of(path: Path, name: str, bases: list[str]) -> list[Flag] | None:
    """The fields of a dataclass in a source file; `None` where it is not there or has other bases."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    if len(found) != 1 or [ast.unparse(base) for base in found[0].bases] != bases:
        return None
    fields = [node for node in found[0].body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return [_flag(node) for node in fields]


def _flag(node: ast.AnnAssign) -> Flag:
    """Of `name: annotation = field(default=..., metadata={"help": ...})`, or with default and help as they stand."""
    given: dict[str | None, ast.expr] = {}
    if isinstance(node.value, ast.Call):
        given = dict(zip(("default", "help"), node.value.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in node.value.keywords}
    elif node.value is not None:
        given = {"default": node.value}
    metadata = given.get("metadata")
    if isinstance(metadata, ast.Dict):
        pairs = zip(metadata.keys, metadata.values, strict=True)
        given |= {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}
    default, text = (_value(given[key]) if key in given else None for key in ("default", "help"))
    # What is not written out, such as the choices of another module, is left to the full parser.
    parsing = {key: _value(given[key]) for key in ("nargs", "const", "choices") if _is_literal(given.get(key))}
    return Flag(ast.unparse(node.target), ast.unparse(node.annotation), default, text or "", parsing)


def _value(node: ast.expr) -> Any:
    return ast.literal_eval(node) if _is_literal(node) else ast.unparse(node)


def _is_literal(node: ast.expr | None) -> bool:
    if node is None:
        return False
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    """As `HfArgumentParser` adds it, but of the values only numbers and choices are checked."""
    options: dict[str, Any] = {"help": flag.help, "default": flag.default}
    if flag.annotation.startswith("Literal["):
        options["choices"] = ast.literal_eval(flag.annotation.removeprefix("Literal"))
    elif flag.annotation in _NUMBERS:
        options["type"] = _NUMBERS[flag.annotation]
    elif "list[" in flag.annotation:
        options["nargs"] = "*"
    elif "bool" in flag.annotation:
        options["nargs"] = "?"
    parser.add_argument(*_spellings(flag.name), **(options | flag.parsing))
    if flag.default is True and flag.annotation in ("bool", "bool | None"):
        no = _spellings(f"no_{flag.name}")
        parser.add_argument(*no, dest=flag.name, action="store_false", default=False, help=flag.help)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def add_config(parser: argparse.ArgumentParser) -> None:
    """The flag of the configuration file; last, when the parser has its other arguments."""
    first = "" if _takes_words(parser) else "; may be the first argument"
    parser.add_argument("--config", metavar="FILE", help=f"YAML or JSON file of flags{first}.")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The flag that names the settings to begin with."""
    parser.add_argument("--recipe", choices=list(RECIPES), help="Take the settings of this data set as defaults.")


def add_preset(parser: argparse.ArgumentParser) -> None:
    """The flag that names settings of the method."""
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="Settings of the method as defaults: recommended is what the measurements speak for, paper Algorithm 2.",
    )


def add_former_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that scripts have, and that `HfArgumentParser` no longer makes since the default is what they say."""
    names = _spellings("no_signed_saliency")
    parser.add_argument(*names, dest="signed_saliency", action="store_false", default=False, help=argparse.SUPPRESS)


def expand_flags(parser: OneLineParser, argv: list[str]) -> tuple[list[str], argparse.Namespace]:
    """The command line with the flags of its configuration file before its own, and what it says; exits if wrong.

    Where it names a recipe or a preset, their settings become defaults of the parser; the preset's come last.
    """
    flags = with_config(parser, argv)
    known, unknown = parser.parse_known_args(flags)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}{near(parser, unknown[0].lstrip('-').split('=')[0])}")
    named = {**RECIPES.get(getattr(known, "recipe", ""), {}), **PRESETS.get(known.preset, {})}
    if named:
        parser.set_defaults(**named)
        known = parser.parse_args(flags)
    return flags, known


def with_config(parser: OneLineParser, argv: Sequence[str], others_follow: bool = False) -> list[str]:
    """The command line with the flags of its configuration file before its own, which override them.

    Args:
        parser: knows the flags.
        argv: the command line; its first argument may be the file, unless the parser takes other such arguments.
        others_follow: flags that the parser does not know are those of another one, which checks them.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-") and not _takes_words(parser):
        argv = ["--config", *argv]
    finder = OneLineParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    add_config(finder)
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return argv
    # Between the two, so that no list of the file goes on into the arguments without a flag.
    return [*config_flags(parser, path, others_follow), f"--config={path}", *argv]


def _takes_words(parser: argparse.ArgumentParser) -> bool:
    """Whether it has arguments without a flag."""
    return any(not action.option_strings for action in parser._actions)


def config_flags(parser: OneLineParser, path: str, others_follow: bool = False) -> list[str]:
    """A configuration file as flags, so that both are checked in the same way."""
    try:
        # JSON is YAML.
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read the configuration file {path!r}: {' '.join(str(error).split())}")
    if not isinstance(config, dict):
        parser.error(f"the configuration file {path!r} must map names of flags to values")
    # The first action of a name: others only say its contrary.
    actions = {action.dest: action for action in reversed(parser._actions) if action.option_strings}
    for key in config:
        if key not in actions and not others_follow:
            parser.error(f"unknown key {key!r} in {path}{near(parser, str(key))}")
    return [
        part for key, value in config.items() if value is not None for part in as_flag(key, value, actions.get(key))
    ]


def as_flag(key: str, value: Any, action: argparse.Action | None = None) -> list[str]:
    """One entry of a configuration file as command line arguments; `action` is the flag's, where it is known."""
    if action is not None and action.nargs == 0 and isinstance(value, bool):
        return [f"--{key}"] if value else []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def near(parser: OneLineParser, name: str) -> str:
    """ ", did you mean ..." where a flag has a similar name."""
    names = [action.dest for action in parser._actions]
    matches = difflib.get_close_matches(name.replace("-", "_"), names, n=3)
    return f": did you mean {', '.join(matches)}?" if matches else ""
