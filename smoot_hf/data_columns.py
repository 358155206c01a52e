"""The columns of an image classification data set: which holds the images, which the labels."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image

from .class_names import numbers_by_name

IMAGE, PIXELS, LABELS = "image", "pixel_values", "labels"


def find_column(features: Features, feature_type: type, given: str | None, argument: str) -> str:
    """The one column of a feature type, or the given one.

    Raises:
        ValueError: none, several, or one of another type; the message lists the candidates.
    """
    if given is not None:
        if given not in features:
            raise ValueError(f"{argument}={given!r} is not a column of the data set, only {list(features)}")
        # Labels may be plain numbers or text, images not.
        if feature_type is Image and not isinstance(features[given], Image):
            raise ValueError(f"{argument}={given!r} must hold images, but is of type {features[given]}")
        return given
    candidates = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    if len(candidates) == 1:
        return candidates[0]
    found = f"several columns could be meant, {candidates}" if candidates else f"no column of {dict(features)} fits"
    hint = ". An imagefolder has a folder for each class, two or more" if feature_type is ClassLabel else ""
    raise ValueError(f"{argument} must be set: {found} (type {feature_type.__name__}){hint}")


def as_class_labels(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Number the labels of a plain column of integers or strings, in the same way in every split.

    Raises:
        ValueError: labels that are neither integers nor strings.
    """
    if all(isinstance(split.features[LABELS], ClassLabel) for split in splits.values()):
        return splits
    values = sorted({value for split in splits.values() for value in split.unique(LABELS)} - {None})
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"label_column must hold class labels, integers or strings, got {values[:5]}")
    number = {value: index for index, value in enumerate(values)}
    feature = ClassLabel(names=[str(value) for value in values])
    return {
        name: with_labels(split, np.array([number.get(value, -1) for value in split[LABELS]]), feature)
        for name, split in splits.items()
    }


def has_labels(split: Dataset) -> bool:
    """Whether any sample of a split has a label; an empty split is not called unlabelled."""
    return len(split) == 0 or len(unlabelled_rows(split)) < len(split)


def check_labels(split: Dataset, name: str, argument: str) -> None:
    """Refuse samples without a label.

    Raises:
        ValueError: there are some; naming the split, the first row, and the argument that chooses another split.
    """
    rows = unlabelled_rows(split)
    if len(rows):
        value = "null" if split[int(rows[0])][LABELS] is None else -1
        raise ValueError(
            f"split {name!r} has {len(rows)} of {len(split)} samples without a label ({value}), the first in row "
            f"{rows[0]}: leave them out, or name another split by {argument}"
        )


def unlabelled_rows(split: Dataset) -> np.ndarray:
    """Rows whose label is null or, among numbers, -1; unless -1 and 1 are all there is, which some call two classes."""
    labels = _stored_labels(split)
    is_missing = labels.is_null()
    if pa.types.is_integer(labels.type) and set(labels.unique().to_pylist()) != {-1, 1}:
        is_missing = pc.or_(is_missing, pc.equal(labels, -1).fill_null(False))
    return np.flatnonzero(is_missing.to_numpy())


def number_as(split: Dataset, feature: ClassLabel, name: str) -> Dataset:
    """The split `name` with the class labels of another, by their names.

    Raises:
        ValueError: it has a class that `feature` has not, with the names of both.
    """
    own = split.features[LABELS]
    if own == feature:
        return split
    return with_labels(split, renumbered(label_numbers(split), own.names, feature.names, f"split {name!r}"), feature)


def label_numbers(split: Dataset) -> np.ndarray:
    """int64 (n,): class labels as stored; -1 where there is none."""
    return _stored_labels(split).fill_null(-1).to_numpy().astype(np.int64)


def renumbered(numbers: np.ndarray, own: Sequence[str], names: Sequence[str], what: str) -> np.ndarray:
    """int64 (n,): numbers of the classes `own` become those of the same names in `names`; -1 stays.

    Raises:
        ValueError: by name they cannot be told.
    """
    if numbers.max(initial=-1) >= len(own):
        raise ValueError(f"{what} has samples of class {numbers.max()}, but only {len(own)} classes")
    try:
        table = np.array(numbers_by_name(own, names))
    except ValueError as error:
        raise ValueError(
            f"the data set numbers its classes in several ways, and {what} cannot be brought into line: its {error}; "
            "give all files and splits the same class names"
        ) from error
    return np.where(numbers < 0, -1, table[numbers])


def with_labels(split: Dataset, numbers: np.ndarray, feature: ClassLabel) -> Dataset:
    """The split with other labels, int64 (n,)."""
    return split.remove_columns(LABELS).add_column(LABELS, numbers.tolist(), feature=feature)


def _stored_labels(split: Dataset) -> pa.ChunkedArray:
    return split.select_columns([LABELS]).with_format("arrow")[:][LABELS]
