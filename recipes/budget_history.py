"""The history of K: how many training images have which K, after every epoch of a run."""

import bisect
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from run_record import is_number, is_whole, read_json, write_whole
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smoot_hf import SmootTrainer

HISTORY_NAME = "k_history.json"


@dataclass
class BudgetHistory:
    """Histograms of K over the training set.

    Attributes:
        pixels: H * W of an image.
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
        height, width = budget.image_size
        history = (BudgetHistory.load(folder) if epoch else None) or BudgetHistory(height * width, budget.k_min)
        history.add(epoch, budget.histogram.tolist())
        history.save(folder)
