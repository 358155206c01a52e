"""K of the training images, class by class: which images can lose most of their pixels, and which the fewest."""

from typing import Any, NamedTuple

import numpy as np

from ..training import MaskBudget


class ClassBudget(NamedTuple):
    """K of the images of one class.

    Attributes:
        label: name of the class.
        sample_idx: int64 (n,), rows of the training set, by rising K.
        k: int32 (n,), their K, rising.
    """

    label: str
    sample_idx: np.ndarray
    k: np.ndarray


def by_class(budget: MaskBudget, images: Any) -> list[ClassBudget]:
    """K of every class that has images, by rising median. An image of several labels counts for each of them.

    Args:
        budget: of the training images.
        images: their data set, with `labels` (n,), or (n, classes) of 0 and 1, and `label_names`.
    """
    k = budget.k.numpy()
    found = []
    for number, label in enumerate(images.label_names):
        rows = np.flatnonzero(images.labels == number if images.labels.ndim == 1 else images.labels[:, number] > 0)
        rows = rows[np.argsort(k[rows], kind="stable")]
        if len(rows):
            found.append(ClassBudget(label, rows, k[rows]))
    return sorted(found, key=lambda one: float(np.median(one.k)))


def chosen(found: list[ClassBudget], count: int) -> list[ClassBudget]:
    """At most `count` classes: half of them those of lowest median, half those of highest."""
    if len(found) <= count:
        return found
    low = (count + 1) // 2
    return [*found[:low], *found[len(found) - (count - low) :]]


def extremes(one: ClassBudget, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in `one` of the images of lowest and of highest K, both rising in K; of equals the first in the data."""
    order = np.argsort(-one.k.astype(np.int64), kind="stable")
    return np.arange(min(count, len(one.k))), order[:count][::-1]
