"""A Trainer whose pushes carry a card written from the run, and say what to do when they fail."""

import glob
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .evaluation import Faithfulness
from .model_card import write_model_card

logger = logging.get_logger(__name__)


class HubTrainer(Trainer):
    """A `Trainer` that publishes what it has trained.

    Attributes:
        failed_pushes: one line for every push of training state that failed in the background, with what to do. All
            failures are logged; what other strategies push during training, the next push takes along.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failed_pushes: list[str] = []
        self._watched_pushes: list[Future] = []
        super().__init__(*args, **kwargs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        faithfulness: Sequence[Faithfulness] = (),
    ) -> None:
        """Write `README.md`, its figures and `results.json` into the output folder, from the run alone.

        What `push_to_hub` does not know itself is passed through it: `trainer.push_to_hub(faithfulness=[found])`.

        Args:
            language: as in `Trainer`.
            license: of the model. There is no default: it is not known from the run.
            tags: beside those of the card.
            model_name: heading. Default: the name of the output folder.
            finetuned_from: Hub id of the model that training started from. Default: what the model's configuration
                names, unless that is a folder.
            tasks: beside image classification.
            dataset_tags: Hub id of the data set. Default: read from the training set, where it came from the Hub.
            dataset: name of the data set. Default: `dataset_tags`. Without either the metadata have no results.
            dataset_args: configuration of the data set, by its name.
            faithfulness: of this model on the evaluation set, one for each convention; adds the curves and a grid of
                saliency maps. What was not measured is not on the card.
        """
        if not self.is_world_process_zero():
            return
        write_model_card(
            self,
            faithfulness=faithfulness,
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`; the error of a push that failed says what to do, in a note."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            error.add_note(self._what_to_do(self.args.output_dir))
            raise

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The Trainer deletes old checkpoints, and skips new ones, while the upload of one is under way.
        if self._pushes_checkpoints() and self.args.save_total_limit:
            self._finish_current_push()
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            # The Trainer takes weights and configuration along, but not the code that the configuration names.
            for code in glob.glob(os.path.join(glob.escape(checkpoint_folder), "*.py")):
                shutil.copy(code, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", []):
            if job not in self._watched_pushes:
                self._watched_pushes.append(job)
                job.add_done_callback(partial(self._note_failure, checkpoint_folder))

    def _pushes_checkpoints(self) -> bool:
        return self.args.push_to_hub and self.args.hub_strategy in (
            HubStrategy.CHECKPOINT,
            HubStrategy.ALL_CHECKPOINTS,
        )

    def _note_failure(self, checkpoint_folder: str, job: Future) -> None:
        """The Trainer waits for its jobs and never asks how they ended."""
        error = None if job.cancelled() else job.exception()
        if error is None:
            return
        line = f"a push during training failed: {first_line(error)}. "
        if self._pushes_checkpoints():
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else os.path.basename(checkpoint_folder)
            line += self._what_to_do(checkpoint_folder, place)
            self.failed_pushes.append(line)
        else:
            line += "Nothing is lost: the next push takes it along"
        logger.warning(line)

    def _what_to_do(self, folder: str, place: str = ".") -> str:
        repo = getattr(self, "hub_model_id", None) or self.args.hub_model_id or "USER/NAME"
        exclude = " --exclude 'checkpoint-*'" if place == "." else ""
        return (
            f"Nothing is lost: {folder} has it all. Check `hf auth whoami` and that you may write to {repo}, then push "
            f"it again: hf upload {repo} {folder} {place}{exclude}"
        )


def first_line(error: BaseException) -> str:
    """What an error says, in one line, with its cause where it says no more than that something failed."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    lines = lines or [type(error).__name__]
    cause = "" if error.__cause__ is None or len(lines) > 1 else f" ({first_line(error.__cause__)})"
    return lines[0].strip().rstrip(".:") + cause
