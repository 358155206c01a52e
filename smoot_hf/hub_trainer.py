"""A Trainer whose pushes carry a card written from the run, and say what to do when they fail."""

import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .evaluation import Faithfulness
from .model_card import write_model_card
from .saving_trainer import SaveError, SavingTrainer, first_line, writing

logger = logging.get_logger(__name__)


class PushError(OSError):
    """The Hub did not take the result, which is whole in the output folder."""


class HubTrainer(SavingTrainer):
    """A `Trainer` that publishes what it has trained.

    Attributes:
        failed_pushes: what the Hub lacks because a push in the background failed and none after it made up for it:
            place in the repository ("." for the model itself) -> one line with the reason and what to do. Each is
            logged when it fails.
    """

    hub_model_id: str | None
    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failed_pushes: dict[str, str] = {}
        # Those under way, and where their folder goes: (job, folder, place in the repository).
        self._pushes: list[tuple[Future, str, str]] = []
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
        with writing(self.args.output_dir):
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

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.init_hf_repo`.

        Raises:
            PushError: the Hub cannot be reached, or refuses.
        """
        with self._pushing():
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`, with the arguments of `create_model_card`; the model is saved before anything else.

        Raises:
            PushError: the Hub cannot be reached, or refuses; the model is in `args.output_dir`.
        """
        if self.hub_model_id is None:
            # The Trainer makes the repository first: where that fails, the model would not be saved at all.
            self.save_model(_internal_call=True)
        with self._pushing():
            pushed = super().push_to_hub(*args, **kwargs)
        if isinstance(pushed, Future):
            pushed.add_done_callback(partial(self._note_end, self.args.output_dir, "."))
        else:
            self.failed_pushes.pop(".", None)
        return pushed

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The Trainer deletes old checkpoints while they are uploaded, and with hub_always_push it writes over a model
        # that is: the Hub refuses what changes on its way.
        args = self.args
        if args.push_to_hub and (args.hub_always_push or (args.save_total_limit and self._pushes_checkpoints())):
            self._finish_current_push()
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero():
            return
        # The Trainer takes weights and configuration along, but not the code that the configuration names.
        for code in Path(checkpoint_folder).glob("*.py"):
            there = Path(self.args.output_dir) / code.name
            if not there.is_file() or there.read_bytes() != code.read_bytes():
                shutil.copy(code, there)
        self._settle_pushes()
        earlier = self._push_jobs()
        super()._push_from_checkpoint(checkpoint_folder)
        is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
        place = "last-checkpoint" if is_last else os.path.basename(checkpoint_folder)
        # The model's comes first, then that of the training state, where the strategy has one.
        folders = [(self.args.output_dir, "."), (checkpoint_folder, place)]
        new = [job for job in self._push_jobs() if job not in earlier]
        self._pushes += [(job, *pushed) for job, pushed in zip(new, folders, strict=False)]

    def _push_jobs(self) -> list[Future]:
        return [] if self.push_in_progress is None else list(self.push_in_progress.jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._settle_pushes()

    def _settle_pushes(self) -> None:
        """Note how the pushes ended that did: the Trainer waits for its jobs and never asks."""
        ended = [push for push in self._pushes if push[0].done()]
        self._pushes = [push for push in self._pushes if push not in ended]
        for job, folder, place in ended:
            self._note_end(folder, place, job)

    def _pushes_checkpoints(self) -> bool:
        return self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)

    def _note_end(self, folder: str, place: str, job: Future) -> None:
        error = None if job.cancelled() else job.exception()
        if error is None:
            self.failed_pushes.pop(place, None)
            return
        self.failed_pushes[place] = self._not_pushed(error, folder, place)
        logger.warning(self.failed_pushes[place])

    @contextmanager
    def _pushing(self) -> Iterator[None]:
        """Say what to do where the Hub fails, whatever its client raises: the local result is whole."""
        try:
            yield
        except (PushError, SaveError):
            raise
        except Exception as error:
            raise PushError(self._not_pushed(error, self.args.output_dir)) from error

    def _not_pushed(self, error: BaseException, folder: str, place: str = ".") -> str:
        # The full name is known once the Hub has been asked.
        repo = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        revision = ["--revision", self.args.hub_revision] if self.args.hub_revision else []
        command = shlex.join(["hf", "upload", repo, folder, place, *revision])
        if place == ".":
            # As the Trainer does.
            command += " --exclude 'checkpoint-*'"
        return (
            f"cannot push to {repo!r} on the Hub ({first_line(error)}): log in with `hf auth login` and check "
            f"hub_model_id, or try again later; what is saved stays in {folder}: `{command}`"
        )
