"""The files that are published: which of an output folder are uploaded, what of their content, and the commit.

Only listed files are published. The folder of a run also holds records with local paths, logs with the name of the
machine, and files of the user.
"""

import copy
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, create_commit
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import TrainingArguments
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

logger = logging.get_logger(__name__)

FIGURES = "figures"
FIGURE_NAMES = ("k_histogram", "curves", "saliency")
CARD_FILES = ("README.md", "results.json", *(f"{FIGURES}/{name}.png" for name in FIGURE_NAMES))

_ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
_WHOLE_MODEL_FILES = (CONFIG_NAME, GENERATION_CONFIG_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_NAME)
_INDICES = (WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_INDEX_NAME)


def model_files(trainer: Any, folder: str | Path) -> list[str]:
    """What a folder holds of the trainer's model: weights, configuration, processor, and the code that these name.

    Args:
        trainer: a `Trainer`.
        folder: an output folder or a checkpoint.

    Returns:
        Paths below the folder, with "/" on every system.
    """
    folder = Path(folder)
    model = trainer.accelerator.unwrap_model(trainer.model)
    names = [*_WHOLE_MODEL_FILES, *_ADAPTER_FILES, *_INDICES]
    for index in _INDICES:
        if (folder / index).is_file():
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            # Shards lie beside their index.
            names += sorted({Path(shard).name for shard in shards})
    # Adapters beside the first one have folders of their own.
    names += [f"{adapter}/{name}" for adapter in getattr(model, "peft_config", {}) for name in _ADAPTER_FILES]
    names += _files_of_parts(trainer, model)
    return [name for name in dict.fromkeys(names) if (folder / name).is_file()]


def _files_of_parts(trainer: Any, model: Any) -> list[str]:
    """Names of the files of the processor and of the code, found by saving both into an empty folder."""
    processor = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    with TemporaryDirectory() as folder:
        if processor is not None:
            processor.save_pretrained(folder)
        for part in (model, getattr(model, "config", None)):
            if getattr(part, "_auto_class", None) is not None:
                custom_object_save(part, folder)
        return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def copy_model(trainer: Any, checkpoint_folder: str) -> list[str]:
    """Copy the model of a checkpoint, and the arguments, into the output folder; the names of the files."""
    names, there = model_files(trainer, checkpoint_folder), Path(trainer.args.output_dir)
    for name in names:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(checkpoint_folder) / name, there / name)
    torch.save(trainer.args, there / TRAINING_ARGS_NAME)
    return [*names, TRAINING_ARGS_NAME]


def published_content(path: Path, args: TrainingArguments) -> Path | bytes:
    """A file as it is uploaded: its path, or its content without the local paths that the Trainer writes into it."""
    if path.name == TRAINING_ARGS_NAME:
        return _arguments_without_paths(args)
    if path.name == TRAINER_STATE_NAME:
        return _state_without_paths(path)
    return path


def _arguments_without_paths(args: TrainingArguments) -> bytes:
    shown = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, str) and os.path.isabs(value):
            setattr(shown, name, Path(value).name)
    file = io.BytesIO()
    torch.save(shown, file)
    return file.getvalue()


def _state_without_paths(path: Path) -> bytes:
    """The state with the name of the best checkpoint in place of its path on this machine."""
    content = json.loads(path.read_text(encoding="utf-8"))
    best = content.get("best_model_checkpoint")
    if best is not None:
        content["best_model_checkpoint"] = Path(best).name
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def upload_patterns(names: Sequence[str], folder: str | Path) -> list[str]:
    """What `hf upload --include` takes to upload these files of a model and those of its card, briefly."""
    names = [*names, *(name for name in CARD_FILES if (Path(folder) / name).is_file())]
    short = [
        re.sub(r"(.*model)-\d+-of-\d+(\..*)", r"\1-*\2", name) for name in names or [CONFIG_NAME, SAFE_WEIGHTS_NAME]
    ]
    return list(dict.fromkeys(f"{FIGURES}/*.png" if name.startswith(f"{FIGURES}/") else name for name in short))


def commit_files(
    repo: str, files: Mapping[str, Path | bytes], message: str | None, token: str | None, revision: str | None
) -> CommitInfo:
    """Commit files by their place in the repository. Where the Hub refuses the card, leave it out and warn."""
    try:
        return _commit_all(repo, files, message, token, revision)
    except ValueError as error:
        if CARD_FILES[0] not in files or isinstance(error, HFValidationError | HfHubHTTPError):
            raise
        reason = " ".join(str(error).split())
        logger.warning(f"the model is pushed without its card, which the Hub does not take: {reason}")
        others = {place: file for place, file in files.items() if place not in CARD_FILES}
        return _commit_all(repo, others, message, token, revision)


def _commit_all(
    repo: str, files: Mapping[str, Path | bytes], message: str | None, token: str | None, revision: str | None
) -> CommitInfo:
    operations = [CommitOperationAdd(path_in_repo=place, path_or_fileobj=file) for place, file in files.items()]
    return create_commit(repo, operations, commit_message=message or "Push", token=token, revision=revision)
