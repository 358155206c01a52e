"""The mask budget: K of every training sample, its bounds, its statistics, and its moves that wait for the weights."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from .. import functional as SF
from ..fingerprint import fingerprints_differ
from .mask_budget_file import BEFORE_CELLS, PIECE, read_budget, require_origin, write_budget
from .settings import SmootSettings

# What a K stands for: so many positions, by this ranking, may be replaced in this way. How it moves (step_size, alpha
# and so on) may be changed when training is resumed, as the learning rate may.
_MEANING = ("saliency_score", "signed_saliency", "saliency_target", "mask_positions", "mask_fill")


def count_of_ratio(mask_ratio: float | Fraction, positions: int) -> int:
    """floor(ratio * positions), in the decimal that was written: 0.29 of 100 is 29, though 0.29 * 100 < 29."""
    return math.floor(Fraction(str(mask_ratio)) * positions)


class MaskBudget:
    """K, the number of masked positions, of every training sample.

    Positions are the H*W pixels of an image or, with `mask_cell` above 1, its cells of p x p pixels.

    It stores one int32 for each sample: 4 GB for a billion samples, which `ShardedMaskBudget` divides by the number of
    processes. Reading and updating a batch costs time in proportion to the batch, whatever the size of the training
    set. In an epoch, K of a sample moves at the sample's first visit only. The attributes `k_min` and `k_max` are the
    bounds of Equation 4, whereas the entries `k_min` and `k_max` of `statistics()` and of the logs are the lowest and
    highest K that any sample has.

    Args:
        num_samples: N, length of the training set.
        image_size: (H, W) of the images that the mask acts on, in pixels.
        mask_ratio: initial K as a fraction of the positions, in [0, 1].
        mask_ratio_min: lower bound of K as a fraction of the positions.
        mask_ratio_max: upper bound of K as a fraction of the positions.
        device: where K lives; reading and updating take indices on that device.
        dataset_fingerprint: identifies the training set (`smoot_hf.fingerprint`), `None` where nothing does.
        meaning: by name, the arguments that say which positions K counts; a saved budget must share them.
        mask_cell: p, side of the cells that K counts, in pixels.

    Attributes:
        positions: how many positions an image has, ceil(H/p) * ceil(W/p).

    Raises:
        ValueError: N is below 1, the ratios are not 0 <= min <= initial <= max <= 1, or a cell does not fit into the
            image.
    """

    def __init__(
        self,
        num_samples: int,
        image_size: tuple[int, int],
        mask_ratio: float | Fraction = 0.5,
        mask_ratio_min: float | Fraction = 0.2,
        mask_ratio_max: float | Fraction = 0.8,
        device: torch.device | str = "cpu",
        dataset_fingerprint: str | None = None,
        meaning: Mapping[str, Any] | None = None,
        mask_cell: int = 1,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if not 0 <= mask_ratio_min <= mask_ratio <= mask_ratio_max <= 1:
            raise ValueError(
                "the ratios must be 0 <= mask_ratio_min <= mask_ratio <= mask_ratio_max <= 1, got "
                f"mask_ratio_min={mask_ratio_min}, mask_ratio={mask_ratio}, mask_ratio_max={mask_ratio_max}"
            )
        if min(image_size) < 1:
            raise ValueError(f"image_size must be at least 1x1 pixels, got {image_size[0]}x{image_size[1]}")
        self.num_samples = num_samples
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.mask_cell = mask_cell
        self.positions = math.prod(SF.cell_grid(self.image_size, mask_cell, "mask_cell"))
        self.k_min = count_of_ratio(mask_ratio_min, self.positions)
        self.k_max = count_of_ratio(mask_ratio_max, self.positions)
        self.dataset_fingerprint = dataset_fingerprint
        self.meaning = dict(meaning or {})
        self.epoch: int | None = None
        initial = count_of_ratio(mask_ratio, self.positions)
        # K >= 0: has not moved in this epoch. Negative: has moved, and K is the complement.
        self._stored = self._allocate(initial, device)
        # How many samples have each K from k_min to k_max: statistics without a pass over all samples.
        self._histogram = torch.zeros(self.k_max - self.k_min + 1, dtype=torch.int64, device=device)
        self._histogram[initial - self.k_min] = num_samples

    @property
    def rows(self) -> range:
        """The samples whose K this process holds: all of them."""
        return range(self.num_samples)

    def _allocate(self, initial: int, device: torch.device | str) -> Tensor:
        return torch.full((self.num_samples,), initial, dtype=torch.int32, device=device)

    @classmethod
    def for_training(
        cls,
        settings: SmootSettings,
        num_samples: int,
        image_size: tuple[int, int],
        dataset_fingerprint: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The budget that the settings ask for. With sgt both bounds are the initial K, so that K cannot move.

        Args:
            settings: of the method.
            num_samples: N, length of the training set.
            image_size: (H, W) of the images that the mask acts on, in pixels.
            dataset_fingerprint: identifies the training set, `None` where nothing does.
            device: where K lives.

        Raises:
            ValueError: `mask_cell` does not fit into the image.
        """
        adapts = settings.method == "smoot"
        return cls(
            num_samples,
            image_size,
            settings.mask_ratio,
            settings.mask_ratio_min if adapts else settings.mask_ratio,
            settings.mask_ratio_max if adapts else settings.mask_ratio,
            device,
            dataset_fingerprint,
            {name: getattr(settings, name) for name in _MEANING},
            settings.mask_cell,
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "MaskBudget":
        """The budget of a file that `save` wrote, for the data and bounds that the file names; on the CPU.

        Raises:
            ValueError: the file is torn or altered.
        """
        saved = read_budget(path)
        budget = MaskBudget._described_by(saved.metadata)
        budget._take_up(saved.metadata, saved.k, saved.has_moved, saved.histogram)
        return budget

    @staticmethod
    def _described_by(metadata: Mapping[str, str]) -> "MaskBudget":
        """A budget of all samples on the CPU that has the identity in `metadata`."""
        size, mask_cell = (int(metadata["image_height"]), int(metadata["image_width"])), int(metadata["mask_cell"])
        positions = math.prod(SF.cell_grid(size, mask_cell))
        lowest, highest = (Fraction(int(metadata[name]), positions) for name in ("k_min", "k_max"))
        fingerprint = metadata.get("dataset_fingerprint")
        known = None if fingerprint == "None" else fingerprint
        meaning = {name: metadata[name] for name in _MEANING if metadata.get(name) not in (None, "None")}
        return MaskBudget(
            int(metadata["num_samples"]),
            size,
            lowest,
            lowest,
            highest,
            dataset_fingerprint=known,
            meaning=meaning,
            mask_cell=mask_cell,
        )

    @property
    def k(self) -> Tensor:
        """K of every sample, in positions: int32 (N,), a copy."""
        return _k_of(self._stored)

    @property
    def unit(self) -> str:
        """What the positions are: `"pixels"` or `"cells"`."""
        return "pixels" if self.mask_cell == 1 else "cells"

    @property
    def histogram(self) -> Tensor:
        """Number of samples with K = k_min, k_min + 1, ..., k_max: int64 (k_max - k_min + 1,)."""
        return self._histogram

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch: every sample may move once more. Does nothing if `epoch` has already begun."""
        if epoch != self.epoch:
            self.forget_visits()
            self.epoch = epoch

    def forget_visits(self) -> None:
        """Let every sample move once more within the present epoch."""
        # In pieces, so that a billion samples need no second 4 GB.
        for piece in self._stored.split(PIECE):
            piece.bitwise_xor_(piece >> 31)
        self.epoch = None

    def count_visits(self) -> int:
        """How many samples have been seen in the epoch under way; waits for the device."""
        return sum(int((piece < 0).sum()) for piece in self._stored.split(PIECE))

    def read(self, sample_idx: Tensor) -> Tensor:
        """K of the given samples: int64 (B,) rows of the training set -> int32 (B,), in positions."""
        return _k_of(self._stored_at(sample_idx))

    def _stored_at(self, rows: Tensor) -> Tensor:
        return self._stored[rows]

    def _store(self, rows: Tensor, values: Tensor) -> None:
        self._stored[rows] = values

    def update(self, sample_idx: Tensor, delta: Tensor, step_size: float, rounding: str = "floor") -> Tensor:
        """Move K of the given samples (Equation 4). A sample that has already moved in this epoch does not move again.

        A sample that occurs several times in the batch moves by the delta of its first occurrence, so that the result
        does not depend on the order in which a device happens to write. The host does not wait for the device.

        Call it once for each step of the optimizer, with all samples of the step: where gradients are accumulated, with
        those of all micro-batches.

        Args:
            sample_idx: int64 (B,) rows of the training set.
            delta: (B,), from `functional.probability_shift`; where it is not finite K stays.
            step_size: mu, in positions (`SmootSettings.step_in_positions`).
            rounding: `"floor"`, `"trunc"` or `"nearest"`.

        Returns:
            int32 (B,), by how many positions each moved.
        """
        order = sample_idx.argsort(stable=True)
        rows = sample_idx[order]
        is_first = torch.ones_like(rows, dtype=torch.bool)
        is_first[1:] = rows[1:] != rows[:-1]
        stored = self._stored_at(rows)
        may_move = is_first & (stored >= 0)
        k = _k_of(stored)
        target = SF.update_budget(k, delta[order], step_size, self.k_min, self.k_max, rounding)
        moved = torch.where(may_move, target, k)
        # All places of one sample write what its first place says.
        place = torch.arange(len(rows), device=rows.device)
        first_place = torch.where(is_first, place, 0).cummax(0).values
        self._store(rows, ~moved[first_place])
        count = may_move.to(torch.int64)
        self._histogram.index_add_(0, k - self.k_min, -count).index_add_(0, moved - self.k_min, count)
        return torch.empty_like(k).scatter_(0, order, moved - k)

    def statistics(self) -> dict[str, float]:
        """Minimum, median and maximum of K over the training set, in positions."""
        cumulative = self._histogram.cumsum(0).cpu()
        lower, upper = (self.num_samples + 1) // 2, self.num_samples // 2 + 1
        ranks = torch.tensor([1, lower, upper, self.num_samples])
        lowest, below, above, highest = (torch.searchsorted(cumulative, ranks) + self.k_min).tolist()
        return {"k_min": lowest, "k_median": (below + above) / 2, "k_max": highest}

    def to_dataset(self, labels: Sequence[int | str] | np.ndarray | Tensor | None = None) -> Dataset:
        """K as an HF Dataset, one row per training sample in the order of the training set.

        To sort it, `.sort("k")`; to see the images, `train_set.select(rows["sample_idx"])`; to put both side by side,
        `datasets.concatenate_datasets([train_set, k], axis=1)` (without `labels` where the training set has a column
        `label`); to publish it, `.push_to_hub(name)`.

        Args:
            labels: N classes or their names, in the order of the training set; without them the column is left out.

        Returns:
            Columns `sample_idx` int64, `k` int32, `ratio` float64 = k / positions in [0, 1], and `label`.

        Raises:
            ValueError: `labels` of another length than N.
        """
        k = self.k.cpu().numpy()
        columns: dict[str, Any] = {"sample_idx": np.arange(self.num_samples), "k": k, "ratio": k / self.positions}
        if labels is not None:
            if len(labels) != self.num_samples:
                raise ValueError(f"labels must be one per training sample, {self.num_samples}, got {len(labels)}")
            columns["label"] = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        return Dataset.from_dict(columns)

    def _identity(self) -> dict[str, Any]:
        """What a saved budget must share with the run that takes it up."""
        height, width = self.image_size
        return {
            "num_samples": self.num_samples,
            "image_height": height,
            "image_width": width,
            "mask_cell": self.mask_cell,
            "k_min": self.k_min,
            "k_max": self.k_max,
            "dataset_fingerprint": self.dataset_fingerprint,
            **self.meaning,
        }

    def _metadata(self) -> dict[str, str]:
        return {name: str(value) for name, value in self._identity().items()} | {"epoch": str(self.epoch)}

    def save(self, path: str | os.PathLike[str] | None, origin: Mapping[str, Any] | None = None) -> None:
        """Write K as safetensors: `k` int32 (N,) and `has_moved` bool (N,), with what identifies the data.

        The file appears whole or not at all: it is written beside its place, then renamed. It is written in pieces, so
        that it needs no second copy of K in memory.

        Args:
            path: of the file; `None` on a process that writes none.
            origin: any of "run_id", "seed" and "global_step": the training that K is of, and when.
        """
        if path is None:
            return
        metadata = self._metadata() | {name: str(value) for name, value in (origin or {}).items()}
        write_budget(path, metadata, map(_k_of, self._pieces()), (piece < 0 for piece in self._pieces()))

    def _pieces(self) -> Iterator[Tensor]:
        """What is stored of all samples, in their order, in pieces on the CPU."""
        return (piece.cpu() for piece in self._stored.split(PIECE))

    def state_dict(self) -> dict[str, Any]:
        """K with what identifies the data, on the CPU: for `accelerator.register_for_checkpointing(budget)`.

        Returns:
            `k` int32 (N,), `has_moved` bool (N,), and `metadata`, as `save` writes them.
        """
        return {"k": self.k.cpu(), "has_moved": (self._stored < 0).cpu(), "metadata": self._metadata()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up K from what `state_dict` gave, for the same data and bounds.

        Raises:
            ValueError: it is no state of a budget, or that of another training set, image size, cell or bounds; nothing
                of it is taken up.
        """
        missing = {"k", "has_moved", "metadata"} - state_dict.keys()
        if missing:
            raise ValueError(f"a state_dict of a MaskBudget must have {sorted(missing)}, got {sorted(state_dict)}")
        k, has_moved, metadata = (state_dict[name] for name in ("k", "has_moved", "metadata"))
        metadata = BEFORE_CELLS | metadata
        self._require_identity(metadata, "state_dict")
        is_k = k.dtype == torch.int32 and not bool(((k < self.k_min) | (k > self.k_max)).any())
        if not is_k:
            raise ValueError(
                f"'k' of a state_dict of this MaskBudget must be int32 in [{self.k_min}, {self.k_max}], got {k.dtype}"
                + (f" in [{int(k.min())}, {int(k.max())}]" if k.numel() else " without entries")
            )
        if k.shape != (self.num_samples,) or has_moved.shape != k.shape or has_moved.dtype != torch.bool:
            raise ValueError(
                f"a state_dict of this MaskBudget must have 'k' and 'has_moved' bool of shape ({self.num_samples},), "
                f"got {tuple(k.shape)} and {has_moved.dtype} {tuple(has_moved.shape)}"
            )
        histogram = torch.bincount(k - self.k_min, minlength=len(self._histogram))
        self._take_up(metadata, k, has_moved, histogram)

    def restore(self, path: str | os.PathLike[str], origin: Mapping[str, Any] | None = None) -> str:
        """Take up K from a file that `save` wrote, for the same data and bounds.

        Args:
            path: of the file.
            origin: as in `save`: what K must be of. Files of version 0.1.0 do not say: they are taken where `origin`
                has no "run_id".

        Returns:
            the hash of all that the file says, which is the same where two processes have read the same.

        Raises:
            ValueError: the file is torn or altered, or belongs to another training set, image size, cell or bounds, or
                is not of `origin`; nothing of it is taken up.
        """
        saved = read_budget(path, self.rows)
        self._require_identity(saved.metadata, path)
        require_origin(saved.metadata, origin or {}, path)
        self._take_up(saved.metadata, saved.k, saved.has_moved, saved.histogram)
        return saved.metadata["sha256"]

    def _take_up(self, metadata: Mapping[str, str], k: Tensor, has_moved: Tensor, histogram: Tensor) -> None:
        self._stored.copy_(torch.where(has_moved, ~k, k))
        self._histogram.copy_(histogram)
        self.epoch = None if metadata["epoch"] == "None" else int(metadata["epoch"])

    def _require_identity(self, metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
        for name, value in self._identity().items():
            saved = metadata.get(name)
            is_unknown = saved in (None, "None") or value is None
            if saved == str(value) or (is_unknown and name in ("dataset_fingerprint", *_MEANING)):
                continue
            if name == "dataset_fingerprint" and not fingerprints_differ(saved, value):
                continue
            raise ValueError(
                f"the mask budget {path} belongs to another training set or other settings: {name} is {saved} there "
                f"and {value} here. Resume with the same data, method, mask and saliency, or delete it: K starts afresh"
            )

    def __repr__(self) -> str:
        height, width = self.image_size
        cells = "" if self.mask_cell == 1 else f"mask_cell={self.mask_cell}, "
        return f"MaskBudget(num_samples={self.num_samples}, image_size={height}x{width}, {cells}{self.statistics()})"


def _k_of(stored: Tensor) -> Tensor:
    return torch.where(stored < 0, ~stored, stored)


_NOTHING_MASKED = (
    "method={method!r}, but no image of this step was masked: a compute_loss of your own has taken the place of "
    "SmootMixin's. Call super().compute_loss in it, or pass the loss of the logits as compute_loss_func"
)


class BudgetMoves(TrainerCallback):
    """Holds back the deltas of a step until its fate is known, then moves K by them, or not at all.

    A step whose loss is not finite, and one that the loss scaler of fp16 skips because its gradients overflowed, says
    nothing of the mask: no K of its samples moves, on any process. Nothing waits for the device.

    Args:
        accelerator: gathers the deltas of all processes, and holds the loss scaler where there is one.
        move: takes `sample_idx` int64 (B,) and `delta` (B,) of the whole step; delta is NaN where K must stay.
    """

    def __init__(self, accelerator: Accelerator, move: Callable[[Tensor, Tensor], None]) -> None:
        self.accelerator = accelerator
        self.move = move
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._scale: Tensor | None = None

    def add(self, sample_idx: Tensor, delta: Tensor, loss: Tensor) -> None:
        """Take in a batch: (B,) rows of the training set, (B,) deltas, and the batch's loss."""
        self._waiting.append((sample_idx, torch.where(torch.isfinite(loss.detach()), delta, math.nan)))

    def begin(self, accelerator: Accelerator) -> None:
        """Begin a training: drop what waits, for one that was broken off took no step with it.

        Args:
            accelerator: of this training; each trial of a search has one, and a loss scaler, of its own.
        """
        self.accelerator = accelerator
        self._waiting, self._scale = [], None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Keep the loss scale that the step is about to be taken with."""
        self._scale = self._loss_scale()

    def on_optimizer_step(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Move K by everything that the step was made of.

        Raises:
            RuntimeError: nothing was masked, though `args.method` and `args.masked_every` say so.
        """
        if not args.settings.masks_at(state.global_step):
            return
        if not self._waiting:
            raise RuntimeError(_NOTHING_MASKED.format(method=args.method))
        batches, self._waiting = self._waiting, []
        if self.accelerator.num_processes > 1:
            batches = [self.accelerator.gather(batch) for batch in batches]
        sample_idx, delta = (torch.cat(column) for column in zip(*batches, strict=True))
        is_taken = torch.isfinite(delta).all()
        scale = self._loss_scale()
        if scale is not None and self._scale is not None:
            # The scaler lowers its scale after a step that it skipped, and only then. `optimizer_step_was_skipped` of
            # accelerate does not see a skip by a fused optimizer, the Trainer's default.
            is_taken &= scale >= self._scale
        self.move(sample_idx, torch.where(is_taken, delta, math.nan))

    def _loss_scale(self) -> Tensor | None:
        """What the loss is multiplied by at present, on the device; `None` without a scaler."""
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=self.accelerator.device))
