"""The index of a sample on its way from the training set to the loss, past any collator."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import default_data_collator

from ..errors import first_line
from .labels import find_fault, read_labels

SAMPLE_IDX = "sample_idx"
# The same rows as a list of integers, which stays on the host: what is chosen by them is known there without a wait.
SAMPLE_ROWS = "sample_rows"

_MAKE_IMAGES = (
    "set a transform or a data collator that makes them, tensors (C, H, W) under 'pixel_values', and "
    "remove_unused_columns=False where it reads other columns"
)


class IndexedFeatures(NamedTuple):
    """What a loader fetched for one batch, with the rows it came from."""

    sample_idx: list[int]
    features: Any


class IndexedDataset(Dataset):
    """A map-style data set whose batches say which rows they hold.

    Args:
        dataset: anything with `__len__` and `__getitem__`; its own `__getitems__` is used where it has one.
        removed: columns that the Trainer has removed from it.
    """

    def __init__(self, dataset: Any, removed: Collection[str] = ()) -> None:
        self.dataset = dataset
        self.removed = removed

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set, where it listens, which epoch begins."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def first(self) -> IndexedFeatures:
        """The first row alone, as what a loader fetches."""
        return self.__getitems__([0])

    def __getitems__(self, indices: list[int]) -> IndexedFeatures:
        try:
            if callable(getattr(self.dataset, "__getitems__", None)):
                features = self.dataset.__getitems__(indices)
            else:
                features = [self.dataset[index] for index in indices]
        except KeyError as error:
            _refuse_removed("transform", error, self.removed)
            raise
        return IndexedFeatures(list(map(int, indices)), features)


class IndexedCollator:
    """The user's collator, with `sample_idx` attached to its batch and the batch checked.

    The checks run where the batch is made, on the CPU, so that they never wait for a device.

    Args:
        collator: the user's own; need not know of `sample_idx`.
        label_name: key of the labels in the batch.
        num_labels: number of classes of the model, `None` where it does not say.
        multi_label: whether an image may have several labels.
        num_channels: channels of the images that the model takes, `None` where it does not say.
        expects_uint8: the images go through an `InputPipeline`, which takes uint8.
        removed: columns that the Trainer has removed from the data set.
        keeps_rows: attach `sample_rows` as well, for the choice of `masked_share`.
    """

    def __init__(
        self,
        collator: Callable[[Any], Any],
        label_name: str,
        num_labels: int | None,
        multi_label: bool,
        num_channels: int | None,
        expects_uint8: bool,
        removed: Collection[str] = (),
        keeps_rows: bool = False,
    ) -> None:
        self.collator = collator
        self.label_name = label_name
        self.num_labels = num_labels
        self.multi_label = multi_label
        self.num_channels = num_channels
        self.expects_uint8 = expects_uint8
        self.removed = removed
        self.keeps_rows = keeps_rows

    def __call__(self, indexed: IndexedFeatures) -> dict[str, Any]:
        """Collate what `IndexedDataset` fetched.

        Raises:
            ValueError: `pixel_values` or labels are missing, of the wrong shape or type, not finite or out of range.
        """
        try:
            batch = self.collator(indexed.features)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            self._explain(indexed, error)
            raise
        if not isinstance(batch, Mapping):
            raise ValueError(f"the data collator must return a dict, got {type(batch).__name__}")
        attached: dict[str, Any] = {SAMPLE_IDX: torch.tensor(indexed.sample_idx, dtype=torch.int64)}
        attached |= {SAMPLE_ROWS: indexed.sample_idx} if self.keeps_rows else {}
        for name in attached.keys() & batch.keys():
            raise ValueError(f"{name!r} is attached by the trainer: let the data collator not return it")
        self._check_images(batch.get("pixel_values"), indexed.sample_idx, sorted(batch))
        labels = self._checked_labels(batch.get(self.label_name), indexed.sample_idx, sorted(batch))
        return {**batch, self.label_name: labels, **attached}

    def _explain(self, indexed: IndexedFeatures, error: Exception) -> None:
        """Raise what a collator's error comes from, where that is known."""
        first = indexed.features[0] if isinstance(indexed.features, list) else indexed.features
        if isinstance(error, KeyError):
            # What a sample has, and the collator has not found, was removed on the way to it.
            has = first.keys() if isinstance(first, Mapping) else set()
            _refuse_removed("data collator", error, {*self.removed, *has})
        _refuse_several_sizes(indexed, error)
        _refuse_mixed_labels(indexed, self.label_name, error)
        if getattr(self.collator, "data_collator", self.collator) is not default_data_collator:
            return
        if isinstance(first, Mapping):
            found = f"dicts of {', '.join(f'{name!r} ({type(value).__name__})' for name, value in first.items())}"
        else:
            found = type(first).__name__
        raise ValueError(
            f"the default data collator makes no batch of the training samples, which are {found} "
            f"({first_line(error)}): {_MAKE_IMAGES}"
        ) from error

    def _check_images(self, images: Any, rows: list[int], keys: list[str]) -> None:
        if images is None:
            raise ValueError(f"the training batches have no 'pixel_values', only {keys}: {_MAKE_IMAGES}")
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"'pixel_values' must be a tensor of shape (B, C, H, W), got {found}")
        channels, *size = images.shape[1:]
        if 0 in size:
            raise ValueError(
                f"'pixel_values' must have pixels, got images of {size[0]}x{size[1]} in the training samples "
                f"{rows[:10]}: leave them out, or mend the transform that makes them"
            )
        if self.num_channels not in (None, channels):
            raise ValueError(
                f"the model takes images of {self.num_channels} channels, 'pixel_values' have {channels}: convert the "
                f"images, or build the model with num_channels={channels}"
            )
        if len(images) != len(rows):
            raise ValueError(f"the data collator made {len(images)} images of {len(rows)} samples: it must keep each")
        if not (images.dtype == torch.uint8 if self.expects_uint8 else images.is_floating_point()):
            raise ValueError(
                f"'pixel_values' are {images.dtype}: they must be torch.uint8 with an input_pipeline (which normalises "
                "them) and floating point without one"
            )
        # One sum finds a NaN or an infinity anywhere; only then is it worth looking for where.
        if images.is_floating_point() and not torch.isfinite(images.sum(dtype=torch.float64)):
            bad = [row for row, image in zip(rows, images, strict=True) if not torch.isfinite(image).all()]
            raise ValueError(
                f"'pixel_values' hold NaN or infinite values, in the training samples {bad[:10]}: leave them out, or "
                "mend the transform that makes them"
            )

    def _checked_labels(self, labels: Any, rows: list[int], keys: list[str]) -> Tensor:
        if labels is None:
            raise ValueError(
                f"the training batches have no {self.label_name!r}, only {keys}: SMOOT needs labels; set label_names "
                "where they have another name"
            )
        labels = read_labels(labels, self.label_name, self.multi_label)
        if len(labels) != len(rows):
            raise ValueError(f"the data collator made {len(labels)} labels of {len(rows)} samples: it must keep each")
        fault = find_fault(labels, self.num_labels, self.multi_label)
        if fault is None:
            return labels
        place, must, found = fault
        raise ValueError(
            f"{self.label_name!r} must {must}; training sample {rows[place]} has {found}. {_remedy(labels)}"
        )


def _remedy(labels: Tensor) -> str:
    """What to do about labels whose values are wrong."""
    if labels.ndim == 1 and labels.min() < 0:
        return "Leave out the samples without a label"
    if labels.ndim == 1:
        return "Build the model with num_labels= the number of classes of the data"
    return (
        "Soft labels weigh the classes of one sample; for several labels per image set "
        "model.config.problem_type='multi_label_classification'"
    )


def _refuse_removed(reader: str, error: KeyError, removed: Collection[str]) -> None:
    """Raise where a transform or a collator looked for a column that the Trainer had removed."""
    name = error.args[0] if error.args else None
    if isinstance(name, str) and name in removed:
        raise ValueError(
            f"the {reader} reads {name!r}, which the Trainer has removed from the training samples, since the model's "
            "forward does not take it: set remove_unused_columns=False"
        ) from error


def _refuse_several_sizes(indexed: IndexedFeatures, error: Exception) -> None:
    """Raise where a collator failed because the images of its batch have several shapes."""
    shapes: dict[tuple[int, ...], int] = {}
    features = indexed.features if isinstance(indexed.features, list) else []
    for row, sample in zip(indexed.sample_idx, features, strict=False):
        if isinstance(sample, Mapping) and hasattr(sample.get("pixel_values"), "shape"):
            shapes.setdefault(tuple(sample["pixel_values"].shape), row)
    if len(shapes) > 1:
        found = ", ".join(f"{shape} (training sample {row})" for shape, row in list(shapes.items())[:3])
        raise ValueError(
            f"all training images must have one size, got {found}: resize them in the transform"
        ) from error


def _refuse_mixed_labels(indexed: IndexedFeatures, name: str, error: Exception) -> None:
    """Raise where a collator failed because the labels of its batch are class indices and weights, or of two widths."""
    shapes: dict[tuple[int, ...], int] = {}
    features = indexed.features if isinstance(indexed.features, list) else []
    for row, sample in zip(indexed.sample_idx, features, strict=False):
        if isinstance(sample, Mapping) and name in sample:
            shapes.setdefault(np.shape(sample[name]), row)
    if len(shapes) > 1:
        found = ", ".join(f"{shape} (training sample {row})" for shape, row in list(shapes.items())[:3])
        raise ValueError(
            f"{name!r} must be of one kind, a class index or weights of all classes, got the shapes {found}: bring "
            "them to one in the transform"
        ) from error
