"""The metrics for `evaluate`: where their files are, and the means that each of them reports.

`deletion_auc`, `insertion_auc` and `localisation` are folders that `evaluate.load` takes by path, not modules to
import. Until version 0.1.0 the first two were in `smoot_hf/metrics`; `metric_path` gives the place of today.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args

import torch

from ...functional import area_under_curve
from ...functional.localisation import evidence_share, top_outside
from ..localisation import MEASURES

MetricName = Literal["deletion_auc", "insertion_auc", "localisation"]


def metric_path(name: MetricName) -> str:
    """The folder of a metric, for `evaluate.load(metric_path("deletion_auc"))`. Needs no network.

    Args:
        name: `"deletion_auc"`, `"insertion_auc"` or `"localisation"`.

    Raises:
        ValueError: another name.
    """
    if name not in get_args(MetricName):
        raise ValueError(f"name must be one of {', '.join(map(repr, get_args(MetricName)))}, got {name!r}")
    return str(Path(__file__).parent / name)


def mean_area(curves: Sequence[Sequence[float]], fractions: Sequence[float]) -> float:
    """Mean over the images of the area under each image's curve, see `functional.area_under_curve`.

    Args:
        curves: n curves of S+1 values each, with n and S at least 1.
        fractions: S+1 rising fractions in [0, 1], the same for all curves.

    Returns:
        The mean area in float64, in the unit of the values; not divided by the span of the fractions.

    Raises:
        ValueError: fractions that do not rise within [0, 1], or a curve with another number of values.
    """
    points = torch.as_tensor(fractions, dtype=torch.float64)
    is_rising = points.ndim == 1 and len(points) >= 2 and bool((points.diff() > 0).all())
    if not (is_rising and points[0] >= 0 and points[-1] <= 1):
        raise ValueError(f"fractions must be at least 2 rising numbers within [0, 1], got {points.tolist()}")
    lengths = {len(curve) for curve in curves}
    if lengths != {len(points)}:
        raise ValueError(f"every curve must have {len(points)} values, one per fraction, got {sorted(lengths)}")
    return float(area_under_curve(points, torch.as_tensor(curves, dtype=torch.float64)).mean())


def mean_localisation(
    maps: Sequence[Sequence[Sequence[float]]], evidence: Sequence[Sequence[Sequence[bool]]], top: float = 0.1
) -> dict[str, float]:
    """Mean over the images of each score of `functional.localisation`, in [0, 1].

    Args:
        maps: n maps of H rows of W values, n at least 1; higher is more important.
        evidence: n masks of the same shape.
        top: fraction of the positions whose share outside the evidence is measured.

    Returns:
        "relevance_mass", "rank_accuracy", "pointing_game", "roc_auc" and "outside".

    Raises:
        ValueError: shapes that differ, a mask that is empty or covers its image, or `top` outside its range.
    """
    found: dict[str, list[float]] = {}
    # One by one: images may differ in size.
    for row, (values, mask) in enumerate(zip(maps, evidence, strict=True)):
        one, marked = torch.as_tensor(values, dtype=torch.float64)[None], torch.as_tensor(mask, dtype=torch.bool)[None]
        scores = {name: measure(one, marked) for name, measure in MEASURES.items()}
        scores["outside"] = top_outside(one, marked, top)
        if not 0 < float(evidence_share(marked)) < 1:
            raise ValueError(f"references must mark some of each image and not all, which mask {row} does not")
        for name, score in scores.items():
            found.setdefault(name, []).append(float(score))
    return {name: fmean(values) for name, values in found.items()}
