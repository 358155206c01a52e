"""The file of a mask budget: written whole or not at all, read only if nothing in it has changed."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..functional import cell_grid

MASK_BUDGET_NAME = "mask_budget.safetensors"

_FORMAT = "smoot_hf.mask_budget/2"
# What files say that were written before there were cells: nothing, for K counted pixels.
BEFORE_CELLS = {"mask_cell": "1"}

# A pixel count beyond any image's, and far below where counting the samples of every K would exhaust the memory.
_MOST_PIXELS = 1 << 28


class DamagedBudgetError(ValueError):
    """The file of a mask budget is torn, or not what was written.

    Args:
        path: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(
            f"the mask budget {path} is damaged: {reason}; resume from an earlier checkpoint, or delete the file to "
            "start K afresh"
        )
        self.reason = reason


def write_budget(path: str | os.PathLike[str], metadata: dict[str, str], k: Tensor, has_moved: Tensor) -> None:
    """Write `k` int32 (N,) and `has_moved` bool (N,) as safetensors: beside its place, then renamed."""
    metadata = metadata | {"format": _FORMAT}
    metadata["sha256"] = _digest(k, has_moved, metadata)
    # One name: what a killed process left behind is written over.
    unfinished = f"{os.fspath(path)}.tmp"
    try:
        save_file({"k": k, "has_moved": has_moved}, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def read_budget(path: str | os.PathLike[str]) -> tuple[dict[str, str], Tensor, Tensor]:
    """Metadata, `k` int32 (N,) and `has_moved` bool (N,) of a file that `write_budget` wrote.

    Raises:
        DamagedBudgetError: the file is absent, torn or altered, or holds what cannot be the K of any training.
        ValueError: it is of another format.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} is not a mask budget of format {_FORMAT} but {metadata.get('format')}: install the "
                    "version of smoot_hf that wrote it, or delete the file to start K afresh"
                )
            k, has_moved = file.get_tensor("k"), file.get_tensor("has_moved")
    except (SafetensorError, OSError) as error:
        raise DamagedBudgetError(path, f"it cannot be read ({error})") from error
    for name, tensor, dtype in (("k", k, torch.int32), ("has_moved", has_moved, torch.bool)):
        if tensor.dtype != dtype or tensor.ndim != 1 or len(tensor) != len(k):
            raise DamagedBudgetError(
                path, f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} of one entry per sample"
            )
    if metadata.get("sha256") != _digest(k, has_moved, metadata):
        raise DamagedBudgetError(path, "its content is not what was written")
    metadata = BEFORE_CELLS | metadata
    impossible = _find_impossible(metadata, k)
    if impossible is not None:
        raise DamagedBudgetError(path, impossible)
    return metadata, k, has_moved


def _find_impossible(metadata: Mapping[str, str], k: Tensor) -> str | None:
    """What a file says that is true of no training, in words: such files are made by hand."""
    numbers = {}
    for name in ("num_samples", "image_height", "image_width", "mask_cell", "k_min", "k_max", "epoch"):
        said = metadata.get(name)
        if said is None or not (re.fullmatch("[0-9]{1,18}", said) or (name == "epoch" and said == "None")):
            return f"its {name} is {said!r:.40}, not a number"
        numbers[name] = 0 if said == "None" else int(said)
    height, width, cell = (numbers[name] for name in ("image_height", "image_width", "mask_cell"))
    if not 0 < height * width <= _MOST_PIXELS or not 1 <= cell <= min(height, width):
        return "its image size and its cells do not fit each other"
    if not numbers["k_min"] <= numbers["k_max"] <= math.prod(cell_grid((height, width), cell)):
        return "its image size and its bounds of K do not fit each other"
    if numbers["num_samples"] != len(k) or len(k) == 0:
        return f"it has K of {len(k)} samples and speaks of {numbers['num_samples']}"
    lowest, highest = numbers["k_min"], numbers["k_max"]
    if k.min() < lowest or k.max() > highest:
        return f"its K are not in [{lowest}, {highest}]"
    return None


def require_origin(metadata: Mapping[str, str], origin: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse the K of another training, or of another time in it.

    Args:
        metadata: of the file.
        origin: "run_id", "seed" and "global_step" that the file must name; what is `None` may be anything. A file of
            version 0.1.0 names none of them: it is taken where no "run_id" is asked for.
        path: of the file.

    Raises:
        ValueError: naming what differs.
    """
    asked = {name: str(value) for name, value in origin.items() if value is not None}
    for name, value in asked.items():
        saved = metadata.get(name)
        if saved == value or (saved is None and "run_id" not in asked):
            continue
        raise ValueError(
            f"the mask budget {path} is of another training, or of another time in it: {name} is {saved} there and "
            f"{value} here. Resume from a checkpoint as it was written, or delete the file: K starts afresh"
        )


def _digest(k: Tensor, has_moved: Tensor, metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(memoryview(k.numpy()))
    digest.update(memoryview(has_moved.numpy()))
    said = {name: value for name, value in metadata.items() if name != "sha256"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()
