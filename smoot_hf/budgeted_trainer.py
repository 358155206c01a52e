"""A Trainer that keeps a K for every training sample, for as long as the training lives."""

import os
import weakref
from typing import Any

from torch import Tensor
from transformers.utils import logging

from .budget_file import MASK_BUDGET_NAME
from .budget_moves import BudgetMoves
from .fingerprint import is_identified
from .host_memory import freed_memory_kept
from .indexed_trainer import IndexedTrainer
from .mask_budget import MaskBudget
from .random_state import random_state_kept
from .refusals import refuse_unsupported
from .resumable_trainer import ResumableTrainer
from .run_identity import RunIdentity
from .training_args import SmootTrainingArguments
from .training_log import LogWindow
from .whole_checkpoints import require_one_content

logger = logging.get_logger(__name__)


class BudgetedTrainer(IndexedTrainer, ResumableTrainer):
    """K begins with a training, moves with its steps, is saved and restored with the optimizer's state.

    Attributes:
        mask_budget: `MaskBudget` of the training set, the same on every process; `None` for standard training.
    """

    args: SmootTrainingArguments
    mask_budget: MaskBudget | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.mask_budget = None
        # The model and the training set that K belongs to.
        self._budgeted: tuple[Any, Any] = (None, None)
        super().__init__(*args, **kwargs)
        self._log_window = LogWindow()
        self._budget_moves = BudgetMoves(self.accelerator, self._move_budget)
        self.add_callback(self._budget_moves)

    def begin_mask_budget(self) -> None:
        """K of every training sample at its start; looks at the first sample for the size of the images."""
        dataset, collator = self.indexed_parts(self.train_dataset, "training")
        with random_state_kept():
            first = collator(dataset.__getitems__([0]))
        # Weak: a search frees the model of each trial.
        self._budgeted = weakref.ref(self.model), self.train_dataset
        self.mask_budget = MaskBudget.for_training(
            self.args, len(dataset), first["pixel_values"].shape[-2:], self.dataset_fingerprint()
        )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Every training starts here: by `train`, for each trial of a search, and again for each batch size tried."""
        self.args.check_smoot_fields()
        refuse_unsupported(self)
        if self.args.method == "standard" or self.train_dataset is None:
            self.mask_budget = None
        else:
            model, dataset = self._budgeted
            if self.mask_budget is not None and model() is self.model and dataset is self.train_dataset:
                self.mask_budget.forget_visits()
            else:
                self.begin_mask_budget()
        self._log_window = LogWindow()
        self._budget_moves.begin(self.accelerator)
        with freed_memory_kept(self.args.device.type == "cpu"):
            return super()._inner_training_loop(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.mask_budget is not None and self.args.should_save:
            self.mask_budget.save(os.path.join(output_dir, MASK_BUDGET_NAME), self._origin(self.run_identity))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.mask_budget is None:
            return
        path = os.path.join(checkpoint, MASK_BUDGET_NAME)
        if os.path.isfile(path):
            self.mask_budget.restore(path, self._origin(RunIdentity.load(checkpoint)))
            if not is_identified(self.mask_budget.dataset_fingerprint):
                logger.warning(
                    f"K is taken from {path} row by row, but nothing identifies the training set: it must be the same, "
                    "in the same order. Give the data set an attribute `fingerprint`, a string that changes with its "
                    "content, and it is checked"
                )
        else:
            logger.warning(f"{checkpoint} has no {MASK_BUDGET_NAME}: K starts afresh at mask_ratio")
            self.begin_mask_budget()
        require_one_content(self.mask_budget.digest(), path, self.accelerator)

    def _origin(self, run: RunIdentity | None) -> dict[str, Any]:
        """What stands in the file of K beside the data: which training it is of, and after how many of its steps."""
        run_id = None if run is None else run.run_id
        return {"run_id": run_id, "seed": self.args.seed, "global_step": self.state.global_step}

    def _move_budget(self, sample_idx: Tensor, delta: Tensor) -> None:
        """Move K by what all processes saw, on each of them alike, once the optimizer has stepped."""
        budget = self.mask_budget
        assert budget is not None
        moved = budget.update(sample_idx, delta, self.args.step_in_pixels(budget.image_size), self.args.rounding)
        self._log_window.add(k_up=moved > 0, k_down=moved < 0)
