"""Image classification data: loaded by feature type, decoded once into uint8 rows, fetched a batch at a time."""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from torch import Tensor

from .data_columns import (
    IMAGE,
    LABELS,
    PIXELS,
    as_class_labels,
    check_labels,
    find_column,
    has_labels,
    number_as,
    unlabelled_rows,
)
from .fingerprint import dataset_fingerprint
from .image_decoding import Decoding, decode_batch, decode_image
from .stored_splits import load_splits, number_as_features

logger = logging.getLogger(__name__)


# Where the held-out images are, in this order; the first that is there and has labels becomes "test".
_HELD_OUT = ("test", "validation", "valid", "val")

# What is held in memory of the decoded images at a time, and the size of a piece of the cache.
_CHUNK_BYTES = 16 * 2**20


def load_image_dataset(
    name_or_path: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> DatasetDict:
    """Load an image classification data set with the splits "train" and "test" and the columns "image" and "labels".

    Classes have the same number in every split, by their names: those of the first training file's `ClassLabel`, or,
    of plain integers or strings, all that any split has, sorted.

    Args:
        name_or_path: Hub id; local directory of Parquet files or of an imagefolder; or "digits", scikit-learn's
            handwritten digits (1,797 images of 8x8 pixels), which need no network.
        image_column: where several columns hold images.
        label_column: where several columns hold class labels, or none is marked as such.
        train_split: which split becomes "train".
        eval_split: which split becomes "test". By default the first of "test", "validation", "valid" and "val" that
            has labels; without any, a fifth of the training images is held out: always the same ones, each class in
            proportion. A split without labels (no class folders, -1 or null throughout) is passed over with a warning.

    Raises:
        ValueError: a column or a split is missing, ambiguous or of the wrong type; samples have no label; files or
            splits have different classes. The message lists the candidates, or names split and row.
        OSError: the data are neither in a local directory nor to be had from the Hub.
        ImportError: "digits" without scikit-learn.
    """
    stored = load_splits(name_or_path, train_split)
    for argument, name in {"train_split": train_split, "eval_split": eval_split}.items():
        if name is not None and name not in stored.splits:
            without = f", and without labels {stored.unlabelled}" if stored.unlabelled else ""
            found = f"only {list(stored.splits)}{without}"
            raise ValueError(f"data set {name_or_path!r} has no split {name!r}, {found}: set {argument}")
    features = stored.splits[train_split].features
    image_column = find_column(features, datasets.Image, image_column, "image_column")
    label_column = find_column(features, ClassLabel, label_column, "label_column")
    new = {image_column: IMAGE, label_column: LABELS}
    splits = {name: split.select_columns(list(new)).rename_columns(new) for name, split in stored.splits.items()}
    eval_split = eval_split or _find_held_out(splits, stored.unlabelled, name_or_path)
    roles = {"train": train_split} | ({"test": eval_split} if eval_split else {})
    for name, argument in zip(roles.values(), ("train_split", "eval_split"), strict=False):
        check_labels(splits[name], name, argument)
    # Plain labels are numbered over every split that is labelled, whichever are chosen.
    splits = as_class_labels({name: split for name, split in splits.items() if not len(unlabelled_rows(split))})
    numbered = {
        role: number_as_features(splits[name], stored.files.get(name, []), label_column) for role, name in roles.items()
    }
    return DatasetDict(numbered) if eval_split else _hold_out_a_fifth(numbered["train"], name_or_path)


def _find_held_out(splits: dict[str, Dataset], unlabelled: list[str], name_or_path: str) -> str | None:
    """The first held-out split with labels; those that have none are passed over with a warning."""
    unlabelled = [*unlabelled, *(name for name in _HELD_OUT if name in splits and not has_labels(splits[name]))]
    found = next((name for name in _HELD_OUT if name in splits and name not in unlabelled), None)
    passed_over = [name for name in _HELD_OUT if name in unlabelled]
    if passed_over:
        logger.warning("data set %r has splits without labels, which are passed over: %s", name_or_path, passed_over)
    return found


def _hold_out_a_fifth(train: Dataset, name_or_path: str) -> DatasetDict:
    logger.warning("data set %r has no held-out split: a fifth of 'train' is held out as 'test'", name_or_path)
    try:
        return train.train_test_split(test_size=0.2, seed=0, stratify_by_column=LABELS)
    except ValueError as error:
        raise ValueError(
            f"a fifth of the {len(train)} images of {name_or_path!r} cannot be held out ({error}): add a split 'test', "
            "or more images of each class"
        ) from error


def decode_images(dataset: DatasetDict, *, convert_rgb: bool = False, image_size: int | None = None) -> DatasetDict:
    """Decode every image once, into rows of uint8 that are kept in the cache of HF Datasets and memory-mapped.

    Grey images (modes L and 1) give one channel, all other 8-bit modes three. Images are turned upright as their EXIF
    data say, and laid on white where they are transparent. A second call on the same data reads the cache.

    Args:
        dataset: with the columns "image" and "labels", from `load_image_dataset`.
        convert_rgb: three channels for grey images as well, which pretrained models expect.
        image_size: bring every image to a square of this side in pixels: resized until the shorter side fits
            (bilinear, antialiased), and cropped at the centre. By default images must have one size, and keep it.

    Returns:
        The splits with the columns "pixel_values" (fixed-size lists, C x H x W) and "labels", which are numbered in all
        splits as in the first.

    Raises:
        ValueError: a split without images, or with classes that the first has not; an image that cannot be decoded,
            has more than 8 bits per channel or another size than the first, named by row and file; `image_size` below
            1.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    for name, split in dataset.items():
        if not len(split):
            raise ValueError(f"split {name!r} of the data set holds no images")
    first, *_ = dataset
    feature, labels = (dataset[first].features[column] for column in (IMAGE, LABELS))
    undecoded = {
        name: number_as(split, labels, name).cast_column(IMAGE, datasets.Image(decode=False))
        for name, split in dataset.items()
    }
    decoding = Decoding(convert_rgb, image_size)
    shape = decode_image(undecoded[first][0][IMAGE], decoding, feature, first, 0).shape
    rows = max(1, _CHUNK_BYTES // math.prod(shape))
    channels, height, width = shape
    features = Features(
        {PIXELS: List(List(List(Value("uint8"), length=width), length=height), length=channels), LABELS: labels}
    )
    return DatasetDict(
        {
            name: split.map(
                decode_batch,
                batched=True,
                with_indices=True,
                batch_size=rows,
                writer_batch_size=rows,
                features=features,
                remove_columns=[IMAGE],
                fn_kwargs={"shape": shape, "decoding": decoding, "feature": feature, "split": name},
                desc=f"Decoding {name} images",
            )
            for name, split in undecoded.items()
        }
    )


class DecodedImages(torch.utils.data.Dataset):
    """Decoded images and their labels, fetched a batch at a time without a step of Python per sample.

    `__getitems__` gives the whole batch as one dict of tensors; `collate` is the collator that knows it. May be sent
    to the workers of a `DataLoader`; they share the memory-mapped file.

    Args:
        dataset: one split of what `decode_images` gave; may be a selection of its rows.

    Raises:
        ValueError: the columns are others, samples without a label (-1), or of a class that has no name.
    """

    def __init__(self, dataset: Dataset) -> None:
        if set(dataset.column_names) != {PIXELS, LABELS}:
            raise ValueError(f"expected the columns {PIXELS!r} and {LABELS!r} of decode_images: {dataset.column_names}")
        # Rows picked from all over are written together once, instead of looked up in every batch.
        self.dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
        self._open()
        if len(self._labels) and self._labels.min() < 0:
            raise ValueError("the data set has samples without a label (-1): it cannot be trained or evaluated on")
        if len(self._labels) and self._labels.max() >= len(self.label_names):
            raise ValueError(
                f"the data set has samples of class {self._labels.max()}, but only {len(self.label_names)} classes: "
                "give all its splits the same class names"
            )

    def _open(self) -> None:
        """Views of the stored rows, one (n, C*H*W) array per piece; no copies."""
        # Asked for once: the data set copies its features every time.
        per_channel = self.dataset.features[PIXELS]
        self._image_shape = per_channel.length, per_channel.feature.length, per_channel.feature.feature.length
        table = self.dataset.data
        pieces = [_flat(chunk) for chunk in table.column(PIXELS).chunks if len(chunk)]
        self._pieces = [piece.reshape(-1, math.prod(self.image_shape)) for piece in pieces]
        self._starts = np.cumsum([0, *(len(piece) for piece in self._pieces)])
        self._labels = np.array(table.column(LABELS).to_numpy(), dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # A view would be pickled as the pixels themselves.
        return {"dataset": self.dataset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.dataset = state["dataset"]
        self._open()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: "pixel_values" uint8 (C, H, W), "labels" int."""
        batch = self.__getitems__([index])
        return {PIXELS: batch[PIXELS][0], LABELS: int(batch[LABELS][0])}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch: "pixel_values" uint8 (B, C, H, W), "labels" int64 (B,).

        Raises:
            IndexError: an index outside [-N, N).
        """
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and not (-len(self) <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"index {rows.min()} or {rows.max()} is outside a data set of {len(self)} images")
        rows = np.where(rows < 0, rows + len(self), rows)
        # Sorted, each piece fills a stretch of the batch in one go; a second copy brings back the order asked for.
        order = rows.argsort()
        ascending = rows[order]
        pixels = np.empty((len(rows), math.prod(self.image_shape)), dtype=np.uint8)
        piece_of_row = self._starts.searchsorted(ascending, side="right") - 1
        for piece, first, count in zip(*np.unique(piece_of_row, return_index=True, return_counts=True), strict=True):
            here = slice(first, first + count)
            # "clip" writes straight into the batch; the rows lie within the piece anyway.
            self._pieces[piece].take(ascending[here] - self._starts[piece], axis=0, out=pixels[here], mode="clip")
        images = torch.from_numpy(pixels.take(order.argsort(), axis=0)).reshape(-1, *self.image_shape)
        return {PIXELS: images, LABELS: torch.from_numpy(self._labels[rows])}

    @staticmethod
    def collate(batch: dict[str, Tensor] | list[dict[str, Any]]) -> dict[str, Tensor]:
        """The collator: a batch of `__getitems__` as it is, a list of samples stacked."""
        if isinstance(batch, dict):
            return batch
        images = torch.stack([sample[PIXELS] for sample in batch])
        return {PIXELS: images, LABELS: torch.tensor([sample[LABELS] for sample in batch], dtype=torch.int64)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self._image_shape

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), the class of every image."""
        return self._labels

    @property
    def label_names(self) -> list[str]:
        """Name of every class, in the order of the label indices."""
        return list(self.dataset.features[LABELS].names)

    @cached_property
    def fingerprint(self) -> str | None:
        """Short hash of the content; tells the data that a saved mask budget belongs to from any other."""
        return dataset_fingerprint(self.dataset)

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of pixels / 255, over all images; exact."""
        counts = np.zeros((self.image_shape[0], 256), dtype=np.int64)
        for images in self._blocks():
            for channel, pixels in enumerate(images.transpose(1, 0, 2)):
                counts[channel] += np.bincount(pixels.ravel(), minlength=256)
        values = np.arange(256) / 255
        weights = counts / counts.sum(axis=1, keepdims=True)
        mean = weights @ values
        deviation = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(axis=1))
        return tuple(mean.tolist()), tuple(deviation.tolist())

    def _blocks(self) -> Iterator[np.ndarray]:
        """All pixels as (n, C, H*W), in blocks of about 2 MiB: counting takes eight times as much again."""
        channels = self.image_shape[0]
        for piece in self._pieces:
            rows = max(1, 2**21 // piece.shape[1])
            for start in range(0, len(piece), rows):
                yield piece[start : start + rows].reshape(-1, channels, piece.shape[1] // channels)


def _flat(chunk: pa.Array) -> np.ndarray:
    """The values of nested fixed-size lists as one array that shares their memory."""
    while pa.types.is_fixed_size_list(chunk.type):
        chunk = chunk.flatten()
    return chunk.to_numpy(zero_copy_only=True)
