"""A Trainer whose saving, resuming and pushing fail with one clear error, and lose nothing that was there before."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


class SaveError(OSError):
    """Something could not be written; what had been saved before is as it was."""


class PushError(OSError):
    """The Hub did not take the result, which is whole in the output folder."""


class SavingTrainer(Trainer):
    """Names the folder, the reason and the remedy where a checkpoint, a model or a push fails."""

    hub_model_id: str | None
    push_in_progress: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with _writing(self._get_output_dir(trial=trial)):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with _writing(output_dir or self.args.output_dir):
            super()._save(output_dir, state_dict)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.init_hf_repo`.

        Raises:
            PushError: the Hub cannot be reached, or refuses.
        """
        with _pushing(self.args.hub_model_id or Path(self.args.output_dir).absolute().name, self.args.output_dir):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`; the model is saved locally before anything else.

        Raises:
            PushError: the Hub cannot be reached, or refuses; the model is in `args.output_dir`.
        """
        if self.hub_model_id is None:
            # The Trainer makes the repository first: where that fails, the model would not be saved at all.
            self.save_model(_internal_call=True)
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with _pushing(name, self.args.output_dir):
            return super().push_to_hub(*args, **kwargs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        running = getattr(self, "push_in_progress", None)
        for job in [] if running is None else running.jobs:
            if job.done() and not job.cancelled() and job.exception() is not None:
                logger.warning(f"a checkpoint was not pushed to the Hub ({_reason(job.exception())})")
        self.push_in_progress = None


def make_output_dir(args: TrainingArguments) -> None:
    """Make the output folder, before anything else is done.

    Raises:
        SaveError: it cannot be made.
    """
    if args.should_save:
        with _writing(args.output_dir):
            os.makedirs(args.output_dir, exist_ok=True)


@contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Say which folder could not be written: torch names neither file nor reason, safetensors no file."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SaveError(
            f"cannot write to {folder} ({_reason(error)}; {_free(folder)}): free space or set output_dir to a "
            "folder that can be written. What was saved before is whole: resume from the last complete checkpoint"
        ) from error


@contextmanager
def _pushing(repository: str, folder: str) -> Iterator[None]:
    """Say what to do where the Hub fails, whatever its client raises: the local result is whole."""
    try:
        yield
    except (PushError, SaveError):
        raise
    except Exception as error:
        raise PushError(
            f"cannot push to {repository!r} on the Hub ({_reason(error)}): log in with `hf auth login` and check "
            f"hub_model_id, or try again later; what is saved stays in {folder}: `hf upload {repository} {folder}`"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _free(folder: str) -> str:
    """How much room there is on the disk of a folder that may not exist."""
    place = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return f"{shutil.disk_usage(place).free >> 20} MiB are free on its disk"
