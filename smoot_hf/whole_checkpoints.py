"""Whole checkpoints of one run: which of the folders that lie in an output folder may be taken up.

A process that is killed while it saves leaves a part of a checkpoint. The first process writes `trainer_state.json`
after everything else, so a folder in which it can be read holds the rest as well. Checkpoints of another run may lie
beside those of this one, and be of later steps. The stock Trainer takes the newest folder, whole or not, and of
whatever run.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Collection

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from .budget_file import MASK_BUDGET_NAME, DamagedBudgetError, read_budget
from .run_identity import RUN_IDENTITY_NAME, DamagedIdentityError, RunIdentity

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
    try:
        RunIdentity.load(folder)
        if MASK_BUDGET_NAME in names:
            read_budget(os.path.join(folder, MASK_BUDGET_NAME))
    except DamagedBudgetError as error:
        return f"{MASK_BUDGET_NAME} is damaged: {error.reason}"
    except DamagedIdentityError:
        return f"{RUN_IDENTITY_NAME} is damaged: it does not name a run"
    except ValueError:
        # K in a format that only another version of this package can read: not known to be damaged.
        pass
    if SAFE_WEIGHTS_INDEX_NAME in names:
        with open(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), encoding="utf-8") as file:
            missing = sorted(set(json.load(file)["weight_map"].values()) - set(names))
        if missing:
            return f"it has no {missing[0]}"
    return None


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


def newest_whole_checkpoint(
    output_dir: str | os.PathLike[str], accelerator: Accelerator | None = None, asked: RunIdentity | None = None
) -> str | None:
    """The newest checkpoint of the folder's run that is whole; warns of newer ones that are passed over.

    The folder's own `run_identity.json` says which run that is. A checkpoint that does not say which run it is of (a
    plain `Trainer`'s, or one of version 0.1.0) is taken with a warning where the folder does not say so either.

    Args:
        output_dir: folder of the run.
        accelerator: of the training that is to go on, whose processes call this together: the checkpoint must be whole
            for each of them, on whatever machine's disk it looks.
        asked: what is known of the run whose checkpoint is wanted, `None` where the folder alone decides.

    Returns:
        The folder, `None` where there is none.

    Raises:
        ValueError: the folder holds checkpoints of several runs, and nothing says which of them is asked for; or its
            `run_identity.json` is damaged.
    """
    folders = checkpoint_folders(output_dir)
    reasons = reasons_against(output_dir, asked)
    usable = set(folders) - set(reasons)
    if accelerator is not None and accelerator.num_processes > 1:
        usable = set.intersection(*gather_object([usable]))
    found = next((folder for folder in folders if folder in usable), None)
    if accelerator is not None and not accelerator.is_main_process:
        return found
    for folder in folders[: None if found is None else folders.index(found)]:
        reason = reasons.get(folder, "another process does not find it whole")
        logger.warning(f"{folder} is passed over: {reason}")
    if found is not None and RunIdentity.load(found) is None:
        logger.warning(f"{found} is taken, though nothing in it says which run it is of (no {RUN_IDENTITY_NAME})")
    return found


def reasons_against(output_dir: str | os.PathLike[str], asked: RunIdentity | None = None) -> dict[str, str]:
    """The checkpoints in a folder that cannot be taken up, each with the reason: not whole, or of another run.

    Raises:
        ValueError: as `newest_whole_checkpoint`.
    """
    own = RunIdentity.load(output_dir)
    reasons: dict[str, str] = {}
    runs: dict[str, str] = {}
    for folder in checkpoint_folders(output_dir):
        damage = find_damage(folder)
        if damage is not None:
            reasons[folder] = f"it is not a whole checkpoint: {damage}"
            continue
        identity = RunIdentity.load(folder)
        if identity is None:
            if own is not None:
                reasons[folder] = f"it does not say which run it is of, and the folder is that of {own}"
            continue
        other = identity.difference(asked or RunIdentity())
        if other is not None:
            reasons[folder] = f"it is of another run: {other}"
        elif own is not None and identity.run_id != own.run_id:
            reasons[folder] = f"it is of another run: {identity}; the folder is that of {own}"
        else:
            runs.setdefault(str(identity.run_id), folder)
    if len(runs) > 1:
        newest = ", ".join(map(os.path.basename, runs.values()))
        raise ValueError(
            f"{output_dir} holds checkpoints of {len(runs)} runs ({newest}) and no {RUN_IDENTITY_NAME} that says which "
            "is meant: name the checkpoint, or keep each run in a folder of its own"
        )
    return reasons


def refuse_other_runs(output_dir: str | os.PathLike[str], known: Collection[str] = ()) -> None:
    """Refuse to begin a training where its checkpoints would lie among another's.

    Args:
        output_dir: folder of the run.
        known: ids of the runs that the same trainer has begun.

    Raises:
        ValueError: a whole checkpoint of another run is there.
    """
    for folder in checkpoint_folders(output_dir):
        if find_damage(folder) is not None:
            continue
        identity = RunIdentity.load(folder)
        if identity is None or identity.run_id not in known:
            whose = "" if identity is None else f" ({identity})"
            raise ValueError(
                f"{output_dir} holds {os.path.basename(folder)} of another run{whose}: give this one an output_dir of "
                "its own, go on with that one by resume_from_checkpoint=True, or set overwrite_output_dir=True to "
                "begin here all the same"
            )


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
    """Empty a folder that is about to be written again, so that nothing of another run or an earlier try is left in it.

    The file that declares it whole goes first.
    """
    state = os.path.join(folder, TRAINER_STATE_NAME)
    if os.path.isfile(state):
        os.remove(state)
    if os.path.isdir(folder):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.remove(entry.path)
