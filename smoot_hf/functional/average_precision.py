"""Average precision: how far a classifier ranks the images that have a label above those that have it not."""

import torch
from torch import Tensor


def mean_average_precision(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean average precision: the mean of `average_precision` over the labels that occur (macro mean).

    Args:
        outputs: (..., n, classes), of which only the order within a label counts.
        labels: (n, classes), above 0 for a label that the image has.

    Returns:
        float64 (...) in [0, 1]; NaN where no label occurs.
    """
    return average_precision(outputs, labels).nanmean(dim=-1)


def average_precision(outputs: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each label: the mean, over the images that have it, of the precision at their output.

    The precision at an output is the share of images that have the label among those whose output is at least as high.
    It is the area under the step curve of precision over recall, without interpolation, as in scikit-learn; images of
    equal output share one threshold. A NaN, which no order holds, counts as the lowest output.

    Args:
        outputs: (..., n, classes).
        labels: (n, classes), above 0 for a label that the image has.

    Returns:
        float64 (..., classes) in [0, 1]; NaN for a label that no image has.
    """
    rising = outputs.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).transpose(-1, -2).contiguous()
    has_label = (labels > 0).T.expand(rising.shape)
    rising, order = rising.sort(dim=-1)
    has_label = has_label.gather(-1, order)
    below = torch.searchsorted(rising, rising, right=False)
    # Of how many images the output is at least as high, and how many of those have the label.
    at_least = rising.shape[-1] - below
    hits = has_label.flip(-1).cumsum(dim=-1).flip(-1).gather(-1, below)
    return (hits / at_least.double() * has_label).sum(dim=-1) / has_label.sum(dim=-1)
