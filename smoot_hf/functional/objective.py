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


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision as float32, wider types as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def require_same_shape(labels: Tensor, logits: Tensor) -> None:
    """Refuse weights of classes that are not one for each logit: some shapes would be broadcast.

    Raises:
        ValueError: naming both shapes.
    """
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels of {tuple(labels.shape)} do not fit logits of {tuple(logits.shape)}: give a weight for each class"
        )


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample; a one-hot soft label gives that of its class, bit for bit.

    Args:
        logits: (B, classes); -inf for a class that is ruled out.
        labels: int64 (B,), or soft labels (B, classes): a distribution over the classes.
        label_smoothing: in [0, 1]: the share of the target that is spread evenly over the classes.

    Returns:
        (B,) in float32 or wider.

    Raises:
        ValueError: soft labels of another shape than the logits.
    """
    wide = at_least_float32(logits)
    if labels.ndim == 1:
        return F.cross_entropy(wide, labels, reduction="none", label_smoothing=label_smoothing)
    require_same_shape(labels, wide)
    weights, log_p = labels.to(wide.dtype), wide.log_softmax(dim=1)
    # A class of weight 0 adds 0, also where the model rules it out, and not the NaN of 0 times -inf.
    ce = -(weights * log_p.masked_fill(weights == 0, 0.0)).sum(dim=1)
    return ce if label_smoothing == 0 else (1 - label_smoothing) * ce - label_smoothing * log_p.mean(dim=1)


def kl_divergence(logits: Tensor, masked_logits: Tensor) -> Tensor:
    """KL(f(X) || f(X~)) of the softmax outputs, summed over the classes (Equation 6, as a divergence).

    Args:
        logits: (B, classes), of the clean images: the reference distribution; -inf for a class that is ruled out.
        masked_logits: (B, classes), of the masked images.

    Returns:
        (B,) non-negative up to rounding, exactly zero when both are equal; in float32 or wider.
    """
    log_p = at_least_float32(logits).log_softmax(dim=1)
    log_q = at_least_float32(masked_logits).log_softmax(dim=1)
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
        labels: int64 (B,), or soft labels (B, classes).
        kl_weight: lambda, at least 0.
        label_smoothing: in [0, 1), of the cross-entropy alone.

    Returns:
        `ce`, `kl` and `total` = ce + kl_weight * kl, each (B,), in float32 or wider.
    """
    ce = classification_loss(logits, labels, label_smoothing)
    kl = kl_divergence(logits, masked_logits)
    return ObjectiveParts(ce=ce, kl=kl, total=ce + kl_weight * kl)


def _falling_order(p: Tensor, weights: Tensor | None) -> Tensor:
    """Class indices (B, classes) by falling weight, those of equal weight by falling output."""
    order = p.argsort(dim=1, descending=True, stable=True)
    if weights is None:
        return order
    return order.gather(1, weights.gather(1, order).argsort(dim=1, descending=True, stable=True))


def ranked_change(p: Tensor, q: Tensor, alpha: float, top_n: int, mode: str, weights: Tensor | None = None) -> Tensor:
    """Weighted change of ranked outputs (Equations 1 to 3), of whatever outputs they are.

    Args:
        p: (B, classes) in [0, 1], outputs for the clean images.
        q: (B, classes), outputs for the masked images.
        alpha: as in `probability_shift`, as are the next two.
        top_n: as there.
        mode: as there.
        weights: (B, classes), needed by `mode="label"` only: the classes of larger weight come first.

    Returns:
        (B,) in [-1, 1].

    Raises:
        ValueError: an unknown mode, or `mode="label"` without labels.
    """
    n = min(top_n, p.shape[1])
    if mode == "rank":
        change = q.topk(n, dim=1).values - p.topk(n, dim=1).values
    elif mode in ("class", "label"):
        if mode == "label" and weights is None:
            raise ValueError("mode='label' needs labels, got None")
        change = (q - p).gather(1, _falling_order(p, weights if mode == "label" else None)[:, :n])
    else:
        raise ValueError(f"mode must be 'rank', 'class' or 'label', got {mode!r}")
    if n == 1:
        return change[:, 0]
    return alpha * change[:, 0] + (1 - alpha) * change[:, 1:].mean(dim=1)


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
        labels: needed by `mode="label"` only: int64 (B,); or soft labels (B, classes), of which the class of the
            largest weight counts (the first of several).

    Returns:
        (B,) in [-1, 1], detached, in float32 or wider.

    Raises:
        ValueError: fewer than two classes, an unknown mode, or `mode="label"` without labels.
    """
    if logits.shape[1] < 2:
        raise ValueError(f"probability_shift needs at least 2 classes, got logits of shape {tuple(logits.shape)}")
    p = at_least_float32(logits.detach()).softmax(dim=1)
    q = at_least_float32(masked_logits.detach()).softmax(dim=1)
    is_label = None
    if labels is not None:
        hard = labels if labels.ndim == 1 else labels.argmax(dim=1)
        is_label = torch.zeros_like(p).scatter(1, hard[:, None], 1.0)
    return ranked_change(p, q, alpha, top_n, mode, is_label)
