"""A Trainer that resumes from whole checkpoints alone, and with all of their weights."""

import os
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from .checkpoint_weights import has_other_names, load_translated
from .whole_checkpoints import begin_checkpoint, find_damage, newest_whole_checkpoint

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """Goes on after a crash at any moment, also in the middle of a save, from the newest checkpoint that is whole."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; `resume_from_checkpoint=True` passes over checkpoints that are not whole.

        Raises:
            ValueError: there is no whole checkpoint, or the one that is named is not whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir, self.accelerator)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: there is no whole checkpoint in {self.args.output_dir}; leave it "
                    "away to start afresh"
                )
        elif resume_from_checkpoint and (damage := find_damage(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} is not a whole checkpoint: {damage}. Resume from an earlier checkpoint; "
                "resume_from_checkpoint=True finds the newest that is whole"
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of the last step, in mid-epoch: the stock loop would take one step more before it looks.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial=trial)
        if self.args.should_save:
            begin_checkpoint(os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What the first process writes next declares the checkpoint whole, and may cost the previous one its place.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        if any(not os.path.isfile(os.path.join(checkpoint, name)) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)):
            logger.warning(
                f"{checkpoint} has no {OPTIMIZER_NAME} and {SCHEDULER_NAME} (save_only_model?): optimizer and learning "
                "rate start afresh"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_other_names(self.model, resume_from_checkpoint):
            load_translated(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if has_other_names(self.model, best):
            load_translated(self.model, best)
        else:
            super()._load_best_model()
