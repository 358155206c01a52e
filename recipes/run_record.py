"""The record of a training run: what was trained, with which seed, data and settings, and what came of K."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from command_line import RecipeArguments
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smoot_hf import MaskBudget, SmootTrainer, SmootTrainingArguments
from smoot_hf.budget_file import MASK_BUDGET_NAME
from smoot_hf.training_args import changed_arguments
from smoot_hf.whole_checkpoints import newest_whole_checkpoint

RECORD_NAME = "run.json"
METHODS = ("standard", "sgt", "smoot")

# What is looked at after training.
_NO_SETTINGS = ("max_eval_samples", "card_samples")


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run; written when training begins, and again when it has ended.

    Attributes:
        method: "standard", "sgt" or "smoot".
        seed: of the initial weights and of all randomness of training.
        settings: the arguments that differ from the library's defaults; `None` where nothing recorded them.
        dataset_fingerprint: of the training set; `None` as above.
        k: "k_min", "k_median" and "k_max" at the end, in pixels; `None` for standard training.
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
            ValueError: no run, or one whose method and seed cannot be told.
        """
        path = folder / RECORD_NAME
        try:
            if path.is_file():
                return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
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


def settings_of(args: SmootTrainingArguments, recipe: RecipeArguments) -> dict[str, Any]:
    """What decides the weights, beside method and seed: the arguments that differ from the library's defaults."""
    kept = {
        f.name: getattr(recipe, f.name)
        for f in dataclasses.fields(recipe)
        if f.name in ("dataset", "model") or (f.name not in _NO_SETTINGS and getattr(recipe, f.name) != f.default)
    }
    return dict(sorted({**kept, **changed_arguments(args)}.items()))


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
