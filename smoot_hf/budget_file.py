"""The file of a mask budget: written whole or not at all, read only if nothing in it has changed."""

import hashlib
import json
import os
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MASK_BUDGET_NAME = "mask_budget.safetensors"

_FORMAT = "smoot_hf.mask_budget/2"
# Its digest is of the tensors alone.
_FIRST_FORMAT = "smoot_hf.mask_budget/1"


class DamagedBudgetError(ValueError):
    """The file of a mask budget is torn, or not what was written."""


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
        DamagedBudgetError: the file is absent, torn or altered.
        ValueError: it is of another format.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in (_FORMAT, _FIRST_FORMAT):
                raise ValueError(
                    f"{path} is not a mask budget of format {_FORMAT} but {metadata.get('format')}: install the "
                    "version of smoot_hf that wrote it, or delete the file to start K afresh"
                )
            k, has_moved = file.get_tensor("k"), file.get_tensor("has_moved")
    except (SafetensorError, OSError) as error:
        raise DamagedBudgetError(
            f"the mask budget {path} cannot be read ({error}); resume from an earlier checkpoint, or delete the "
            "file to start K afresh"
        ) from error
    if metadata.get("num_samples") != str(len(k)) or metadata.get("sha256") != _digest(k, has_moved, metadata):
        raise DamagedBudgetError(
            f"the mask budget {path} is damaged: its content is not what was written; resume from an earlier "
            "checkpoint, or delete the file to start K afresh"
        )
    return metadata, k, has_moved


def _digest(k: Tensor, has_moved: Tensor, metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(memoryview(k.numpy()))
    digest.update(memoryview(has_moved.numpy()))
    if metadata["format"] != _FIRST_FORMAT:
        said = {name: value for name, value in metadata.items() if name != "sha256"}
        digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()
