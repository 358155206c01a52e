"""One step of Algorithm 2 on a batch: saliency, mask, fill, masked forward pass. Needs no Trainer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional as SF
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
) -> MaskedStep:
    """The clean and the masked view of a batch, and what the objective and the budget need of them.

    The loss of Equation 5 is the mean of `ce + kl_weight * kl`; `delta` moves K (`MaskBudget.update`). Nothing waits
    for the device. With K = 0 and `shared_dropout` the two views are one: `kl` and `delta` are exactly 0.

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
        saliency_model: the module whose modes `saliency_pass="eval"` changes, where `model` wraps it.

    Raises:
        ValueError: the model's output has no `logits` (B, classes), or they do not carry a gradient.
    """

    def forward(network: nn.Module, view: Tensor) -> Any:
        return network(pixel_values=view if resize is None else resize(view), **(other_inputs or {}))

    config = getattr(model if saliency_model is None else saliency_model, "config", None)
    shape = len(images), getattr(config, "num_labels", None)

    leaf = images.detach().requires_grad_()
    with _random_state_rewound(images.device, enabled=args.shared_dropout):
        outputs = forward(model, leaf)
    logits = logits_of(outputs, *shape)
    if not logits.requires_grad:
        raise ValueError(
            "the model's logits carry no gradient, which saliency is: its forward detaches them or runs under "
            "torch.no_grad()"
        )

    saliency_logits = logits
    if args.saliency_pass == "eval":
        network = model if saliency_model is None else saliency_model
        with _eval_mode(network):
            saliency_logits = logits_of(forward(network, leaf), *shape)
    target = labels if args.saliency_target == "label" else saliency_logits.argmax(dim=1)
    score = SF.ranking_score(saliency_logits, target, args.saliency_score)
    saliency = SF.input_saliency(score, leaf, args.signed_saliency)

    images = leaf.detach()
    is_masked = SF.least_salient_mask(saliency, k)
    if args.mask_fill == "mean":
        fill = SF.mean_fill(images)
    else:
        noise = SF.counter_uniform(args.seed, epoch, sample_idx, tuple(images.shape[1:]))
        fill = SF.uniform_fill(images, is_masked, noise)
    masked_logits = logits_of(forward(model, torch.where(is_masked, fill, images)), *shape)

    reference = logits if args.kl_gradient == "both" else logits.detach()
    return MaskedStep(
        outputs=outputs,
        ce=SF.classification_loss(logits, labels, args.label_smoothing_factor),
        kl=SF.kl_divergence(reference, masked_logits),
        delta=SF.probability_shift(logits, masked_logits, args.alpha, args.top_n, args.delta_mode, labels),
        is_masked=is_masked,
    )


def logits_of(outputs: Any, batch_size: int, num_labels: int | None = None) -> Tensor:
    """The `logits` of a model's output.

    Args:
        outputs: what the model returned.
        batch_size: B, images that it was given.
        num_labels: number of its classes, `None` where nothing says.

    Raises:
        ValueError: it has none, or they are not floating point (B, classes).
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(
            f"the model's output ({type(outputs).__name__}) has no 'logits': return a ModelOutput or a dict with "
            "logits of shape (B, classes)"
        )
    classes = logits.shape[1] if logits.ndim == 2 else None
    if (
        classes is None
        or len(logits) != batch_size
        or num_labels not in (None, classes)
        or not torch.is_floating_point(logits)
    ):
        expected = f"({batch_size}, {'classes' if num_labels is None else num_labels})"
        raise ValueError(
            f"the model's logits must be floating point (B, classes), here {expected}, got {logits.dtype} "
            f"{tuple(logits.shape)}: return one row per image, with config.num_labels columns"
        )
    return logits


@contextmanager
def _random_state_rewound(device: torch.device, enabled: bool) -> Iterator[None]:
    """Put the random state back at the end, so that the next forward pass draws the same dropout as this one."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, enabled=enabled, device_type="cuda" if device.type == "cpu" else device.type):
        yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the whole model in eval mode, and each module back to the mode it was found in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
