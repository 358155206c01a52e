"""The file of a mask budget: written whole or not at all, read only if nothing in it has changed."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..functional import cell_grid

MASK_BUDGET_NAME = "mask_budget.safetensors"
# Rows that are in memory at a time where K is written, read or sent: 64 MB.
PIECE = 1 << 24

_FORMAT = "smoot_hf.mask_budget/2"
# What files say that were written before there were cells: nothing, for K counted pixels.
BEFORE_CELLS = {"mask_cell": "1"}

_DTYPES = {"k": "I32", "has_moved": "BOOL"}

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


class SavedBudget(NamedTuple):
    """What a file says of K.

    Attributes:
        metadata: what identifies the data and the training.
        k: int32, K of the rows that were asked for.
        has_moved: bool, which of these rows have moved in the epoch under way.
        histogram: int64 (k_max - k_min + 1,), number of rows with each K, among all rows of the file.
    """

    metadata: dict[str, str]
    k: Tensor
    has_moved: Tensor
    histogram: Tensor


def write_budget(
    path: str | os.PathLike[str], metadata: dict[str, str], k: Iterable[Tensor], has_moved: Iterable[Tensor]
) -> None:
    """Write `k` int32 (N,) and `has_moved` bool (N,) as safetensors: beside its place, then renamed.

    Both come in pieces, of which only one is in memory at a time; `save_file` of safetensors would need them whole.

    Args:
        path: of the file.
        metadata: what identifies the data and the training; "num_samples" is N.
        k: on the CPU, in the order of the rows, as is `has_moved`.
        has_moved: read after all of `k`.
    """
    metadata = metadata | {"format": _FORMAT}
    # One name: what a killed process left behind is written over.
    unfinished = f"{os.fspath(path)}.tmp"
    try:
        with open(unfinished, "wb") as file:
            # The digest is known at the end; the header with it has the same length.
            file.write(_header(metadata | {"sha256": "0" * hashlib.sha256().digest_size * 2}))
            digest = _digest(_written(k, file), _written(has_moved, file), metadata)
            file.seek(0)
            file.write(_header(metadata | {"sha256": digest}))
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def _header(metadata: Mapping[str, str]) -> bytes:
    """How a safetensors file of K begins: the length of the description in 8 bytes, then the description in JSON."""
    count = int(metadata["num_samples"])
    described = {
        "__metadata__": metadata,
        "k": {"dtype": _DTYPES["k"], "shape": [count], "data_offsets": [0, 4 * count]},
        "has_moved": {"dtype": _DTYPES["has_moved"], "shape": [count], "data_offsets": [4 * count, 5 * count]},
    }
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _written(pieces: Iterable[Tensor], file: BinaryIO) -> Iterator[Tensor]:
    for piece in pieces:
        file.write(memoryview(piece.numpy()))
        yield piece


def read_budget(path: str | os.PathLike[str], rows: range | None = None) -> SavedBudget:
    """What a file says that `write_budget` wrote. The whole of it is checked, piece by piece.

    Args:
        path: of the file.
        rows: successive rows to return the K of, by default all of them; rows that the file does not have are left out.

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
            k, has_moved = file.get_slice("k"), file.get_slice("has_moved")
            return _checked(path, metadata, k, has_moved, rows)
    except (SafetensorError, OSError) as error:
        raise DamagedBudgetError(path, f"it cannot be read ({error})") from error


def _checked(
    path: str | os.PathLike[str], metadata: dict[str, str], k: Any, has_moved: Any, rows: range | None
) -> SavedBudget:
    """The content of an open file, from the slices that safetensors gives of its two tensors."""
    count = k.get_shape()[:1]
    for name, tensor in (("k", k), ("has_moved", has_moved)):
        dtype, shape = tensor.get_dtype(), tensor.get_shape()
        if dtype != _DTYPES[name] or len(shape) != 1 or shape != count:
            raise DamagedBudgetError(path, f"{name} is {dtype} {shape}, not {_DTYPES[name]} of one entry per sample")
    if metadata.get("sha256") != _digest(_pieces(k), _pieces(has_moved), metadata):
        raise DamagedBudgetError(path, "its content is not what was written")
    metadata = BEFORE_CELLS | metadata
    impossible = _find_impossible(metadata, *count)
    if impossible is not None:
        raise DamagedBudgetError(path, impossible)
    lowest, highest = int(metadata["k_min"]), int(metadata["k_max"])
    histogram = torch.zeros(highest - lowest + 1, dtype=torch.int64)
    for piece in _pieces(k):
        if piece.min() < lowest or piece.max() > highest:
            raise DamagedBudgetError(path, f"its K are not in [{lowest}, {highest}]")
        histogram += torch.bincount(piece - lowest, minlength=len(histogram))
    begin, end = (0, count[0]) if rows is None else (min(rows.start, count[0]), min(rows.stop, count[0]))
    return SavedBudget(metadata, k[begin:end], has_moved[begin:end], histogram)


def _pieces(tensor: Any) -> Iterator[Tensor]:
    """A tensor of a file, of which one piece at a time is in memory."""
    (count,) = tensor.get_shape()
    return (tensor[begin : min(begin + PIECE, count)] for begin in range(0, count, PIECE))


def _find_impossible(metadata: Mapping[str, str], count: int) -> str | None:
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
    if numbers["num_samples"] != count or count == 0:
        return f"it has K of {count} samples and speaks of {numbers['num_samples']}"
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


def _digest(k: Iterable[Tensor], has_moved: Iterable[Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for piece in chain(k, has_moved):
        digest.update(memoryview(piece.numpy()))
    said = {name: value for name, value in metadata.items() if name != "sha256"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()
