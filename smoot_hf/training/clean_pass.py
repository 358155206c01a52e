"""The clean pass: one forward pass for the loss, and the gradient with respect to the pixels that ranks them."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import functional as SF
from ..functional.saliency import without_autocast
from ..models.logits import config_value, no_logits, run_classifier
from .problem import SINGLE_LABEL


class CleanPass(NamedTuple):
    """The model's own output, its logits (B, classes), and the gradient that ranks the pixels, like its input."""

    outputs: Any
    logits: Tensor
    gradient: Tensor


def shared_pass(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor | None,
    score: str,
    other_inputs: Mapping[str, Any],
    ranking_score: Callable[[Tensor, Tensor | None, str], Tensor] = SINGLE_LABEL.ranking_score,
) -> CleanPass:
    """One forward pass for the loss and for the gradient of the score; the graph is kept.

    A function of its arguments alone, so that `torch.compile` takes it as a whole: compiled together, the pass to the
    pixels computes no weight gradients, which the backward pass of a model compiled by itself always does.

    Args:
        model: its output has `logits`.
        pixel_values: float (B, C, H, W), requiring grad.
        labels: those whose score it is, as the problem has them; `None`: the predicted ones.
        score: `"logit"` or `"log_prob"`, as in `SF.ranking_score`.
        other_inputs: further keyword arguments of the model.
        ranking_score: of the model's `Problem`.
    """
    outputs, logits = forward(model, pixel_values, other_inputs)
    ranked = ranking_score(logits, labels, score)
    with without_autocast(pixel_values.device.type):
        (gradient,) = torch.autograd.grad(ranked.sum(), pixel_values, retain_graph=True)
    return CleanPass(outputs, logits, gradient)


def compiled_as_the_model(accelerator: Accelerator) -> Callable[..., CleanPass]:
    """`shared_pass`, compiled by the same settings as the model where the model is compiled."""
    plugin = accelerator.state.dynamo_plugin
    return shared_pass if plugin.backend == DynamoBackend.NO else compiled_pass(**plugin.to_kwargs())


def runs_cuda_graphs(accelerator: Accelerator) -> bool:
    """Whether the model is compiled into CUDA graphs, whose next run overwrites what the last one returned."""
    plugin = accelerator.state.dynamo_plugin
    return plugin.backend != DynamoBackend.NO and plugin.mode in ("reduce-overhead", "max-autotune")


def compiled_pass(**kwargs: Any) -> Callable[..., CleanPass]:
    """`shared_pass` compiled as one graph, its gradient included; `kwargs` as of `torch.compile`."""
    compiled = torch.compile(shared_pass, **kwargs)

    @wraps(shared_pass)
    def clean_pass(*args: Any) -> CleanPass:
        # By default the compiler breaks the graph at torch.autograd.grad, which then runs the whole backward graph.
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(*args)

    return clean_pass


def loss_pass(
    model: nn.Module,
    pixel_values: Tensor,
    labels: Tensor,
    other_inputs: Mapping[str, Any],
    weights: Sequence[Tensor],
) -> tuple[CleanPass, Tensor]:
    """One backward pass of the cross-entropy for its weight gradients and for the saliency of the log-probability.

    The gradient of the cross-entropy is minus that of log p_y. The graph of the clean view is freed before the masked
    one is built.

    Args:
        model: as in `shared_pass`, as are the next two and `other_inputs`.
        pixel_values: as there.
        labels: int64 (B,), or soft ones (B, classes).
        other_inputs: as there.
        weights: the trained parameters.

    Returns:
        The pass, its logits detached; and the cross-entropy (B,), whose sum (or mean) carries the gradients just
        computed on. Any other use of it in a loss gives NaN gradients: they are known for the sum alone.
    """
    outputs, logits = forward(model, pixel_values, other_inputs)
    derivative = SF.log_prob_derivative(logits, labels)
    with without_autocast(pixel_values.device.type):
        gradient, *gradients = torch.autograd.grad(
            logits, [pixel_values, *weights], -derivative.to(logits.dtype), allow_unused=True
        )
    if gradient is None:
        raise ValueError("the model's logits do not depend on its pixel_values, so there is no saliency")
    logits = logits.detach()
    ce = _KnownGradients.apply(SF.classification_loss(logits, labels), gradients, *weights)
    return CleanPass(outputs, logits, -gradient), ce


def without_image_gradient(logits: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The same logits, whose backward pass ends at the weights.

    A graph that has given the saliency gives the gradient of the images in every pass through it; only one that is
    asked for the weights by name leaves it out.

    Args:
        logits: (B, classes), with the graph of the model.
        weights: the trained parameters.
    """
    return _WeightsAlone.apply([logits], *weights)


def forward(model: nn.Module, pixel_values: Tensor, other_inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """The model's own output and its logits (B, classes).

    Raises:
        ValueError: it has none, is a bare tensor, or in training they carry no gradient.
    """
    outputs, logits = run_classifier(model, pixel_values, other_inputs, num_labels=config_value(model, "num_labels"))
    if isinstance(outputs, Tensor):
        # The Trainer takes what is not a dict for a tuple that begins with the loss, and would lose the first image.
        raise ValueError(no_logits(outputs))
    if torch.is_grad_enabled() and not logits.requires_grad:
        raise ValueError(
            "the model's logits carry no gradient, which saliency is: its forward detaches them or runs under "
            "torch.no_grad()"
        )
    return outputs, logits


class _WeightsAlone(torch.autograd.Function):
    """Logits whose graph autograd does not see: `backward` asks it for the gradients of the weights."""

    @staticmethod
    def forward(ctx: Any, logits: list[Tensor], *weights: Tensor) -> Tensor:
        # In a list, so that no edge leads to their graph.
        (ctx.logits,), ctx.weights = logits, weights
        return ctx.logits.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch.autograd.grad(ctx.logits, ctx.weights, grad, allow_unused=True)


class _KnownGradients(torch.autograd.Function):
    """Per-sample values whose sum has gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        # Weighted one by one, the samples would need gradients of their own: NaN rather than silently wrong, without
        # waiting for the device to say so.
        factor = torch.where((grad == grad[0]).all(), grad[0], math.nan)
        return None, None, *(None if known is None else known * factor for known in ctx.gradients)
