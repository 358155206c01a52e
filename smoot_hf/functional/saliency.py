"""Saliency: the gradient of a class score with respect to the pixels (Algorithm 2, line 1)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


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
    with _without_autocast(images.device.type):
        (gradient,) = torch.autograd.grad(score.sum(), images, retain_graph=True)
    # The mean of half-precision gradients could overflow or lose the order of small ones.
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return (gradient if signed else gradient.abs()).mean(dim=1)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A backward pass belongs outside autocast: its dtypes are those that the forward pass chose."""
    if not torch.amp.is_autocast_available(device_type):
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
    if score == "logit":
        outputs = logits
    elif score == "log_prob":
        outputs = logits.log_softmax(dim=1)
    else:
        raise ValueError(f"score must be 'logit' or 'log_prob', got {score!r}")
    return outputs.gather(1, target[:, None]).squeeze(1)


def ranking_score(logits: Tensor, target: Tensor, score: str = "logit") -> Tensor:
    """A score that ranks the pixels as `class_score` does, and whose gradient does not vanish as the model fits.

    The derivative of log p_y with respect to the logits falls with 1 - p_y: in half precision the gradient of a
    well-trained model underflows on its way to the pixels, and the ranking becomes the tie-break. Here every sample's
    derivative is scaled to 1 at its largest entry; a positive factor per sample leaves the ranking as it is.

    Args:
        logits: (B, classes).
        target: (B,) int64 class of each sample.
        score: as in `class_score`.

    Returns:
        (B,) in float32 or wider; its value means nothing, its gradient is that of `class_score` up to the factor.

    Raises:
        ValueError: `score` is neither `"logit"` nor `"log_prob"`.
    """
    leaf = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
    with torch.enable_grad():
        (derivative,) = torch.autograd.grad(class_score(leaf, target, score).sum(), leaf)
    largest = derivative.abs().amax(dim=1, keepdim=True)
    return (logits * (derivative / largest.clamp_min(torch.finfo(largest.dtype).tiny))).sum(dim=1)
