"""The method where an image has several labels or none: a sigmoid output for each, independent of the others.

The outputs are p_j = sigmoid(z_j). What Equations 1 to 6 say of one softmax distribution is said here of the product of
these Bernoulli distributions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import at_least_float32, ranked_change, require_same_shape
from .saliency import check_score, linear_score


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each sample, summed over the labels: the first term of Equation 5.

    Args:
        logits: (B, classes).
        labels: (B, classes) in [0, 1], 1 for a label that the image has.

    Returns:
        (B,) in float32 or wider. Divided by the number of classes it is the loss of transformers for
        `problem_type="multi_label_classification"`.

    Raises:
        ValueError: labels of another shape than the logits.
    """
    wide = at_least_float32(logits)
    require_same_shape(labels, wide)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="none").sum(dim=1)


def bernoulli_divergence(logits: Tensor, masked_logits: Tensor) -> Tensor:
    """KL(f(X) || f(X~)) of independent labels: the sum of the Bernoulli divergences (Equation 6).

    Args:
        logits: (B, classes), of the clean images: the reference; an infinite one is certain.
        masked_logits: (B, classes), of the masked images.

    Returns:
        (B,) non-negative up to rounding, exactly zero when both are equal; in float32 or wider.
    """
    z, masked = at_least_float32(logits), at_least_float32(masked_logits)
    return (_expected_log_ratio(z, masked) + _expected_log_ratio(-z, -masked)).sum(dim=1)


def _expected_log_ratio(z: Tensor, masked: Tensor) -> Tensor:
    """p log(p / q) for p and q the sigmoids: elementwise, and 0 where p is."""
    is_impossible = z == -math.inf
    log_ratio = F.logsigmoid(z.masked_fill(is_impossible, 0.0)) - F.logsigmoid(masked.masked_fill(is_impossible, 0.0))
    return z.sigmoid() * log_ratio


def multi_label_shift(
    logits: Tensor,
    masked_logits: Tensor,
    alpha: float,
    top_n: int,
    mode: str = "rank",
    labels: Tensor | None = None,
) -> Tensor:
    """Weighted change of the ranked sigmoid outputs under masking: delta of Equation 3 for several labels.

    With p(i) the i-th highest sigmoid output, Equations 1 to 3 are taken as they are printed. A positive delta means
    that the outputs that count rose under the mask: what was masked was not needed to see them. Unlike softmax outputs
    these are independent: they may all rise, and they may all fall.

    Args:
        logits: (B, classes).
        masked_logits: (B, classes).
        alpha: weight of the highest output, in [0, 1].
        top_n: n, at least 1, cut to the number of classes. With n = 1 the result is delta_1 alone.
        mode: as in `probability_shift`; with `"label"` the labels that the image has come first, by falling output, and
            those that it has in part in the order of their weights.
        labels: (B, classes) in [0, 1], needed by `mode="label"` only.

    Returns:
        (B,) in [-1, 1], detached, in float32 or wider.

    Raises:
        ValueError: an unknown mode, or `mode="label"` without labels.
    """
    p, q = (at_least_float32(z.detach()).sigmoid() for z in (logits, masked_logits))
    return ranked_change(p, q, alpha, top_n, mode, labels)


def multi_label_target(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """The labels whose scores, summed, give the saliency: those of the image, or the predicted ones.

    Where there is none, it is the highest output.

    Args:
        logits: (B, classes).
        labels: (B, classes) in [0, 1]; `None`: the predicted ones, whose output is above one half.

    Returns:
        (B, classes), weights of the scores, detached, in float32 or wider.
    """
    z = at_least_float32(logits.detach())
    weights = (z > 0 if labels is None else labels).to(z.dtype)
    highest = torch.zeros_like(z).scatter(1, z.argmax(dim=1, keepdim=True), 1.0)
    return torch.where((weights > 0).any(dim=1, keepdim=True), weights, highest)


def multi_label_score(logits: Tensor, target: Tensor, score: str = "logit") -> Tensor:
    """The scalar whose gradient is the saliency: the sum of the target labels' scores.

    Args:
        logits: (B, classes).
        target: (B, classes), weights of the scores, as from `multi_label_target`.
        score: `"logit"`, or `"log_prob"` for the logarithm of the sigmoid output.

    Returns:
        (B,), the sum of w_j z_j, or of w_j log p_j.

    Raises:
        ValueError: `score` is neither of the two.
    """
    check_score(score)
    scores = logits if score == "logit" else F.logsigmoid(logits)
    return (scores * target.to(scores.dtype)).sum(dim=1)


def multi_label_ranking_score(logits: Tensor, target: Tensor, score: str = "logit") -> Tensor:
    """A score that ranks the pixels as the sum of the target labels' scores does, and whose gradient does not vanish.

    The derivative of w_j log p_j is w_j (1 - p_j), which vanishes as the model fits; it is divided by the largest
    1 - p_j among the targets. As in `ranking_score`, a positive factor leaves the ranking as it is.

    Args:
        logits: (B, classes).
        target: (B, classes), from `multi_label_target`.
        score: `"logit"`, or `"log_prob"` for the logarithm of the sigmoid output.

    Returns:
        (B,) in float32 or wider; its value means nothing, its gradient is that of the score up to the factor.

    Raises:
        ValueError: `score` is neither of the two.
    """
    check_score(score)
    if score == "log_prob":
        log_rest = F.logsigmoid(-at_least_float32(logits.detach())).masked_fill(target == 0, -math.inf)
        target = target * (log_rest - log_rest.amax(dim=1, keepdim=True)).exp()
    return linear_score(logits, target)
