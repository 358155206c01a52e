"""A Trainer whose saving and resuming fail with one clear error, and lose nothing that was there before."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoint_weights import has_other_names, load_translated


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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        require_whole(resume_from_checkpoint)
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
    """Say which folder could not be written: torch names neither file nor reason, safetensors no file."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SaveError(
            f"cannot write to {folder} ({first_line(error)}; {_free(folder)}): free space or set output_dir to a "
            "folder that can be written. What was saved before is whole: resume from the last complete checkpoint"
        ) from error


def require_whole(checkpoint: str) -> None:
    """Refuse a checkpoint of which a file is missing or torn, before anything is taken up from it.

    Only the ends and headers of files are read: a torn file is told from a whole one, a flipped bit is not.

    Args:
        checkpoint: its folder.

    Raises:
        ValueError: naming the file.
    """
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{checkpoint} is no checkpoint to resume from: it has no {TRAINER_STATE_NAME}")
    for path in sorted(folder.iterdir()):
        try:
            if path.name == TRAINER_STATE_NAME:
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(str(path), framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                raise ValueError("its end is missing")
        except (ValueError, OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({first_line(error)}): resume from an earlier checkpoint") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line, with its cause where it says no more than that something failed."""
    # Requests of the Hub's client have their number on a line of its own.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    lines = lines or [type(error).__name__]
    cause = "" if error.__cause__ is None or len(lines) > 1 else f" ({first_line(error.__cause__)})"
    return lines[0].strip().rstrip(".:") + cause


def _free(folder: str) -> str:
    """How much room there is on the disk of a folder that may not exist."""
    place = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    return f"{shutil.disk_usage(place).free >> 20} MiB are free on its disk"
