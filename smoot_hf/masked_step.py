"""One step of Algorithm 2 on a batch: saliency, mask, fill, masked forward pass. Needs no Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional as SF
from .clean_pass import CleanPass, forward, loss_pass, shared_pass, without_image_gradient
from .training_args import SmootTrainingArguments


class MaskedStep(NamedTuple):
    """What a step yields: the model's own output on the clean images, and per-sample parts, each (B,)."""

    outputs: Any
    ce: Tensor
    kl: Tensor
    delta: Tensor
    is_masked: Tensor


def masked_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    sample_idx: Tensor,
    k: Tensor,
    epoch: int,
    args: SmootTrainingArguments,
    resize: Callable[[Tensor], Tensor] | None = None,
    other_inputs: Mapping[str, Any] | None = None,
    saliency_model: nn.Module | None = None,
    weights: Sequence[Tensor] | None = None,
    clean_pass: Callable[..., CleanPass] = shared_pass,
) -> MaskedStep:
    """The clean and the masked view of a batch, and what the objective and the budget need of them.

    The loss of Equation 5 is the mean of `ce + kl_weight * kl`; `delta` moves K (`MaskBudget.update`). Where gradients
    are accumulated over several calls, keep their `sample_idx` and `delta`, and update K once, with all of them, when
    the optimizer has stepped; `recipes/accelerate_loop.py` shows the loop. Nothing waits for the device. With K = 0
    and `shared_dropout` the two views are one: `kl` and `delta` are exactly 0.

    Args:
        model: in train mode; its output has `logits` (B, classes).
        images: float (B, C, H, W), augmented and normalised, at the resolution at which the mask acts.
        labels: int64 (B,).
        sample_idx: int64 (B,) rows of the training set: with `epoch` and `args.seed` they determine the fill.
        k: integers (B,), masked positions of each image, from `MaskBudget.read`.
        epoch: number of the epoch.
        args: what the fields of `SmootTrainingArguments` say of saliency, mask, fill and delta.
        resize: differentiable resizing from `images` to the model's input, after the mask.
        other_inputs: further keyword arguments of the model.
        saliency_model: the module itself, where `model` wraps it (DDP, `torch.compile`): `saliency_pass="eval"`
            changes its modes, and a compiled `clean_pass` runs it.
        weights: the trained parameters, if the passes may be cut down to what they need. Where nothing wraps the model,
            the final backward pass then leaves out the gradient of the images. `kl_gradient="masked"` with
            `saliency_score="log_prob"` takes saliency and gradients from one backward pass of the cross-entropy
            (`loss_pass`): only the sum or mean of `ce` has a gradient then. Either way `outputs` cannot be used in a
            loss; where that is wanted, leave `weights` away. Without effect where a weight has a gradient hook
            (`Tensor.register_hook`), which is called once, with the whole gradient.
        clean_pass: `shared_pass`, or `compiled_pass` of it where `model` is compiled.

    Raises:
        ValueError: the model's output has no `logits` (B, classes), or they do not carry a gradient.
    """
    images, inputs = images.detach(), other_inputs or {}
    # A hook on a weight would change the clean view's gradient on its own, and then the sum of both views' once more.
    if weights is not None and any(weight._backward_hooks for weight in weights):
        weights = None
    network = model if saliency_model is None else saliency_model
    # The final backward pass ends at the model's input: nobody needs the gradient of the resizing there.
    leaf = images if resize is None else images.clone().requires_grad_()
    resized = leaf if resize is None else resize(leaf)
    pixel_values = resized.detach().requires_grad_()

    ce = None
    with _random_state_rewound(images.device, enabled=args.shared_dropout):
        if args.saliency_pass == "eval":
            outputs, logits = forward(model, pixel_values.detach(), inputs)
        elif weights is not None and _loss_gives_saliency(args):
            (outputs, logits, gradient), ce = loss_pass(model, pixel_values, labels, inputs, weights)
        else:
            ranked = model if clean_pass is shared_pass else network
            outputs, logits, gradient = clean_pass(
                ranked, pixel_values, _target(labels, args), args.saliency_score, inputs
            )
    if args.saliency_pass == "eval":
        with _eval_mode(network):
            gradient = clean_pass(network, pixel_values, _target(labels, args), args.saliency_score, inputs).gradient
    if resize is not None:
        (gradient,) = torch.autograd.grad(resized, leaf, gradient)
    # Behind DDP all gradients would come at once, at the end, and none be sent while others are computed. A compiled
    # graph computes the images' gradient whoever asks.
    if args.saliency_pass == "shared" and weights is not None and ce is None and model is network:
        logits = without_image_gradient(logits, weights)
    if ce is None:
        ce = SF.classification_loss(logits, labels, args.label_smoothing_factor)

    masked, is_masked = mask_images(images, gradient, sample_idx, k, epoch, args)
    _, masked_logits = forward(model, masked if resize is None else resize(masked), inputs)

    reference = logits if args.kl_gradient == "both" else logits.detach()
    return MaskedStep(
        outputs=outputs,
        ce=ce,
        kl=SF.kl_divergence(reference, masked_logits),
        delta=SF.probability_shift(logits, masked_logits, args.alpha, args.top_n, args.delta_mode, labels),
        is_masked=is_masked,
    )


def mask_images(
    images: Tensor, gradient: Tensor, sample_idx: Tensor, k: Tensor, epoch: int, args: SmootTrainingArguments
) -> tuple[Tensor, Tensor]:
    """The images with their `k` pixels of least gradient replaced, and which these are: (B, C, H, W), (B, 1, H, W).

    Args:
        images: as in `masked_step`, as are the last four arguments.
        gradient: of the score with respect to the images, (B, C, H, W).
    """
    is_masked = SF.least_salient_mask(SF.channel_mean(gradient, args.signed_saliency), k)
    if args.mask_fill == "mean":
        fill = SF.mean_fill(images)
    else:
        noise = SF.counter_uniform(args.seed, epoch, sample_idx, tuple(images.shape[1:]))
        fill = SF.uniform_fill(images, is_masked, noise)
    return torch.where(is_masked, fill, images), is_masked


def _target(labels: Tensor, args: SmootTrainingArguments) -> Tensor | None:
    return labels if args.saliency_target == "label" else None


def _loss_gives_saliency(args: SmootTrainingArguments) -> bool:
    """Whether the gradient of the cross-entropy is all that is asked of the clean view's graph."""
    return (
        args.kl_gradient == "masked"
        and args.saliency_score == "log_prob"
        and args.saliency_target == "label"
        and args.saliency_pass == "shared"
        and args.label_smoothing_factor == 0
    )


@contextmanager
def _random_state_rewound(device: torch.device, enabled: bool) -> Iterator[None]:
    """Put the random state back at the end, so that the next forward pass draws the same dropout as this one."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, enabled=enabled, device_type="cuda" if device.type == "cpu" else device.type):
        yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the whole model in eval mode, and each module back to the mode it was found in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Not by the flags alone: what a module keeps from its passes in eval mode (LeViT its attention biases) it drops
        # in `train`, and would go on with in later evaluations.
        model.train()
        for module, training in modes:
            module.training = training
