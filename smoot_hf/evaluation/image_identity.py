"""Image identity: which images a measurement is of, so that two measurements are compared on the same ones only."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ..fingerprint import dataset_fingerprint


class ImageIdentity:
    """The fingerprint of a data set, or of the images and labels that it gave where the data set has none.

    A list of samples, or a data set of the user's own, has no fingerprint that depends on its content. Its images and
    labels are hashed as they are read, before any normalisation, so that models with different input pipelines can be
    compared on it.

    Args:
        dataset: the data set that is measured.
    """

    def __init__(self, dataset: Any) -> None:
        self._known = dataset_fingerprint(dataset) if _is_identified(dataset) else None
        self._pixels, self._labels = hashlib.sha256(), hashlib.sha256()
        self._kind: set[tuple[str, tuple[int, ...]]] = set()

    def update(self, pixel_values: Tensor, labels: Tensor) -> None:
        """Take in the next rows.

        Args:
            pixel_values: (B, C, H, W) as the data set gives them.
            labels: int64 (B,).
        """
        if self._known is not None:
            return
        # Two streams: images before labels in one would depend on the size of the batches.
        self._kind.add((str(pixel_values.dtype), tuple(pixel_values.shape[1:])))
        self._pixels.update(_bytes(pixel_values))
        self._labels.update(_bytes(labels))

    @property
    def fingerprint(self) -> str:
        """Of the data set, or 16 hexadecimal digits for what has been read so far."""
        if self._known is not None:
            return self._known
        kind = repr(sorted(self._kind)).encode()
        return hashlib.sha256(kind + self._pixels.digest() + self._labels.digest()).hexdigest()[:16]


def _is_identified(dataset: Any) -> bool:
    """Whether `dataset_fingerprint` knows the content: indices into data that nothing identifies are not enough."""
    if isinstance(dataset, Subset):
        return _is_identified(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return dataset_fingerprint(dataset) is not None and all(map(_is_identified, dataset.datasets))
    return dataset_fingerprint(dataset) is not None


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().cpu().view(torch.uint8).numpy().tobytes()
