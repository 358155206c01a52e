"""A Trainer whose saving and resuming fail with one clear error, and lose nothing that was there before."""

import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments


class SaveError(OSError):
    """Something could not be written; what had been saved before is as it was."""


class SavingTrainer(Trainer):
    """Names the folder, the reason and the remedy where a checkpoint or a model cannot be written or read."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with writing(self._get_output_dir(trial=trial)):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with writing(output_dir or self.args.output_dir):
            super()._save(output_dir, state_dict)


def make_output_dir(args: TrainingArguments) -> None:
    """Make the output folder, before anything else is done.

    Raises:
        SaveError: it cannot be made.
    """
    if args.should_save:
        with writing(args.output_dir):
            os.makedirs(args.output_dir, exist_ok=True)


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Say which folder could not be written: torch names neither file nor reason, safetensors no file.

    Any other error passes as it is: memory that is used up, or a model whose state cannot be gathered.

    Raises:
        SaveError: a file could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_a_file(error):
            raise
        raise SaveError(
            f"cannot write to {folder} ({first_line(error)}; {_free(folder)}): free space or set output_dir to a "
            "folder that can be written. What was saved before is whole: resume from the last complete checkpoint"
        ) from error


def _is_of_a_file(error: BaseException) -> bool:
    """Whether an error in a save says that a file could not be written."""
    if isinstance(error, SaveError | ConnectionError | TimeoutError | HfHubHTTPError):
        return False
    if isinstance(error, OSError | SafetensorError):
        return True
    # torch.save reports a full disk by a plain RuntimeError of changing words: the place it comes from tells.
    places = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return type(error) is RuntimeError and "torch.serialization" in places


def first_line(error: BaseException) -> str:
    """What an error says, in one line, with its cause where it says no more than that something failed."""
    # Requests of the Hub's client have their number on a line of its own.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    lines = lines or [type(error).__name__]
    line = lines[0].strip().rstrip(".:")
    if error.__cause__ is None or len(lines) > 1 or first_line(error.__cause__) in line:
        return line
    return f"{line} ({first_line(error.__cause__)})"


def _free(folder: str) -> str:
    """How much room there is on the disk of a folder that may not exist."""
    place = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return f"{shutil.disk_usage(place).free >> 20} MiB are free on its disk"
