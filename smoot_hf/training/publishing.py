"""The layer of a Trainer that publishes: a push has a card written from the run, and its failure says what to do."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, run_as_future
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from ..errors import PushError, first_line
from ..evaluation.faithfulness import Faithfulness
from ..evaluation.localisation import Localisation
from ..publishing.card import OF_OTHER_DATA, check_card_arguments, write_model_card
from ..publishing.files import CARD_FILES, commit_files, copy_model, model_files, published_content, upload_patterns
from .checkpoints import CheckpointTrainer

logger = logging.get_logger(__name__)

# What the Hub's client raises, and its transport, whose library changes between releases; a RuntimeError says which
# file did not arrive.
_HUB_ERRORS = (OSError, HTTPError, HFValidationError, RuntimeError)


class PublishingTrainer(CheckpointTrainer):
    """The layer of publishing: what is trained is pushed to the Hub with a card that is written from the run.

    Attributes:
        failed_pushes: pushes in the background that failed and that no later push has made up for. Maps the place in
            the repository ("." for the model itself) to one line with the reason and what to do. Each is also logged
            when it fails.
    """

    hub_model_id: str | None
    push_in_progress: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failed_pushes: dict[str, str] = {}
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
        localisation: Localisation | None = None,
    ) -> None:
        """Write the model card `README.md`, its figures and `results.json` into the output folder.

        Everything on the card comes from the run and from these arguments. `push_to_hub` takes the same arguments:
        `trainer.push_to_hub(faithfulness=[found])`.

        Args:
            language: as in `Trainer`.
            license: licence of the model. There is no default, since the run does not know it.
            tags: further tags, in addition to those of the card.
            model_name: heading of the card. Default: the name of the output folder.
            finetuned_from: Hub id of the model that training started from. Default: what the model's configuration
                names, unless that is a folder.
            tasks: beside image classification.
            dataset_tags: Hub id of the data set. Default: read from the training set, where it came from the Hub.
            dataset: name of the data set. Default: `dataset_tags`. Without either the metadata have no results.
            dataset_args: configuration of the data set, by its name.
            faithfulness: of this model on the evaluation set, one for each convention; adds the curves and, where
                `eval_dataset` is one set, a grid of saliency maps. What was not measured is not on the card.
            localisation: of this model on the evaluation set, where that says where the evidence is.

        Raises:
            SaveError: the output folder cannot be written to.
        """
        if not self.is_world_process_zero():
            return
        write_model_card(
            self,
            faithfulness=faithfulness,
            localisation=localisation,
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

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; the log keeps whether it was of the trainer's own evaluation set, for the card."""
        before = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if not self._is_own_evaluation_set(eval_dataset):
            for entry in self.state.log_history[before:]:
                entry[OF_OTHER_DATA] = True
        return metrics

    def _is_own_evaluation_set(self, dataset: Any) -> bool:
        own = self.eval_dataset
        sets = [own, *own.values()] if isinstance(own, dict) else [own]
        # The name of one of several sets stands for it.
        return dataset is None or isinstance(dataset, str) or any(dataset is one for one in sets)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.init_hf_repo`.

        Raises:
            PushError: the Hub cannot be reached, or refuses.
        """
        with self._pushing():
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model, write its card, and publish both; the arguments are those of `Trainer.push_to_hub`.

        What else lies in the output folder stays there: uploaded are the model, its processor and code, the training
        arguments without local paths, the card with its figures, and `results.json`. Where the card cannot be written,
        or the Hub does not take it, a warning says why and the model is published without one.

        Args:
            commit_message: of the commit.
            blocking: wait until everything is uploaded.
            token: in place of `args.hub_token`.
            revision: branch to publish to, in place of `args.hub_revision`.
            private: whether a new repository is, in place of `args.hub_private_repo`.
            **card: the arguments of `create_model_card`.

        Returns:
            The commit, or what becomes it where `blocking=False`; `None` on all processes but the first.

        Raises:
            TypeError: an argument that `create_model_card` does not take; nothing was done.
            PushError: the Hub cannot be reached, or refuses; the model is in `args.output_dir`.
            SaveError: the model cannot be saved.
        """
        check_card_arguments(self.create_model_card, card)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        # Before the Hub is asked for anything: where it fails, the model is saved.
        self.save_model(_internal_call=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        has_card = self._has_written_card(card)
        self._finish_current_push()
        folder = self.args.output_dir
        names = [*model_files(self, folder), TRAINING_ARGS_NAME, *(CARD_FILES if has_card else ())]
        upload = self._upload(folder, names, ".", commit_message, token, revision)
        with self._pushing():
            if not blocking:
                return self._in_background(upload, folder, ".")
            commit = upload()
        self.failed_pushes.pop(".", None)
        return commit

    def _has_written_card(self, card: dict[str, Any]) -> bool:
        """Write the card; `False`, with a warning, where that fails: nothing must keep the model from being pushed."""
        default = (self.args.hub_model_id or self.args.output_dir).rstrip("/").split("/")[-1]
        tags = [card["tags"]] if isinstance(card.get("tags"), str) else list(card.get("tags") or [])
        # As the Trainer does: tags that the model brings along.
        tags += [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        try:
            self.create_model_card(**{**card, "model_name": card.get("model_name") or default, "tags": tags})
        # The card runs the model, the data set and the user's own code, which may raise anything.
        except Exception as error:
            logger.warning(
                f"the model is pushed without a card, which could not be written ({type(error).__name__}: "
                f"{first_line(error)}): trainer.create_model_card() shows where"
            )
            return False
        return True

    def _upload(
        self, folder: str, names: Sequence[str], place: str, message: str | None, token: str | None, revision: Any
    ) -> partial[CommitInfo]:
        """What commits files of a folder to a place in the repository ("." for its root), when it is called."""
        prefix = "" if place == "." else f"{place}/"
        files = {
            f"{prefix}{name}": published_content(path, self.args)
            for name in names
            if (path := Path(folder) / name).is_file()
        }
        revision = self.args.hub_revision if revision is None else revision
        return partial(commit_files, str(self.hub_model_id), files, message, token, revision)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The Trainer deletes old checkpoints while they are uploaded, and with hub_always_push a model that is uploaded
        # would be written over: the Hub refuses what changes on its way.
        args = self.args
        if args.push_to_hub and (args.hub_always_push or (args.save_total_limit and self._pushes_checkpoints())):
            self._finish_current_push()
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which would publish everything that lies in the output folder."""
        args, progress = self.args, self.push_in_progress
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        is_busy = progress is not None and not progress.is_done()
        if is_busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # To where nothing changes it while it is uploaded.
        names = copy_model(self, checkpoint_folder)
        step = f"step {self.state.global_step}" if args.save_strategy == SaveStrategy.STEPS else None
        message = f"Training in progress, {step or f'epoch {int(self.state.epoch)}'}"
        uploads = [(args.output_dir, names, ".", message)]
        if self._pushes_checkpoints():
            checkpoint = Path(checkpoint_folder)
            # Training goes on from all of it.
            whole = sorted(p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file())
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            uploads.append((checkpoint_folder, whole, place, f"{message}, checkpoint"))
        jobs = []
        for folder, chosen, place, said in uploads:
            upload = self._upload(folder, chosen, place, said, args.hub_token, None)
            jobs.append(self._in_background(upload, folder, place))
        self.push_in_progress = PushInProgress([*(progress.jobs if progress is not None and is_busy else ()), *jobs])

    def _pushes_checkpoints(self) -> bool:
        return self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)

    def _in_background(self, upload: Callable[[], CommitInfo], folder: str, place: str) -> Future[CommitInfo]:
        return run_as_future(self._upload_and_note, upload, folder, place)

    def _upload_and_note(self, upload: Callable[[], CommitInfo], folder: str, place: str) -> CommitInfo:
        """Upload, and note how it ended: the Trainer waits for its jobs and never asks."""
        try:
            commit = upload()
        except Exception as error:  # raised again: whoever asks the job gets it as it is
            self.failed_pushes[place] = self._not_pushed(error, folder, place)
            logger.warning(self.failed_pushes[place])
            raise
        self.failed_pushes.pop(place, None)
        return commit

    @contextmanager
    def _pushing(self) -> Iterator[None]:
        """Say what to do where the Hub fails; for calls of its client alone, whose errors are of these classes."""
        try:
            yield
        except _HUB_ERRORS as error:
            raise PushError(self._not_pushed(error, self.args.output_dir)) from error

    def _not_pushed(self, error: BaseException, folder: str, place: str = ".") -> str:
        # The full name is known once the Hub has been asked.
        repo = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        words = ["hf", "upload"]
        if self.args.hub_revision:
            words += ["--revision", self.args.hub_revision]
        if place == ".":
            for pattern in upload_patterns(model_files(self, folder), folder):
                words += ["--include", pattern]
        # A folder whose name begins with a dash is no option.
        command = shlex.join([*words, "--", repo, folder, place])
        return (
            f"cannot push to {repo!r} on the Hub ({first_line(error)}): log in with `hf auth login` and check "
            f"hub_model_id, or try again later; what is saved stays in {folder}: `{command}`"
        )
