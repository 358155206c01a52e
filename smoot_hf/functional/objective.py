"""The objective and the change of the ranked outputs under masking (Equations 1 to 3, 5 and 6)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ObjectiveParts(NamedTuple):
    """The terms of Equation 5, each (B,), per sample."""

    ce: Tensor
    kl: Tensor
    total: Tensor


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample: (B, classes), (B,) int64 -> (B,), in float32 or wider."""
    return F.cross_entropy(_at_least_float32(logits), labels, reduction="none", label_smoothing=label_smoothing)


def kl_divergence(logits: Tensor, masked_logits: Tensor) -> Tensor:
    """KL(f(X) || f(X~)) of the softmax outputs, summed over the classes (Equation 6, as a divergence).

    Args:
        logits: (B, classes), of the clean images: the reference distribution; -inf for a class that is ruled out.
        masked_logits: (B, classes), of the masked images.

    Returns:
        (B,) non-negative up to rounding, exactly zero when both are equal; in float32 or wider.
    """
    log_p = _at_least_float32(logits).log_softmax(dim=1)
    log_q = _at_least_float32(masked_logits).log_softmax(dim=1)
    # A class that the model rules out adds 0 (0 log 0), not the NaN of -inf minus -inf.
    is_ruled_out = log_p == -math.inf
    log_ratio = log_p.masked_fill(is_ruled_out, 0.0) - log_q.masked_fill(is_ruled_out, 0.0)
    return (log_p.exp() * log_ratio).sum(dim=1)


def masked_objective(
    logits: Tensor, masked_logits: Tensor, labels: Tensor, kl_weight: float, label_smoothing: float = 0.0
) -> ObjectiveParts:
    """Cross-entropy on the clean images plus weighted KL divergence to the masked ones (Equations 5 and 6).

    The loss of the paper is the batch mean of `total`.

    Args:
        logits: (B, classes) of the clean images.
        masked_logits: (B, classes) of the masked images.
        labels: (B,) int64.
        kl_weight: lambda, at least 0.
        label_smoothing: in [0, 1), of the cross-entropy alone.

    Returns:
        `ce`, `kl` and `total` = ce + kl_weight * kl, each (B,), in float32 or wider.
    """
    ce = classification_loss(logits, labels, label_smoothing)
    kl = kl_divergence(logits, masked_logits)
    return ObjectiveParts(ce=ce, kl=kl, total=ce + kl_weight * kl)


def _label_first_order(p: Tensor, labels: Tensor) -> Tensor:
    """Class indices (B, classes): the label, then the others by falling probability."""
    return p.scatter(1, labels[:, None], 2.0).argsort(dim=1, descending=True, stable=True)


def probability_shift(
    logits: Tensor,
    masked_logits: Tensor,
    alpha: float,
    top_n: int,
    mode: str = "rank",
    labels: Tensor | None = None,
) -> Tensor:
    """Weighted change of the ranked softmax outputs under masking: delta of Equation 3.

    delta_1 = p~(1) - p(1) (Equation 1); delta_2 = mean over i = 2..n of p~(i) - p(i) (Equation 2);
    delta = alpha * delta_1 + (1 - alpha) * delta_2. A positive delta means that masking made the prediction more
    certain.

    Args:
        logits: (B, classes), at least two classes.
        masked_logits: (B, classes).
        alpha: weight of the highest output, in [0, 1].
        top_n: n, at least 1, cut to the number of classes. With n = 1 the result is delta_1 alone.
        mode: how "the i-th highest output" is read. `"rank"`: each distribution is sorted by itself, as the equations
            say; this rewards a confident change to a wrong class. `"class"`: both are sorted in the order of the clean
            outputs. `"label"`: the label comes first, the others in the order of the clean outputs.
        labels: (B,) int64, needed by `mode="label"` only.

    Returns:
        (B,) in [-1, 1], detached, in float32 or wider.

    Raises:
        ValueError: fewer than two classes, an unknown mode, or `mode="label"` without labels.
    """
    if logits.shape[1] < 2:
        raise ValueError(f"probability_shift needs at least 2 classes, got logits of shape {tuple(logits.shape)}")
    p = _at_least_float32(logits.detach()).softmax(dim=1)
    q = _at_least_float32(masked_logits.detach()).softmax(dim=1)
    n = min(top_n, p.shape[1])
    if mode == "rank":
        change = q.topk(n, dim=1).values - p.topk(n, dim=1).values
    elif mode in ("class", "label"):
        if mode == "label" and labels is None:
            raise ValueError("mode='label' needs labels, got None")
        order = p.argsort(dim=1, descending=True, stable=True) if mode == "class" else _label_first_order(p, labels)
        change = (q - p).gather(1, order[:, :n])
    else:
        raise ValueError(f"mode must be 'rank', 'class' or 'label', got {mode!r}")
    if n == 1:
        return change[:, 0]
    return alpha * change[:, 0] + (1 - alpha) * change[:, 1:].mean(dim=1)
