"""Localisation: where an attribution lies, judged against evidence that is known (masks, boxes, planted objects).

Nothing is removed from the image, so nothing here depends on a fill or on how the model bears missing pixels.

Ties are not broken. Wherever positions of equal value compete for a place (at the edge of the top k, for the maximum),
each takes its expected share, which is the mean over all orders of the tied positions. A map of one value everywhere
therefore scores its chance level exactly.

All functions take `attribution` (B, H, W) of any real type, higher = more important, and `evidence` bool (B, H, W),
`True` where the evidence lies; they give float64 (B,). The result is NaN for a map that holds a NaN.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relevance_mass(attribution: Tensor, evidence: Tensor) -> Tensor:
    """Share of the positive attribution that lies on the evidence (relevance mass accuracy, arXiv 2003.07258).

    Negative values count as no relevance: they rank last everywhere else too, and a signed sum could leave [0, 1]. A
    map without any positive value is taken as spread evenly. Chance level, the mean over all permutations of the map's
    positions: `evidence_share`.

    Args:
        attribution: (B, H, W) of any real type.
        evidence: bool (B, H, W).

    Returns:
        float64 (B,) in [0, 1]; NaN also where the positive values sum to infinity.

    Raises:
        ValueError: shapes that differ, or evidence that is not bool.
    """

    def measure(values: Tensor, is_evidence: Tensor) -> Tensor:
        mass = values.double().clamp(min=0)
        total = mass.sum(dim=1)
        return torch.where(total == 0, _share(is_evidence), (mass * is_evidence).sum(dim=1) / total)

    return _measured(attribution, evidence, measure)


def rank_accuracy(attribution: Tensor, evidence: Tensor) -> Tensor:
    """Share of the |E| highest positions that lie on the evidence, |E| its size (relevance rank accuracy, 2003.07258).

    Chance level: `evidence_share`.

    Args:
        attribution: as in `relevance_mass`.
        evidence: as there.

    Returns:
        float64 (B,) in [0, 1]; NaN where the evidence is empty.

    Raises:
        ValueError: as there.
    """

    def measure(values: Tensor, is_evidence: Tensor) -> Tensor:
        size = is_evidence.sum(dim=1)
        return _expected_hits(values, is_evidence, size) / size

    return _measured(attribution, evidence, measure)


def top_outside(attribution: Tensor, evidence: Tensor, top: float) -> Tensor:
    """Share of the highest positions that lie outside the evidence; lower is better.

    Chance level: 1 - `evidence_share`. Where the evidence is smaller than the top, the least possible value is above 0.

    Args:
        attribution: as in `relevance_mass`.
        evidence: as there.
        top: fraction of the positions that counts as top, in (0, 1]: floor(top * H * W) of them, at least one.

    Returns:
        float64 (B,) in [0, 1].

    Raises:
        ValueError: as there, or `top` outside its range.
    """
    if not 0 < top <= 1:
        raise ValueError(f"top must be a fraction in (0, 1], got {top}")

    def measure(values: Tensor, is_evidence: Tensor) -> Tensor:
        # A product of floats can fall short of the integer it stands for: 0.29 * 100 = 28.999999999999996.
        count = max(1, math.floor(top * values.shape[1] + 1e-6))
        return 1 - _expected_hits(values, is_evidence, torch.full_like(values[:, 0], count, dtype=torch.int64)) / count

    return _measured(attribution, evidence, measure)


def pointing_game(attribution: Tensor, evidence: Tensor) -> Tensor:
    """Whether the highest position lies on the evidence (pointing game, arXiv 1608.00507); no margin around it.

    Of several highest positions, the share that lies on it. Chance level: `evidence_share`.

    Args:
        attribution: as in `relevance_mass`.
        evidence: as there.

    Returns:
        float64 (B,) in [0, 1].

    Raises:
        ValueError: as there.
    """

    def measure(values: Tensor, is_evidence: Tensor) -> Tensor:
        return _expected_hits(values, is_evidence, torch.ones_like(values[:, 0], dtype=torch.int64))

    return _measured(attribution, evidence, measure)


def roc_auc(attribution: Tensor, evidence: Tensor) -> Tensor:
    """Probability that a position on the evidence is above one outside, a tie counting one half (area under the ROC).

    Chance level: 1/2.

    Args:
        attribution: as in `relevance_mass`.
        evidence: as there.

    Returns:
        float64 (B,) in [0, 1]; NaN where the evidence is empty or covers the whole image.

    Raises:
        ValueError: as there.
    """

    def measure(values: Tensor, is_evidence: Tensor) -> Tensor:
        rising = values.sort(dim=1).values
        below, up_to = (torch.searchsorted(rising, values, right=right) for right in (False, True))
        on = is_evidence.sum(dim=1)
        # Mann-Whitney: twice the mid-ranks are integers, so that nothing is rounded before the division.
        twice_ranks = ((below + up_to + 1) * is_evidence).sum(dim=1)
        return (twice_ranks - on * (on + 1)).double() / (2 * on * (values.shape[1] - on))

    return _measured(attribution, evidence, measure)


def boxes_to_mask(boxes: Tensor | Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """Evidence from the boxes of a detection set: every pixel that one of them touches.

    A box is [x0, y0, x1, y1] in pixels, its edges counted from the upper left corner of the image, so that the first
    pixel reaches from 0 to 1 and x1 - x0 is the width. This is torchvision's "xyxy". COCO states [x, y, width, height]
    by the same edges: x1 = x + width, y1 = y + height. Pascal VOC states the first and the last pixel, counted from 1:
    x0 = xmin - 1, y0 = ymin - 1, x1 = xmax, y1 = ymax. What sticks out of the image is cut off.

    Args:
        boxes: (N, 4) numbers; none at all give an empty mask.
        size: (H, W) of the image that the boxes were drawn on. A resized image needs boxes that are scaled with it.

    Returns:
        bool (H, W).

    Raises:
        ValueError: boxes of another shape, that are not finite, have no width or height, or lie outside the image.
    """
    height, width = size
    edges = torch.as_tensor(boxes, dtype=torch.float64).cpu()
    if edges.numel() == 0:
        return torch.zeros(height, width, dtype=torch.bool)
    if edges.ndim != 2 or edges.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4), [x0, y0, x1, y1] each, got shape {tuple(edges.shape)}")
    x0, y0, x1, y1 = edges.T
    is_inside = (x1 > 0) & (y1 > 0) & (x0 < width) & (y0 < height)
    is_box = edges.isfinite().all(dim=1) & (x0 < x1) & (y0 < y1) & is_inside
    if not bool(is_box.all()):
        row = int((~is_box).nonzero()[0])
        raise ValueError(
            f"boxes must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, on an image of {width} pixels in width and "
            f"{height} in height, got {edges[row].tolist()} in row {row}"
        )
    x, y = torch.arange(width)[None], torch.arange(height)[None]
    in_x = (x + 1 > x0[:, None]) & (x < x1[:, None])
    in_y = (y + 1 > y0[:, None]) & (y < y1[:, None])
    return (in_y[:, :, None] & in_x[:, None, :]).any(dim=0)


def evidence_share(evidence: Tensor) -> Tensor:
    """Share of the positions on the evidence: bool (B, H, W) -> float64 (B,) in [0, 1]."""
    return _share(evidence.flatten(1))


def _share(is_evidence: Tensor) -> Tensor:
    return is_evidence.double().mean(dim=1)


def _measured(attribution: Tensor, evidence: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`measure` of both as (B, H * W), with NaN in the rows whose map holds a NaN."""
    if attribution.ndim != 3 or attribution.shape != evidence.shape or 0 in attribution.shape:
        raise ValueError(
            "attribution and evidence must both be (B, H, W), one value per position of every image, "
            f"got {tuple(attribution.shape)} and {tuple(evidence.shape)}"
        )
    if evidence.dtype != torch.bool:
        raise ValueError(f"evidence must be bool, True where the evidence lies, got {evidence.dtype}")
    values = attribution.detach().flatten(1)
    if not values.is_floating_point() or values.itemsize < 2:
        # Not every such type can be sorted or searched.
        values = values.double()
    return measure(values, evidence.flatten(1)).masked_fill(values.isnan().any(dim=1), math.nan)


def _expected_hits(values: Tensor, is_evidence: Tensor, counts: Tensor) -> Tensor:
    """Expected number of evidence positions among the `counts` highest, over all orders of tied positions.

    Args:
        values: (B, P).
        is_evidence: bool (B, P).
        counts: int64 (B,) in [0, P].

    Returns:
        float64 (B,).
    """
    falling = values.sort(dim=1, descending=True).values
    edge = falling.gather(1, (counts - 1).clamp(min=0)[:, None])
    is_above, is_tied = values > edge, values == edge
    places = counts - is_above.sum(dim=1)
    hits, tied_hits = ((chosen & is_evidence).sum(dim=1) for chosen in (is_above, is_tied))
    return hits + places * tied_hits.double() / is_tied.sum(dim=1)
