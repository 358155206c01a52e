"""Whole checkpoints: a process that is killed while it saves leaves a part of one, which must not be taken up.

The first process writes `trainer_state.json` after everything else, so a folder in which it can be read holds the rest
as well. The stock Trainer takes the newest folder, whole or not.
"""

import json
import os
import zipfile

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from .budget_file import MASK_BUDGET_NAME, DamagedBudgetError, read_budget

logger = logging.get_logger(__name__)

# How the files of weights begin: a model's, whole or in shards, an adapter's, and those of engines that shard.
_WEIGHTS = ("model", "pytorch_model", "adapter_model", "global_step")


def find_damage(folder: str | os.PathLike[str]) -> str | None:
    """What a checkpoint folder lacks, in words; `None` where it is whole.

    Looks at the ends of the files and, but for K, not at their content: quick, whatever their size. Folders of a plain
    `Trainer` are judged in the same way.
    """
    if not os.path.isdir(folder):
        return "no such folder"
    names = sorted(os.listdir(folder))
    if TRAINER_STATE_NAME not in names:
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    if not any(name.startswith(_WEIGHTS) for name in names):
        return "it has no weights (model.safetensors)"
    for name in names:
        if not _can_be_read(os.path.join(folder, name)):
            return f"{name} is damaged: it cannot be read to its end"
    if MASK_BUDGET_NAME in names and not _is_intact(os.path.join(folder, MASK_BUDGET_NAME)):
        return f"{MASK_BUDGET_NAME} is damaged: its content is not what was written"
    if SAFE_WEIGHTS_INDEX_NAME in names:
        with open(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), encoding="utf-8") as file:
            missing = sorted(set(json.load(file)["weight_map"].values()) - set(names))
        if missing:
            return f"it has no {missing[0]}"
    return None


def _is_intact(path: str) -> bool:
    """Whether K is as it was written, or is of a format of which only its own version of this package can tell."""
    try:
        read_budget(path)
    except DamagedBudgetError:
        return False
    except ValueError:
        return True
    return True


def _can_be_read(path: str) -> bool:
    """Whether a file that the Trainer writes has its end; true of any other file."""
    name = os.path.basename(path)
    try:
        if name in (TRAINER_STATE_NAME, SAFE_WEIGHTS_INDEX_NAME):
            with open(path, encoding="utf-8") as file:
                json.load(file)
        elif name.endswith(".safetensors"):
            with safe_open(path, framework="pt"):
                pass
        elif name in (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME) or name.startswith("rng_state"):
            return zipfile.is_zipfile(path)
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def checkpoint_folders(output_dir: str | os.PathLike[str]) -> list[str]:
    """The checkpoints of a run, whole or not, newest first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    numbers = sorted((int(step) for step in steps if step.isdecimal()), reverse=True)
    return [os.path.join(output_dir, f"{prefix}{number}") for number in numbers]


def newest_whole_checkpoint(output_dir: str | os.PathLike[str], accelerator: Accelerator | None = None) -> str | None:
    """The newest checkpoint that is whole; warns of newer ones that are not.

    Args:
        output_dir: folder of the run.
        accelerator: of the training that is to go on, whose processes call this together: the checkpoint must be whole
            for each of them, on whatever machine's disk it looks.

    Returns:
        The folder, `None` where there is none.
    """
    folders = checkpoint_folders(output_dir)
    damages = {folder: damage for folder in folders if (damage := find_damage(folder))}
    usable = set(folders) - set(damages)
    if accelerator is not None and accelerator.num_processes > 1:
        usable = set.intersection(*gather_object([usable]))
    for folder in folders:
        if folder in usable:
            return folder
        if accelerator is None or accelerator.is_main_process:
            damage = damages.get(folder, "another process does not find it whole")
            logger.warning(f"{folder} is not a whole checkpoint and is passed over: {damage}")
    return None


def require_one_content(digest: str, path: str, accelerator: Accelerator) -> None:
    """Let the processes, on whatever machines, compare what they have read; they call this together.

    Raises:
        ValueError: they have not read the same.
    """
    if accelerator.num_processes > 1 and len(set(gather_object([digest]))) > 1:
        raise ValueError(
            f"the processes do not find the same K in {path}: copy the whole checkpoint to the disk of every machine"
        )


def begin_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Let a folder that is about to be written again, after a resume from an earlier one, not pass for whole."""
    state = os.path.join(folder, TRAINER_STATE_NAME)
    if os.path.isfile(state):
        os.remove(state)
