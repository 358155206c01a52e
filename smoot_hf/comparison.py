"""Comparison: two checkpoints measured on the same images, image by image."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .evaluation import Faithfulness
from .intervals import mean_interval

Compared = Literal["deletion", "insertion", "least_salient_first"]


@dataclass(frozen=True)
class PairedDifference:
    """Area of the first minus area of the second, in percent.

    Attributes:
        difference: mean over the images; for deletion, negative means that the first is better.
        interval: its 95 % interval over the images, see `intervals.mean_interval`; `None` for a single image and where
            all differences are the same. One that excludes zero says that these two checkpoints differ on such images,
            not that their training methods do: that takes seeds.
        lower: share of the images, in percent, on which the first has the smaller area.
        higher: the same for the larger area; the rest are ties.
        n: images that both measured.
    """

    difference: float
    interval: tuple[float, float] | None
    lower: float
    higher: float
    n: int


def compare_faithfulness(a: Faithfulness, b: Faithfulness, curve: Compared = "deletion") -> PairedDifference:
    """Compare two measurements of the same data set image by image.

    Images that either left out (NaN attributions) are left out of both.

    Args:
        a: the first.
        b: the second, measured by the same convention.
        curve: whose areas are compared.

    Returns:
        The mean difference a - b with its interval.

    Raises:
        ValueError: different conventions or fractions, a curve that was not measured, or no image in common.
    """
    if a.convention != b.convention or not torch.equal(a.fractions, b.fractions):
        raise ValueError(
            "a and b must be measured by one convention, "
            f"got '{a.convention.describe()}' and '{b.convention.describe()}'"
        )
    areas = []
    for name, measured in (("a", a), ("b", b)):
        found = getattr(measured, curve, None)
        if found is None:
            raise ValueError(f"{name} holds no curve {curve!r}: measure it, or compare another")
        areas.append(found.sample_auc)
    _, rows_a, rows_b = np.intersect1d(a.sample_idx.numpy(), b.sample_idx.numpy(), return_indices=True)
    if len(rows_a) == 0:
        raise ValueError("a and b have no image in common: measure them on the same data set")
    difference = areas[0][rows_a] - areas[1][rows_b]
    return PairedDifference(
        difference=float(difference.mean()),
        interval=mean_interval(difference, (-a.largest_auc, a.largest_auc)),
        lower=100 * float((difference < 0).double().mean()),
        higher=100 * float((difference > 0).double().mean()),
        n=len(difference),
    )
