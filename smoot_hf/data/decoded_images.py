"""Decoded images: a data set decoded once into rows of uint8, and fetched a batch at a time."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from ..fingerprint import dataset_fingerprint
from .dataset import EVIDENCE, IMAGE, LABELS, PIXELS, number_as
from .input_pipeline import InputPipeline

# What shows through where an image is transparent. Drawings on nothing are mostly dark, and on paper white.
BACKGROUND = "white"

_TO_GREY = {"L", "1"}
_TO_RGB = {"RGB", "P", "PA", "RGBA", "LA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


class Decoding(NamedTuple):
    """How images are decoded. The cache of decoded images is kept by these values, not by the code.

    Attributes:
        convert_rgb: three channels for grey images as well.
        image_size: side of the square that images are resized and cropped to, in pixels; `None`: as they are.
        background: colour that shows through transparency.
        resizing: what else brings images to one size: the fields of a pipeline that say so, and no others.
    """

    convert_rgb: bool = False
    image_size: int | None = None
    background: str = BACKGROUND
    resizing: InputPipeline | None = None


class UndecodableError(ValueError):
    """An image that is missing or cannot be decoded."""


class UnequalSizeError(ValueError):
    """An image of another size, or number of channels, than the first."""


def pixels_of(image: Image.Image, decoding: Decoding) -> np.ndarray:
    """uint8 (C, H, W) of one image; see `decode_images`.

    Raises:
        ValueError: more than 8 bits per channel.
    """
    if image.mode not in _TO_GREY | _TO_RGB:
        raise ValueError(f"its mode {image.mode!r} has more than 8 bits per channel, scale it to 8 bits")
    is_grey = image.mode in _TO_GREY and not decoding.convert_rgb
    flat = on_background(image, decoding.background).convert("L" if is_grey else "RGB")
    if decoding.image_size is not None:
        flat = ImageOps.fit(flat, (decoding.image_size, decoding.image_size), Image.Resampling.BILINEAR)
    array = np.asarray(flat)
    array = array[None] if is_grey else array.transpose(2, 0, 1)
    if decoding.resizing is not None:
        array = decoding.resizing.resize_images(torch.tensor(array)[None])[0].numpy()
    return array


def on_background(image: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """An image without transparency: laid on the background where it has some, the same image where it has none."""
    if not image.has_transparency_data:
        return image
    # Pillow converts premultiplied grey by way of grey alone.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    laid = Image.alpha_composite(Image.new("RGBA", image.size, background), rgba)
    return laid.convert("L" if image.mode in _TO_GREY else "RGB")


def decode_image(
    value: dict[str, Any] | None, decoding: Decoding, feature: datasets.Image, split: str, row: int
) -> np.ndarray:
    """uint8 (C, H, W) of the image that is stored as `value`, upright as its EXIF data say.

    Raises:
        UndecodableError: there is none, or it cannot be decoded; naming the row and, where there is one, the file.
    """
    if value is None:
        raise UndecodableError(f"row {row} of split {split!r} has no image (null)")
    try:
        return pixels_of(feature.decode_example(_with_bytes(value)), decoding)
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, struct.error
        reason = re.sub(r" <_io.*>", "", str(error)) or type(error).__name__  # the address of a buffer helps nobody
        raise UndecodableError(f"{_place(value, split, row)} cannot be decoded ({reason})") from error


def decode_batch(
    batch: dict[str, list[Any]],
    rows: list[int],
    shape: tuple[int, int, int],
    decoding: Decoding,
    feature: datasets.Image,
    split: str,
) -> pa.Table:
    """Undecoded rows (bytes or path) as the columns "pixel_values" and "labels".

    Args:
        batch: the rows.
        rows: their numbers in the split.
        shape: (channels, height, width) that every image must have.
        decoding: how.
        feature: that decodes an image.
        split: its name, for errors.

    Raises:
        UndecodableError: an image that cannot be decoded.
        UnequalSizeError: one of another (channels, height, width) than `shape`.
    """
    arrays = []
    for value, row in zip(batch[IMAGE], rows, strict=True):
        array = decode_image(value, decoding, feature, split, row)
        if array.shape != shape:
            advice = (
                "set convert_rgb (--convert_rgb), which gives grey images three channels as well"
                if array.shape[1:] == shape[1:]
                else "set image_size (--image_size), the side of a square that all are resized and cropped to"
            )
            raise UnequalSizeError(
                f"all images must have one size: the first is {shape} (channels, height, width), "
                f"{_place(value, split, row)} is {array.shape}; {advice}"
            )
        arrays.append(array)
    return _as_rows(np.stack(arrays), batch[LABELS])


def _as_rows(images: np.ndarray, labels: Sequence[int] | Sequence[list[int]]) -> pa.Table:
    """uint8 (n, C, H, W) and the class, or the list of labels, of each as the columns "pixel_values" and "labels"."""
    pixels = pa.array(images.ravel())
    for length in reversed(images.shape[1:]):
        pixels = pa.FixedSizeListArray.from_arrays(pixels, length)
    return pa.table({PIXELS: pixels, LABELS: pa.array(labels)})


def _features(shape: tuple[int, ...], labels: ClassLabel | List) -> Features:
    """Of such rows; `shape` is (C, H, W)."""
    channels, height, width = shape
    return Features(
        {PIXELS: List(List(List(Value("uint8"), length=width), length=height), length=channels), LABELS: labels}
    )


def _with_bytes(value: dict[str, Any]) -> dict[str, Any]:
    """The stored image with the content of its file, which HF Datasets leaves open where it cannot be decoded."""
    if value["bytes"] is None and os.path.isfile(value["path"] or ""):
        return value | {"bytes": Path(value["path"]).read_bytes()}
    return value


def _place(value: dict[str, Any], split: str, row: int) -> str:
    where = f" ({value['path']})" if value.get("path") else ""
    return f"the image in row {row} of split {split!r}{where}"


# How many of the images that cannot be decoded an error names.
_NAMED_AT_MOST = 5
# What is held in memory of the decoded images at a time, and the size of a piece of the cache.
_CHUNK_BYTES = 16 * 2**20


def decode_images(
    dataset: DatasetDict,
    *,
    convert_rgb: bool = False,
    image_size: int | None = None,
    input_pipeline: InputPipeline | None = None,
) -> DatasetDict:
    """Decode every image once, into rows of uint8 that are kept in the cache of HF Datasets and memory-mapped.

    Grey images (modes L and 1) give one channel, all other 8-bit modes three. Images are turned upright as their EXIF
    data say, and laid on white where they are transparent. A second call on the same data reads the cache.

    Args:
        dataset: with the columns "image" and "labels", from `load_image_dataset`.
        convert_rgb: three channels for grey images as well, which pretrained models expect.
        image_size: bring every image to a square of this side in pixels: resized until the shorter side fits
            (bilinear, antialiased), and cropped at the centre. By default images must have one size, and keep it.
        input_pipeline: bring every image to the size of the model's input as this pipeline does (see `resize_images`
            of it). Masks then act at that size. What trains and evaluates on such images takes
            `input_pipeline.with_images_resized()`.

    Returns:
        The splits with the columns "pixel_values" (fixed-size lists, C x H x W) and "labels", which are numbered in all
        splits as in the first.

    Raises:
        ValueError: a split without images, or with classes that the first has not; an image that cannot be decoded,
            has more than 8 bits per channel or another size than the first, named by row and file (of those that
            cannot be decoded all are counted, and the first few named); `image_size` below 1, or beside an
            `input_pipeline`.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    if image_size is not None and input_pipeline is not None:
        raise ValueError(
            f"image_size={image_size} and input_pipeline both say the size of the images: give one of them"
        )
    for name, split in dataset.items():
        if not len(split):
            raise ValueError(f"split {name!r} of the data set holds no images")
    first, *_ = dataset
    feature, labels = (dataset[first].features[column] for column in (IMAGE, LABELS))
    undecoded = {
        name: number_as(split, labels, name).cast_column(IMAGE, datasets.Image(decode=False))
        for name, split in dataset.items()
    }
    decoding = Decoding(convert_rgb, image_size, resizing=input_pipeline and _resizing_alone(input_pipeline))
    try:
        shape = decode_image(undecoded[first][0][IMAGE], decoding, feature, first, 0).shape
        return DatasetDict(
            {name: _decode_split(split, name, shape, decoding, feature) for name, split in undecoded.items()}
        )
    except UndecodableError as error:
        raise ValueError(_describe_undecodable(undecoded, decoding, feature)) from error
    except UnequalSizeError as error:
        raise ValueError(_with_short_paths(str(error), _common_folder(undecoded))) from error


def _decode_split(
    split: Dataset, name: str, shape: tuple[int, int, int], decoding: Decoding, feature: datasets.Image
) -> Dataset:
    """One split's rows of pixels, each of that (channels, height, width)."""
    rows = max(1, _CHUNK_BYTES // math.prod(shape))
    _, height, width = shape
    return split.map(
        decode_batch,
        batched=True,
        with_indices=True,
        batch_size=rows,
        writer_batch_size=rows,
        features=_features(shape, split.features[LABELS]),
        remove_columns=[IMAGE],
        fn_kwargs={"shape": shape, "decoding": decoding, "feature": feature, "split": name},
        # Shown before anything is written, and not at all where the cache has the rows.
        desc=f"Decoding {len(split)} {name} images of {height}x{width}, {_size(len(split) * math.prod(shape))} on disk",
    )


def _resizing_alone(pipeline: InputPipeline) -> InputPipeline:
    """Without what says nothing about the size, so that the cache serves every seed and augmentation."""
    return replace(
        pipeline, mean=(0.0,), std=(1.0,), crop_padding=0, horizontal_flip=False, mix=None, seed=0, is_resized=False
    )


def _size(count: int) -> str:
    """A number of bytes, in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _describe_undecodable(splits: dict[str, Dataset], decoding: Decoding, feature: datasets.Image) -> str:
    """All images that cannot be decoded, found in one pass over all splits; the first few are named.

    Runs where one has been found: nobody wants to meet the others one attempt after the other.
    """
    found, folder = [], _common_folder(splits)
    for name, split in splits.items():
        for row, value in enumerate(tqdm(split[IMAGE], desc=f"Looking for more {name} images that cannot be decoded")):
            try:
                decode_image(value, decoding, feature, name, row)
            except UndecodableError as error:
                found.append(_with_short_paths(str(error), folder))
    if len(found) == 1:
        return f"{found[0]}: mend or remove it"
    more = f"; and {len(found) - _NAMED_AT_MOST} more" if len(found) > _NAMED_AT_MOST else ""
    return f"{len(found)} images cannot be used, mend or remove them: {'; '.join(found[:_NAMED_AT_MOST])}{more}"


def _with_short_paths(message: str, folder: str | None) -> str:
    """A message in which files are named by their paths below the data set's folder."""
    return message.replace(f"({folder}{os.sep}", "(")


def _common_folder(splits: dict[str, Dataset]) -> str | None:
    """The folder that all image files of a data set lie in; `None` where they are none on this machine."""
    paths = [value["path"] for split in splits.values() for value in split[IMAGE] if value and value["path"]]
    return os.path.commonpath([os.path.dirname(path) for path in paths]) if any(map(os.path.isabs, paths)) else None


class DecodedImages(torch.utils.data.Dataset):
    """Decoded images and their labels, fetched a batch at a time without a step of Python per sample.

    `__getitems__` gives the whole batch as one dict of tensors; `collate` is the collator that knows it. May be sent
    to the workers of a `DataLoader`; they share the memory-mapped file.

    Args:
        dataset: one split of what `decode_images` gave; may be a selection of its rows.
        evidence: as that of `PlantedImages`; `None` where nobody knows. With it every row has the entry "evidence",
            which `evaluate_localisation` asks for.
        is_resized: whether that was called with an `input_pipeline`.

    Raises:
        ValueError: the columns are others, samples without a label (-1), or of a class that has no name; or evidence
            of another type or shape.
    """

    def __init__(self, dataset: Dataset, evidence: Tensor | None = None, *, is_resized: bool = False) -> None:
        if set(dataset.column_names) != {PIXELS, LABELS}:
            raise ValueError(f"expected the columns {PIXELS!r} and {LABELS!r} of decode_images: {dataset.column_names}")
        # Rows picked from all over are written together once, instead of looked up in every batch.
        self.dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
        self.evidence, self.is_resized = evidence, is_resized
        self._open()
        expected, kind = (len(self), *self.image_shape[1:]), torch.int16 if self.is_multi_label else torch.bool
        if evidence is not None and (evidence.dtype != kind or tuple(evidence.shape) != expected):
            name = str(kind).removeprefix("torch.")
            raise ValueError(f"evidence must be {name} {expected}, got {evidence.dtype} {tuple(evidence.shape)}")
        if self.is_multi_label:
            return
        if len(self._labels) and self._labels.min() < 0:
            raise ValueError("the data set has samples without a label (-1): it cannot be trained or evaluated on")
        if len(self._labels) and self._labels.max() >= len(self.label_names):
            raise ValueError(
                f"the data set has samples of class {self._labels.max()}, but only {len(self.label_names)} classes: "
                "give all its splits the same class names"
            )

    @classmethod
    def of_tensors(
        cls, pixel_values: Tensor, labels: Tensor, label_names: Sequence[str], evidence: Tensor | None = None
    ) -> Self:
        """The same of images that are in memory.

        Args:
            pixel_values: uint8 (N, C, H, W).
            labels: int64 (N,), or of several labels (N, classes) of 0 and 1.
            label_names: name of every class.
            evidence: as above.
        """
        names = ClassLabel(names=list(label_names))
        features = _features(tuple(pixel_values.shape[1:]), names if labels.ndim == 1 else List(names))
        numbers = labels.tolist() if labels.ndim == 1 else [row.nonzero()[:, 0].tolist() for row in labels]
        rows = _as_rows(pixel_values.numpy(), numbers).cast(features.arrow_schema)
        return cls(Dataset(rows), evidence)

    def _open(self) -> None:
        """Views of the stored rows, one (n, C*H*W) array per piece; no copies."""
        # Asked for once: the data set copies its features every time.
        per_channel = self.dataset.features[PIXELS]
        self._image_shape = per_channel.length, per_channel.feature.length, per_channel.feature.feature.length
        table = self.dataset.data
        pieces = [_flat(chunk) for chunk in table.column(PIXELS).chunks if len(chunk)]
        self._pieces = [piece.reshape(-1, math.prod(self.image_shape)) for piece in pieces]
        self._starts = np.cumsum([0, *(len(piece) for piece in self._pieces)])
        if not self.is_multi_label:
            self._labels = np.array(table.column(LABELS).to_numpy(), dtype=np.int64)
            return
        labels = table.column(LABELS).combine_chunks()
        self._labels = np.zeros((len(labels), len(self.label_names)), dtype=np.float32)
        self._labels[pc.list_parent_indices(labels), labels.flatten()] = 1

    def __getstate__(self) -> dict[str, Any]:
        # A view would be pickled as the pixels themselves.
        return {"dataset": self.dataset, "evidence": self.evidence, "is_resized": self.is_resized}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.dataset, self.evidence, self.is_resized = state["dataset"], state["evidence"], state["is_resized"]
        self._open()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: "pixel_values" uint8 (C, H, W), "labels" int; where it is known, "evidence" bool (H, W).

        Of several labels "labels" is float32 (classes,), and "evidence" bool (classes, H, W).
        """
        row = {name: values[0] for name, values in self.__getitems__([index]).items()}
        return {**row, LABELS: row[LABELS] if self.is_multi_label else int(row[LABELS])}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch: the entries of `__getitem__`, stacked.

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
        batch = {PIXELS: images, LABELS: torch.from_numpy(self._labels[rows])}
        if self.evidence is None:
            return batch
        return {**batch, EVIDENCE: evidence_masks(self.evidence[torch.from_numpy(rows)], batch[LABELS])}

    @staticmethod
    def collate(batch: dict[str, Tensor] | list[dict[str, Any]]) -> dict[str, Tensor]:
        """The collator: a batch of `__getitems__` as it is, a list of samples stacked; without "evidence"."""
        if isinstance(batch, dict):
            # No model takes it.
            return {name: values for name, values in batch.items() if name != EVIDENCE}
        images = torch.stack([sample[PIXELS] for sample in batch])
        return {PIXELS: images, LABELS: torch.stack([torch.as_tensor(sample[LABELS]) for sample in batch])}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self._image_shape

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), the class of every image; of several labels float32 (N, classes) of 0 and 1."""
        return self._labels

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return isinstance(self.dataset.features[LABELS], List)

    @property
    def label_names(self) -> list[str]:
        """Name of every class, in the order of the label indices."""
        feature = self.dataset.features[LABELS]
        return list((feature.feature if self.is_multi_label else feature).names)

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


def evidence_masks(evidence: Tensor, labels: Tensor) -> Tensor:
    """Evidence of a batch as `evaluate_localisation` takes it: bool (B, H, W), or of several labels one for each.

    Args:
        evidence: bool (B, H, W); or int16 (B, H, W), the label that can be read at a position, -1 where there is none.
        labels: of the batch; (B, classes) with the latter.
    """
    if evidence.dtype == torch.bool:
        return evidence
    return evidence[:, None] == torch.arange(labels.shape[1])[:, None, None]


def _flat(chunk: pa.Array) -> np.ndarray:
    """The values of nested fixed-size lists as one array that shares their memory."""
    while pa.types.is_fixed_size_list(chunk.type):
        chunk = chunk.flatten()
    return chunk.to_numpy(zero_copy_only=True)
