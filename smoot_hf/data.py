"""Image classification data: loaded by feature type, decoded once into uint8 rows, fetched a batch at a time."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image
from torch import Tensor

from .data_columns import IMAGE, LABELS, PIXELS, as_class_labels, find_column
from .fingerprint import dataset_fingerprint
from .image_decoding import decode_batch, pixels_of, stored_image

logger = logging.getLogger(__name__)


# Where the held-out images are, in this order; the first that is there becomes "test".
_HELD_OUT = ("test", "validation", "valid", "val")

# What is held in memory of the decoded images at a time, and the size of a piece of the cache.
_CHUNK_BYTES = 16 * 2**20


def load_image_dataset(
    name_or_path: str, *, image_column: str | None = None, label_column: str | None = None
) -> DatasetDict:
    """Load an image classification data set with the splits "train" and "test" and the columns "image" and "labels".

    The held-out split is the first that exists of "test", "validation", "valid" and "val". Without any, a fifth of the
    training images is held out: always the same ones, each class in proportion.

    Args:
        name_or_path: Hub id; local directory of Parquet files or of an imagefolder; or "digits", scikit-learn's
            handwritten digits (1,797 images of 8x8 pixels), which need no network.
        image_column: where several columns hold images.
        label_column: where several columns hold class labels, or none is marked as such.

    Raises:
        ValueError: a column or a split is missing, ambiguous or of the wrong type, or samples have no label; the
            message lists the candidates.
        OSError: the data are neither in a local directory nor to be had from the Hub.
        ImportError: "digits" without scikit-learn.
    """
    splits = _digits() if name_or_path == "digits" else _load(name_or_path)
    if "train" not in splits:
        raise ValueError(f"data set {name_or_path!r} has no split 'train', only {list(splits)}")
    held_out = next((name for name in _HELD_OUT if name in splits), None)
    chosen = {"train": splits["train"], **({"test": splits[held_out]} if held_out else {})}
    image_column = find_column(splits["train"].features, datasets.Image, image_column, "image_column")
    label_column = find_column(splits["train"].features, ClassLabel, label_column, "label_column")
    columns = {image_column: IMAGE, label_column: LABELS}
    renamed = {name: split.select_columns(list(columns)).rename_columns(columns) for name, split in chosen.items()}
    labelled = as_class_labels(DatasetDict(renamed))
    if held_out is None:
        logger.warning("data set %r has no held-out split: a fifth of 'train' is held out as 'test'", name_or_path)
        try:
            labelled = labelled["train"].train_test_split(test_size=0.2, seed=0, stratify_by_column=LABELS)
        except ValueError as error:
            raise ValueError(
                f"a fifth of the {len(labelled['train'])} images of {name_or_path!r} cannot be held out ({error}): add "
                "a split 'test', or more images of each class"
            ) from error
    return labelled


def decode_images(dataset: DatasetDict, *, convert_rgb: bool = False) -> DatasetDict:
    """Decode every image once, into rows of uint8 that are kept in the cache of HF Datasets and memory-mapped.

    Grey images (modes L and 1) give one channel, all other 8-bit modes three; transparency is dropped. A second call
    on the same data reads the cache.

    Args:
        dataset: with the columns "image" and "labels", from `load_image_dataset`.
        convert_rgb: three channels for grey images as well, which pretrained models expect.

    Returns:
        The splits with the columns "pixel_values" (fixed-size lists, C x H x W) and "labels".

    Raises:
        ValueError: a split without images, an image that cannot be decoded, images of several sizes, or of more than 8
            bits per channel.
    """
    for name, split in dataset.items():
        if not len(split):
            raise ValueError(f"split {name!r} of the data set holds no images")
    feature = dataset["train"].features[IMAGE]
    undecoded = DatasetDict(
        {name: split.cast_column(IMAGE, datasets.Image(decode=False)) for name, split in dataset.items()}
    )
    shape = pixels_of(stored_image(undecoded["train"][0][IMAGE], feature, "train", 0), convert_rgb).shape
    rows = max(1, _CHUNK_BYTES // int(np.prod(shape)))
    channels, height, width = shape
    features = Features(
        {
            PIXELS: List(List(List(Value("uint8"), length=width), length=height), length=channels),
            LABELS: dataset["train"].features[LABELS],
        }
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
                fn_kwargs={"shape": shape, "convert_rgb": convert_rgb, "feature": feature, "split": name},
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


def _load(name_or_path: str) -> DatasetDict:
    try:
        return datasets.load_dataset(name_or_path)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        is_here = os.path.exists(name_or_path)
        remedy = "mend or replace its files" if is_here else "--dataset takes a local directory as well"
        raise OSError(f"cannot load the data set {name_or_path!r} ({reason}): {remedy}") from error


def _digits() -> DatasetDict:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set 'digits' needs scikit-learn: pip install 'smoot-hf[recipes]'") from error
    bunch = load_digits()
    # Sixteen grey levels and zero, spread over the whole range of a byte.
    images = [Image.fromarray(image) for image in (bunch.images * (255 / 16)).round().astype(np.uint8)]
    features = Features({IMAGE: datasets.Image(), LABELS: ClassLabel(names=[str(digit) for digit in range(10)])})
    digits = Dataset.from_dict({IMAGE: images, LABELS: bunch.target.tolist()}, features=features)
    return digits.train_test_split(test_size=0.2, seed=0, stratify_by_column=LABELS)
