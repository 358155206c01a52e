"""Comparison: two checkpoints measured on the same images, image by image."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .faithfulness import Faithfulness
from .intervals import mean_interval

Compared = Literal["deletion", "insertion", "least_salient_first", "gap"]


@dataclass(frozen=True)
class PairedDifference:
    """What was measured of the first minus that of the second, in percent.

    Attributes:
        difference: mean over the images; for deletion, negative means that the first is better.
        interval: its 95 % interval over the images, see `intervals.mean_interval`; `None` for a single image and where
            all differences are the same. One that excludes zero says that these two checkpoints differ on such images,
            not that their training methods do: that takes seeds.
        lower: share of the images, in percent, on which the first has the smaller value.
        higher: the same for the larger value; the rest are ties.
        n: images that both measured.
    """

    difference: float
    interval: tuple[float, float] | None
    lower: float
    higher: float
    n: int


def compare_faithfulness(a: Faithfulness, b: Faithfulness, curve: Compared = "deletion") -> PairedDifference:
    """Compare two measurements of the same data set image by image.

    The images are paired by the data set's fingerprint and the row. Those that either left out, because their
    attribution holds a NaN or is flat, are left out of both.

    Args:
        a: the first.
        b: the second, measured by the same convention on the same data set.
        curve: whose areas are compared; `"gap"`: area of least salient first minus area of most salient first.

    Returns:
        The mean difference a - b with its interval.

    Raises:
        ValueError: different conventions, data sets or image sizes, a data set that is not known, a curve that was not
            measured, or no image in common.
    """
    if a.convention != b.convention:
        raise ValueError(
            f"a and b must be measured by one convention, got '{a.convention.describe()}' and "
            f"'{b.convention.describe()}'"
        )
    _check_images(a, b)
    areas = [_areas(name, measured, curve) for name, measured in (("a", a), ("b", b))]
    largest = 2 * a.largest_auc if curve == "gap" else a.largest_auc
    _, rows_a, rows_b = np.intersect1d(a.sample_idx.numpy(), b.sample_idx.numpy(), return_indices=True)
    if len(rows_a) == 0:
        raise ValueError("a and b have no image in common: measure them on the same data set")
    difference = areas[0][rows_a] - areas[1][rows_b]
    return PairedDifference(
        difference=float(difference.mean()),
        interval=mean_interval(difference, (-largest, largest)),
        lower=100 * float((difference < 0).double().mean()),
        higher=100 * float((difference > 0).double().mean()),
        n=len(difference),
    )


def _areas(name: str, measured: Faithfulness, curve: Compared) -> Tensor:
    """(n,), one per image."""
    found = measured.least_salient_first if curve == "gap" else getattr(measured, curve, None)
    if found is None:
        needed = " (of least salient first)" if curve == "gap" else ""
        raise ValueError(f"{name} holds no curve {curve!r}{needed}: measure it, or compare another")
    return found.sample_auc - measured.deletion.sample_auc if curve == "gap" else found.sample_auc


def _check_images(a: Faithfulness, b: Faithfulness) -> None:
    """Raise a ValueError unless row i of one is the image in row i of the other."""
    for name, measured in (("a", a), ("b", b)):
        if measured.dataset_fingerprint is None:
            raise ValueError(
                f"{name} does not say which data set it is of (its dataset_fingerprint is None): measure it again with "
                "evaluate_faithfulness"
            )
    if a.dataset_fingerprint != b.dataset_fingerprint:
        raise ValueError(
            "a and b must be measured on the same data set (the same rows in the same order), got data sets with the "
            f"fingerprints {a.dataset_fingerprint} and {b.dataset_fingerprint}"
        )
    if not torch.equal(a.fractions, b.fractions):
        raise ValueError(
            "a and b must be measured on images of one size, got the removed fractions "
            f"{a.fractions.tolist()} and {b.fractions.tolist()}"
        )
