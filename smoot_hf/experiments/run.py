"""The record of a training run: what was trained, with which seed, data and settings, and what came of K."""

import bisect
import dataclasses
import itertools
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..training import MaskBudget, SmootTrainer, SmootTrainingArguments
from ..training.checkpoint_folder import newest_whole_checkpoint
from ..training.mask_budget_file import MASK_BUDGET_NAME
from .flags import METHODS, RecipeArguments

RECORD_NAME = "run.json"
HISTORY_NAME = "k_history.json"

# What is looked at after training.
_NO_SETTINGS = ("max_eval_samples", "card_samples")
# NumPy takes no other seeds.
_SEEDS = 2**32
# Above every number of pixels and of seconds that a run can have.
_LARGEST = 2**53
# Of nested values in a run's files, which have three.
_LEVELS = 10


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run; written when training begins, and again when it has ended.

    Attributes:
        method: "standard", "sgt" or "smoot".
        seed: of the initial weights and of all randomness of training.
        settings: the arguments that differ from the library's defaults; `None` where nothing recorded them.
        dataset_fingerprint: of the training set; `None` as above.
        k: "k_min", "k_median" and "k_max" at the end, in positions; `None` for standard training.
        train_seconds: wall-clock time of training; `None` where nothing recorded it.
        is_finished: whether training has ended.
    """

    method: str
    seed: int
    settings: dict[str, Any] | None = None
    dataset_fingerprint: str | None = None
    k: dict[str, float] | None = None
    train_seconds: float | None = None
    is_finished: bool = True

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"{self.method}-seed{self.seed}"

    def save(self, folder: str | Path) -> None:
        """Write `run.json` into the run's folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_whole(Path(folder) / RECORD_NAME, text)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the record, or make one from the folder's name and its last checkpoint.

        Raises:
            ValueError: no run, one whose method and seed cannot be told, or a `run.json` that is not what this package
                writes; the message names the file, the entry and its value.
        """
        path = folder / RECORD_NAME
        if path.is_file():
            content = read_json(path)
            check_record(content, path)
            return cls(**content)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no finished run: no {RECORD_NAME}, no config.json")
        method, seed = re.search(r"standard|sgt|smoot", folder.name), re.search(r"seed[-_]?(\d+)", folder.name)
        if method is None or seed is None:
            raise ValueError(f"{folder} has no {RECORD_NAME}: its name must say method and seed, as in smoot-seed0")
        return cls(method.group(), int(seed.group(1)), k=_k_of_checkpoint(folder))

    @classmethod
    def of(
        cls,
        trainer: SmootTrainer,
        args: SmootTrainingArguments,
        recipe: RecipeArguments,
        train_seconds: float | None = None,
    ) -> Self:
        """The record of the run that `trainer` is about to begin or, where `train_seconds` are known, has finished."""
        budget = trainer.mask_budget
        return cls(
            method=args.method,
            seed=args.seed,
            settings=settings_of(args, recipe),
            dataset_fingerprint=getattr(trainer.train_dataset, "fingerprint", None),
            k=None if budget is None else budget.statistics(),
            train_seconds=train_seconds,
            is_finished=train_seconds is not None,
        )


class SaveRecord(TrainerCallback):
    """Writes the record when training begins: a run that is refused leaves that of the run before it as it is."""

    def __init__(self, trainer: SmootTrainer, args: SmootTrainingArguments, recipe: RecipeArguments) -> None:
        self.trainer, self.args, self.recipe = trainer, args, recipe

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """On the first process."""
        if state.is_world_process_zero:
            RunRecord.of(self.trainer, self.args, self.recipe).save(self.args.output_dir)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all: a run that is killed here must be able to go on."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file that this package has written, or somebody else.

    Raises:
        ValueError: it is no JSON, or JSON that this package never writes: NaN or infinity, numbers of thousands of
            digits, or values nested more than ten deep.
    """

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not a finite number")
        return value

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    level = [content]
    for _ in range(_LEVELS):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise ValueError(f"{path} cannot be read: its values are nested more than {_LEVELS} deep")
    return content


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def check_record(content: Any, path: Path) -> None:
    """Refuse what `RunRecord.save` never wrote: names are used for folders and labels, numbers for tables.

    Args:
        content: of `run.json`.
        path: of the file, for the message.

    Raises:
        ValueError: naming the file, the entry and its value.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {reprlib.repr(content)}")
    names = {field.name for field in dataclasses.fields(RunRecord)}
    unknown = next((name for name in content if name not in names), None)
    if unknown is not None:
        raise ValueError(f"{path} has an unknown entry {reprlib.repr(unknown)}, known are {', '.join(sorted(names))}")
    for name, (is_right, expected) in _ENTRIES.items():
        if name in content and not is_right(content[name]):
            raise ValueError(f"{path}: {name} must be {expected}, got {reprlib.repr(content[name])}")
    missing = next((name for name in ("method", "seed") if name not in content), None)
    if missing is not None:
        raise ValueError(f"{path} has no entry {missing!r}")
    for name, hint in get_type_hints(RecipeArguments).items():
        settings = content.get("settings") or {}
        if name in settings and not _is_of_type(settings[name], hint):
            raise ValueError(f"{path}: settings.{name} must be {_words(hint)}, got {reprlib.repr(settings[name])}")


def is_number(value: Any, largest: float = _LARGEST) -> bool:
    """A number from 0 to `largest`; to Python, True is a number as well."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= largest


def is_whole(value: Any, largest: float = _LARGEST) -> bool:
    """A whole number from 0 to `largest`."""
    return isinstance(value, int) and is_number(value, largest)


def _is_budget(value: Any) -> bool:
    names = ("k_min", "k_median", "k_max")
    if not isinstance(value, dict) or value.keys() != set(names) or not all(map(is_number, value.values())):
        return False
    return value["k_min"] <= value["k_median"] <= value["k_max"]


# Entry of `run.json` -> whether a value is right, and what would be.
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (lambda value: value in METHODS, f"one of {', '.join(METHODS)}"),
    "seed": (lambda value: is_whole(value, _SEEDS - 1), f"a whole number from 0 to {_SEEDS - 1}"),
    "settings": (lambda value: value is None or isinstance(value, dict), "an object or null"),
    "dataset_fingerprint": (lambda value: value is None or isinstance(value, str), "text or null"),
    "k": (
        lambda value: value is None or _is_budget(value),
        "null or an object of the numbers k_min <= k_median <= k_max from 0",
    ),
    "train_seconds": (lambda value: value is None or is_number(value), "null or a number from 0"),
    "is_finished": (lambda value: isinstance(value, bool), "true or false"),
}


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of one of the fields of `RecipeArguments`."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    # To Python, True is a whole number.
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return " or ".join({str: "text", int: "a whole number", bool: "true or false"}.get(kind, "null")
                       for kind in (get_args(hint) or (hint,)))  # fmt: skip


def settings_of(args: SmootTrainingArguments, recipe: RecipeArguments) -> dict[str, Any]:
    """What decides the weights, beside method and seed: the arguments that differ from the library's defaults."""
    kept = {
        f.name: getattr(recipe, f.name)
        for f in dataclasses.fields(recipe)
        if f.name in ("dataset", "model") or (f.name not in _NO_SETTINGS and getattr(recipe, f.name) != f.default)
    }
    return dict(sorted({**kept, **args.changed_from_defaults()}.items()))


def difference(recorded: dict[str, Any] | None, asked: dict[str, Any] | None) -> str | None:
    """The first setting in which a run is not what is asked for, in words; `None` where it is, or nobody knows.

    The name of the data set is left out: the same images may lie in several places, and their fingerprint tells.
    """
    if recorded is None or asked is None:
        return None
    for name in sorted((recorded.keys() | asked.keys()) - {"dataset"}):
        if recorded.get(name) != asked.get(name):
            return f"{name}={recorded.get(name, 'default')}, not {asked.get(name, 'default')}"
    return None


def _k_of_checkpoint(folder: Path) -> dict[str, float] | None:
    checkpoint = newest_whole_checkpoint(folder)
    path = None if checkpoint is None else Path(checkpoint) / MASK_BUDGET_NAME
    if path is None or not path.is_file():
        return None
    return MaskBudget.load(path).statistics()


class Run(NamedTuple):
    """A training run and its folder."""

    folder: Path
    record: RunRecord


@dataclass
class BudgetHistory:
    """Histograms of K over the training set.

    Attributes:
        pixels: positions of an image: its H * W pixels, or the cells of `mask_cell`.
        k_min: the K that the first number of every histogram counts; the others follow by one.
        epochs: epochs completed at each histogram, rising from 0.
        counts: the histograms, in the order of the epochs.
    """

    pixels: int
    k_min: int
    epochs: list[float] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)

    def add(self, epoch: float, counts: list[int]) -> None:
        """Append; what a resumed run does again replaces what was there."""
        while self.epochs and self.epochs[-1] >= epoch:
            self.epochs.pop()
            self.counts.pop()
        self.epochs.append(epoch)
        self.counts.append(counts)

    def statistics(self) -> dict[str, list[float]]:
        """Epochs and, for each, minimum, quartiles and maximum of K: the least K that so many images do not exceed."""
        shares = {"min": 0.0, "lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75, "max": 1.0}
        found: dict[str, list[float]] = {"epoch": self.epochs, **{name: [] for name in shares}}
        for counts in self.counts:
            cumulative = list(itertools.accumulate(counts))
            for name, share in shares.items():
                rank = max(1, math.ceil(share * cumulative[-1]))
                found[name].append(self.k_min + bisect.bisect_left(cumulative, rank))
        return found

    def save(self, folder: str | Path) -> None:
        """Write `k_history.json`."""
        write_whole(Path(folder) / HISTORY_NAME, json.dumps(vars(self)) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """Read `k_history.json`; `None` where there is none.

        Raises:
            ValueError: it is not what `save` writes; the message names the file and what is wrong.
        """
        path = Path(folder) / HISTORY_NAME
        if not path.is_file():
            return None
        content = read_json(path)
        names = {"pixels", "k_min", "epochs", "counts"}
        if not isinstance(content, dict) or content.keys() != names:
            raise ValueError(f"{path} must hold an object of {', '.join(sorted(names))}")
        pixels, k_min, epochs, counts = (content[name] for name in ("pixels", "k_min", "epochs", "counts"))
        if not (is_whole(pixels) and is_whole(k_min, pixels)):
            raise ValueError(f"{path}: k_min and pixels must be whole numbers, 0 <= k_min <= pixels")
        if not (isinstance(epochs, list) and all(map(is_number, epochs)) and sorted(set(epochs)) == epochs):
            raise ValueError(f"{path}: epochs must be rising numbers from 0")
        if not (isinstance(counts, list) and len(counts) == len(epochs) and all(map(_is_histogram, counts))):
            raise ValueError(f"{path}: counts must be one list of whole numbers, not all zero, for each of the epochs")
        if any(len(one) != len(counts[0]) or k_min + len(one) > pixels + 1 for one in counts):
            raise ValueError(f"{path}: counts must be lists of one length, for numbers from k_min to at most pixels")
        return cls(pixels, k_min, epochs, counts)


def _is_histogram(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_whole, value)) and any(value)


class RecordBudget(TrainerCallback):
    """Writes the histogram of K into the run's folder before training and after every epoch."""

    def __init__(self, trainer: SmootTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Epoch 0, or that of the checkpoint that training goes on from."""
        self._record(args, state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After an epoch."""
        self._record(args, state)

    def _record(self, args: TrainingArguments, state: TrainerState) -> None:
        budget = self.trainer.mask_budget
        if budget is None or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        epoch = round(state.epoch or 0.0, 4)
        history = (BudgetHistory.load(folder) if epoch else None) or BudgetHistory(budget.positions, budget.k_min)
        history.add(epoch, budget.histogram.tolist())
        history.save(folder)
