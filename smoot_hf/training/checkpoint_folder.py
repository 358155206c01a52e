"""Checkpoints in a folder: which training each is of, and which of them are whole and may be taken up."""

import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from ..fingerprint import fingerprints_differ
from .mask_budget_file import MASK_BUDGET_NAME, DamagedBudgetError, read_budget

RUN_IDENTITY_NAME = "run_identity.json"


class DamagedIdentityError(ValueError):
    """The file that names a run cannot be read, or does not name one."""


@dataclass(frozen=True)
class RunIdentity:
    """Stands in every checkpoint, and in the output folder for the run that the folder belongs to now.

    Attributes:
        run_id: made at random when a training begins afresh, kept when it is resumed; `None` where any run is meant.
        method: "standard", "sgt" or "smoot"; `None`, here and below: unknown.
        seed: `args.seed`.
        model: its class, and a hash of the names and shapes of its parameters (`describe_model`).
        dataset_fingerprint: of the training set (`smoot_hf.fingerprint`).
    """

    run_id: str | None = None
    method: str | None = None
    seed: int | None = None
    model: str | None = None
    dataset_fingerprint: str | None = None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `run_identity.json` into a folder that exists; the file appears whole or not at all."""
        path = os.path.join(folder, RUN_IDENTITY_NAME)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=2)
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self | None:
        """Read `run_identity.json`; `None` where the folder has none, as those of a plain `Trainer` have.

        Raises:
            DamagedIdentityError: the file is torn, or was altered.
        """
        path = os.path.join(folder, RUN_IDENTITY_NAME)
        if not os.path.isfile(path):
            return None
        try:
            with open(path, encoding="utf-8") as file:
                identity = cls(**json.load(file))
            wrong = next((f.name for f in dataclasses.fields(cls) if not _is_well_formed(identity, f.name)), None)
            if wrong is not None:
                raise ValueError(f"{wrong} is {getattr(identity, wrong)!r}")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            reason = str(error).splitlines()[0][:200]
            raise DamagedIdentityError(f"{path} is damaged: it does not name a run ({reason})") from error
        return identity

    def __str__(self) -> str:
        return f"run {str(self.run_id)[:8]} with method {self.method} and seed {self.seed}"

    def difference(self, asked: "RunIdentity") -> str | None:
        """The first thing in which this run is not `asked`, in words; `None` where it is, as far as both are known."""
        for field in dataclasses.fields(self):
            own, other = getattr(self, field.name), getattr(asked, field.name)
            differs = fingerprints_differ if field.name == "dataset_fingerprint" else _differ
            if differs(own, other):
                return f"its {field.name} is {own}, not {other}"
        return None


def describe_model(model: nn.Module) -> str:
    """The class of a model and a hash of the names and shapes of its parameters: two of one size are one model."""
    # A compiled model is the same model.
    original: Any = getattr(model, "_orig_mod", model)
    kind = type(original)
    # FSDP 2 gives a module a class of its own, derived from itself and from the module's.
    if kind.__name__.startswith("FSDP") and len(kind.__bases__) == 2:
        kind = kind.__bases__[1]
    # ZeRO 3 leaves parameters without entries, and keeps their shapes.
    shapes = [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in original.named_parameters()]
    return f"{kind.__name__}-{hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]}"


def _differ(one: Any, other: Any) -> bool:
    return None not in (one, other) and one != other


def _is_well_formed(identity: RunIdentity, name: str) -> bool:
    value = getattr(identity, name)
    if name == "run_id":
        return isinstance(value, str) and value != ""
    return value is None or type(value) is (int if name == "seed" else str)


logger = logging.get_logger(__name__)

# Files of torch.save; FSDP writes the optimizer's state and the weights under names of its own.
FSDP_WEIGHTS_NAME, FSDP_OPTIMIZER_NAME = f"{FSDP_MODEL_NAME}.bin", "optimizer.bin"
_ZIPPED = (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, FSDP_WEIGHTS_NAME, FSDP_OPTIMIZER_NAME)
# Names the folder beside it that DeepSpeed has written, with a file of each process for its part of the optimizer.
DEEPSPEED_LATEST_NAME = "latest"
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
            read_budget(os.path.join(folder, MASK_BUDGET_NAME), range(0))
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
    return _find_damage_of_deepspeed(folder, names) if DEEPSPEED_LATEST_NAME in names else None


def _find_damage_of_deepspeed(folder: str | os.PathLike[str], names: Collection[str]) -> str | None:
    """What the part that DeepSpeed writes of a checkpoint lacks; each process has left a random state beside it."""
    with open(os.path.join(folder, DEEPSPEED_LATEST_NAME), encoding="utf-8") as file:
        tag = file.read()
    if not tag or tag not in names:
        return f"it has no folder {tag!r}, which its file {DEEPSPEED_LATEST_NAME!r} names"
    files = sorted(os.listdir(os.path.join(folder, tag)))
    optimizers, models = ([name for name in files if name.endswith(f"_{of}_states.pt")] for of in ("optim", "model"))
    processes = sum(name.startswith("rng_state") for name in names)
    # Of the weights there is one file, or one of each process, where each holds a part of them (ZeRO 3).
    weights = processes if any(name.startswith("zero_pp_rank") for name in models) else 1
    if (len(optimizers), len(models)) != (processes, weights):
        return (
            f"{tag} is not whole: it has {len(optimizers)} states of the optimizer and {len(models)} of the model, of "
            f"{processes} processes"
        )
    damaged = next((name for name in files if not zipfile.is_zipfile(os.path.join(folder, tag, name))), None)
    return None if damaged is None else f"{tag}/{damaged} is damaged: it cannot be read to its end"


def describe_engine_of(folder: str | os.PathLike[str]) -> str | None:
    """By which ZeRO and how many processes a whole checkpoint was written; `None` where it is not DeepSpeed's."""
    path = os.path.join(folder, DEEPSPEED_LATEST_NAME)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        files = os.listdir(os.path.join(folder, file.read()))
    return describe_engine(
        sum(name.endswith("_optim_states.pt") for name in files),
        any(name.startswith("zero_pp_rank") and name.endswith("_model_states.pt") for name in files),
    )


def describe_engine(processes: int, shards_weights: bool) -> str:
    """What two trainings by DeepSpeed must share for one to take up the other's checkpoints; ZeRO 1 and 2 do."""
    return f"{'ZeRO 3' if shards_weights else 'ZeRO 1 or 2'} with a world size of {processes}"


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
        elif name in _ZIPPED or name.startswith("rng_state"):
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


def require_one_content(digest: str | None, path: str, accelerator: Accelerator) -> None:
    """Let the processes, on whatever machines, compare what they have read; they call this together.

    Args:
        digest: of what this process has read, `None` where it has found nothing.
        path: of the file.
        accelerator: of the training.

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
