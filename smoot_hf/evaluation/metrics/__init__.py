"""The metrics for `evaluate`: where their files are, and the mean area that each of them reports.

`deletion_auc` and `insertion_auc` are folders that `evaluate.load` takes by path, not modules to import. Until version
0.1.0 they were in `smoot_hf/metrics`; `metric_path` gives the place of today.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from ...functional import area_under_curve

MetricName = Literal["deletion_auc", "insertion_auc"]


def metric_path(name: MetricName) -> str:
    """The folder of a metric, for `evaluate.load(metric_path("deletion_auc"))`. Needs no network.

    Args:
        name: `"deletion_auc"` or `"insertion_auc"`.

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
