"""How many images each class has, in words."""

from collections.abc import Mapping, Sequence

import numpy as np

# With more classes, the fewest and the most images are told alone.
_LISTED_AT_MOST = 20
_LARGEST_RATIO = 10


def describe_class_counts(names: Sequence[str], labels: Mapping[str, np.ndarray]) -> str:
    """Number of images per class and split.

    Args:
        names: of the classes, in the order of their numbers.
        labels: split -> int64 (n,), the class of every image; or (n, classes) of 0 and 1, whose images count for each
            of their labels.

    Returns:
        A line for each class; above 20 classes a line for each split, with its smallest and its largest class.
    """
    counts = {split: _counts(own, len(names)) for split, own in labels.items()}
    if len(names) > _LISTED_AT_MOST:
        return "\n".join(f"  {split:<6}{_extremes(names, own)}" for split, own in counts.items())
    width = max(map(len, names))
    rows = [
        f"  {name:<{width}}" + "".join(f"{own[number]:>8} {split}" for split, own in counts.items())
        for number, name in enumerate(names)
    ]
    return "\n".join(rows)


def imbalance(names: Sequence[str], labels: np.ndarray) -> str | None:
    """A sentence where the largest class has more than ten times the images of the smallest; else `None`.

    Args:
        names: as above.
        labels: int64 (n,), of the training images.
    """
    counts = _counts(labels, len(names))
    if counts.max() <= _LARGEST_RATIO * counts.min():
        return None
    return (
        f"the classes are of very unequal size: {_extremes(names, counts)}. The model may never predict the small "
        "ones, whatever its accuracy says: add images of them, or leave out some of the others"
    )


def _counts(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=classes) if labels.ndim == 1 else (labels > 0).sum(axis=0)


def _extremes(names: Sequence[str], counts: np.ndarray) -> str:
    fewest, most = int(counts.argmin()), int(counts.argmax())
    return f"{len(names)} classes of {counts[fewest]} ({names[fewest]}) to {counts[most]} ({names[most]}) images"
