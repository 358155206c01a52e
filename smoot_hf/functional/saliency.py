"""Saliency: the gradient of a class score with respect to the pixels (Algorithm 2, line 1)."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A power of two, so that it rounds nothing.
_FLOAT16_SCALE = 2.0**8


def input_saliency(score: Tensor, images: Tensor, signed: bool = True) -> Tensor:
    """Gradient of the score with respect to the images, reduced over the channels.

    A sample's score depends on that sample alone, so one backward pass through the sum over the batch gives every
    sample's gradient. The graph is kept: the training loss can be taken from the same forward pass.

    Args:
        score: (B,) one scalar per image, for example the logit of its label.
        images: (B, C, H, W) the leaf, requiring grad, from which `score` was computed.
        signed: the channel mean of the gradient as it is, or (`False`) the channel mean of its magnitude, taken
            before the mean so that channels cannot cancel.

    Returns:
        (B, H, W) saliency, detached, in float32 or, for float64 images, float64.

    Raises:
        RuntimeError: `score` does not depend on `images` (raised by autograd).
    """
    with without_autocast(images.device.type):
        (gradient,) = torch.autograd.grad(score.sum(), images, retain_graph=True)
    return channel_mean(gradient, signed)


def channel_mean(gradient: Tensor, signed: bool = True) -> Tensor:
    """Mean of the values, or (`False`) of their magnitudes: (B, C, H, W) -> (B, H, W), detached, float32 or wider."""
    # The mean of half-precision gradients could overflow or lose the order of small ones.
    gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
    return (gradient if signed else gradient.abs()).mean(dim=1)


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    # torch 2.11 cannot trace the question itself.
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A backward pass belongs outside autocast: its dtypes are those that the forward pass chose."""
    if not _has_autocast(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def class_score(logits: Tensor, target: Tensor, score: str = "logit") -> Tensor:
    """The scalar whose gradient is the saliency: one output of each sample.

    Args:
        logits: (B, classes).
        target: (B,) int64 class of each sample.
        score: `"logit"`, or `"log_prob"` for the log-softmax output.

    Returns:
        (B,) the target's logit or log-probability.

    Raises:
        ValueError: `score` is neither of the two.
    """
    check_score(score)
    of_target = logits.gather(1, target[:, None])
    if score == "logit":
        return of_target.squeeze(1)
    # log p_y = -log(1 + sum of exp(z_j - z_y)). The gradient of log_softmax has 1 - p_y for the target, and that is
    # exactly 0 where p_y is rounded to 1: the saliency would be that of the other classes alone.
    others = logits.scatter(1, target[:, None], -math.inf).logsumexp(dim=1, keepdim=True)
    return -F.softplus(others - of_target).squeeze(1)


def log_prob_derivative(logits: Tensor, target: Tensor) -> Tensor:
    """Derivative of log p_y with respect to the logits, exact where p_y is rounded to 1.

    It is 1 - p_y for the target and -p_j for the others; 1 - p_y is taken as the sum of the others' p_j, since the
    difference is exactly 0 for a confident model, and the target's share of the saliency with it. For soft labels it is
    the derivative of the sum of w_j log p_j, which is w_j - p_j.

    Args:
        logits: (B, classes).
        target: int64 (B,), class y of each sample; or soft labels w (B, classes), of which a one-hot one gives what its
            class gives, bit for bit.

    Returns:
        (B, classes), detached, in float32 or wider; minus the derivative of the cross-entropy.
    """
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if target.ndim == 1:
        others = wide.softmax(dim=1).scatter(1, target[:, None], 0.0)
        return (-others).scatter(1, target[:, None], others.sum(dim=1, keepdim=True))
    weights = target.to(wide.dtype)
    return _one_hot_apart(weights, weights - wide.softmax(dim=1), lambda hard: log_prob_derivative(wide, hard))


def _one_hot_apart(weights: Tensor, of_soft: Tensor, of_hard: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, classes): `of_soft`, and where a label is one-hot what `of_hard` gives for its class."""
    largest, hard = weights.max(dim=1, keepdim=True)
    return torch.where(largest == 1, of_hard(hard[:, 0]), of_soft)


def ranking_score(logits: Tensor, target: Tensor, score: str = "logit") -> Tensor:
    """A score that ranks the pixels as `class_score` does, and whose gradient does not vanish as the model fits.

    The derivative of log p_y with respect to the logits falls with 1 - p_y: in half precision the gradient of a
    well-trained model underflows on its way to the pixels, and the ranking becomes the tie-break. Divided by 1 - p_y it
    is 1 for the target and minus the softmax among the others; a positive factor per sample leaves the ranking as it
    is. For float16 logits it is scaled to 2**8, the middle of what float16 holds above 1: the gradients of a deep
    network shrink on their way to the pixels, and below 2**-24 they vanish.

    With soft labels it is the score weighted by them: the sum of w_j z_j, or of w_j log p_j, whose derivative w_j - p_j
    is divided by its largest magnitude.

    Args:
        logits: (B, classes), at least two.
        target: int64 (B,), class of each sample; or soft labels w (B, classes), of which a one-hot one gives what its
            class gives, bit for bit.
        score: as in `class_score`.

    Returns:
        (B,) in float32 or wider; its value means nothing, its gradient is that of the score up to the factor.

    Raises:
        ValueError: `score` is neither `"logit"` nor `"log_prob"`.
    """
    check_score(score)
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if target.ndim == 1:
        return linear_score(logits, _hard_weight(wide, target, score))
    weights = target.to(wide.dtype)
    if score == "log_prob":
        derivative = weights - wide.softmax(dim=1)
        largest = derivative.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
        weights = _one_hot_apart(weights, derivative / largest, lambda hard: _hard_weight(wide, hard, score))
    return linear_score(logits, weights)


def _hard_weight(wide: Tensor, target: Tensor, score: str) -> Tensor:
    """Derivative of the score of one class with respect to the logits, divided by 1 - p_y: (B, classes)."""
    weight = torch.zeros_like(wide)
    if score == "log_prob":
        weight = -wide.scatter(1, target[:, None], -math.inf).softmax(dim=1)
    return weight.scatter(1, target[:, None], 1.0)


def linear_score(logits: Tensor, weight: Tensor) -> Tensor:
    """The score (B,) whose derivative with respect to the logits is `weight`, scaled for float16 logits.

    Args:
        logits: (B, classes).
        weight: (B, classes), without a graph.
    """
    factor = _FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0
    return (logits * (factor * weight)).sum(dim=1)


def check_score(score: str) -> None:
    """Refuse what is no score whose gradient is the saliency.

    Raises:
        ValueError: it is neither `"logit"` nor `"log_prob"`.
    """
    if score not in ("logit", "log_prob"):
        raise ValueError(f"score must be 'logit' or 'log_prob', got {score!r}")
