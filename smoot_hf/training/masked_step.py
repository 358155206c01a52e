"""One step of Algorithm 2 on a batch: saliency, mask, fill, masked forward pass. Needs no Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_outputs import ImageClassifierOutput

from .. import functional as SF
from ..models.state import is_sharded
from .clean_pass import CleanPass, forward, loss_pass, shared_pass, without_image_gradient
from .masked_share import (
    Batch,
    in_masked_share,
    inside_ddp,
    inside_engine,
    put_in_place,
    random_state,
    uses_batch_statistics,
)
from .problem import Problem, problem_of
from .settings import SmootSettings

# Keeps the random positions of a control apart from the fill, whose noise has the same seed, epoch and samples.
_POSITION_STREAM = 0x706F736974696F6E


class MaskedStep(NamedTuple):
    """Result of `masked_step`: the model's output on the clean images, and values for each sample.

    A sample outside of the masked share has the values of one whose K is 0: nothing masked, `kl` and `delta` exactly 0.

    Attributes:
        outputs: what the model returned for the clean images.
        ce: (B,), cross-entropy of the clean images; of several labels the binary one, mean over the labels.
        kl: (B,), KL divergence from the clean to the masked prediction; of several labels the mean over the labels.
        delta: (B,), change of the ranked outputs under masking (Equation 3), detached.
        is_masked: bool (B, 1, H, W), `True` where a pixel was replaced.
    """

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
    settings: SmootSettings,
    resize: Callable[[Tensor], Tensor] | None = None,
    other_inputs: Mapping[str, Any] | None = None,
    saliency_model: nn.Module | None = None,
    weights: Sequence[Tensor] | None = None,
    clean_pass: Callable[..., CleanPass] = shared_pass,
    is_chosen: Tensor | None = None,
) -> MaskedStep:
    """The clean and the masked view of a batch, and what the objective and the budget need of them.

    The loss of Equation 5 is the mean of `ce + settings.kl_factor * kl`; `delta` moves K (`MaskBudget.update`). Where
    gradients are accumulated over several calls, keep their `sample_idx` and `delta`, and update K once, with all of
    them, when the optimizer has stepped; `recipes/accelerate_loop.py` shows the loop. Nothing waits for the device,
    unless `masked_share` is below 1 and `is_chosen` is left away on a GPU. With K = 0 and `shared_dropout` the two
    views are one: `kl` and `delta` are exactly 0, except for a share of a model with batch statistics.

    With `masked_share` below 1 the chosen samples and the others are run apart, so that nothing is computed twice; a
    chosen sample has the same dropout in both of its views. A model with batch statistics sees the clean images in one
    pass, whose statistics are those of the whole batch; the masked ones have the statistics of the share, which is
    made up to two images by unmasked ones. Whether anything of the batch is chosen may differ between processes.

    Args:
        model: in train mode; its output has `logits` (B, classes). Its `config.problem_type`, where it has one, says
            whether an image may have several labels.
        images: float (B, C, H, W), augmented and normalised, at the resolution at which the mask acts.
        labels: int64 (B,); or (B, classes), soft labels that sum to one, or of several labels each in [0, 1].
        sample_idx: int64 (B,) rows of the training set: with `epoch` and `settings.seed` they determine the fill, and
            which samples are chosen.
        k: integers (B,), masked positions of each image, pixels or cells (`settings.mask_cell`), from
            `MaskBudget.read`.
        epoch: number of the epoch.
        settings: of the method: saliency, share, mask, fill, delta and label smoothing.
        resize: differentiable resizing from `images` to the model's input, after the mask.
        other_inputs: further keyword arguments of the model.
        saliency_model: the module itself, where `model` wraps it (DDP, `torch.compile`): `saliency_pass="eval"`
            changes its modes, and a compiled `clean_pass` runs it.
        weights: the trained parameters, if the passes may be cut down to what they need. Where nothing wraps the model,
            the final backward pass then leaves out the gradient of the images. `kl_gradient="masked"` with
            `saliency_score="log_prob"` takes saliency and gradients from one backward pass of the cross-entropy
            (`loss_pass`), except for several labels: only the sum or mean of `ce` has a gradient then. Either way
            `outputs` cannot be used in a loss; where that is wanted, leave `weights` away. Without effect where a
            weight has a gradient hook (`Tensor.register_hook`), which is called once, with the whole gradient, and
            where FSDP 2 or ZeRO 3 has sharded one.
        clean_pass: `shared_pass`, or `compiled_pass` of it where `model` is compiled.
        is_chosen: bool (B,) on the CPU, from `in_masked_share` of a `sample_idx` on the CPU; by default it is computed
            from `sample_idx`, for which the host waits where that is on a GPU.

    Returns:
        Values of the whole batch, in its order. For a share of a model without batch statistics `outputs` are the
        logits alone (`ImageClassifierOutput`).

    Raises:
        ValueError: the model's output has no `logits` (B, classes), or they do not carry a gradient; `is_chosen` of
            another kind; or `shared_dropout` for a share of a model with batch statistics and dropout, whose draw for
            the whole batch cannot be repeated for the share.
    """
    # A hook on a weight would change the clean view's gradient on its own, and then the sum of both views' once more.
    # And FSDP and ZeRO 3 gather the weights for each pass: those named here, the shards, are in no graph.
    if weights is not None and any(weight._backward_hooks or is_sharded(weight) for weight in weights):
        weights = None
    network = model if saliency_model is None else saliency_model
    views = _Views(model, network, problem_of(network), epoch, settings, resize, weights, clean_pass)
    batch = Batch(images.detach(), labels, sample_idx, k, other_inputs or {})
    if is_chosen is None:
        in_share = in_masked_share(settings, epoch, sample_idx)
        is_chosen = None if in_share is None else in_share.cpu()
    if is_chosen is None:
        return views.both(batch, inside_engine(model), model)
    if is_chosen.shape != sample_idx.shape or is_chosen.dtype != torch.bool or is_chosen.device.type != "cpu":
        raise ValueError(
            f"is_chosen must be bool ({len(labels)},) on the CPU, one flag per sample, got {is_chosen.dtype} "
            f"{tuple(is_chosen.shape)} on {is_chosen.device}"
        )
    if uses_batch_statistics(network):
        return _share_of_one_pass(views, batch, is_chosen)
    return _share_apart(views, batch, is_chosen)


def _share_apart(views: "_Views", batch: Batch, is_chosen: Tensor) -> MaskedStep:
    """The whole step of the chosen samples, and a standard one of the others."""
    chosen, others = (flags.nonzero()[:, 0] for flags in (is_chosen, ~is_chosen))
    # Whatever is chosen there, every process makes one pass through DDP.
    inner, parts = inside_ddp(views.model), []
    if len(chosen):
        parts.append(views.both(batch.at(chosen), inner, inner if len(others) else views.model))
    if len(others):
        parts.append(views.standard(batch.at(others), views.model))
    turn = torch.cat([chosen, others]).argsort().to(batch.images.device, non_blocking=True)
    logits = torch.cat([part.outputs.logits for part in parts])[turn]
    values = (torch.cat(columns)[turn] for columns in zip(*(part[1:] for part in parts), strict=True))
    return MaskedStep(ImageClassifierOutput(logits=logits), *values)


def _share_of_one_pass(views: "_Views", batch: Batch, is_chosen: Tensor) -> MaskedStep:
    """One clean pass of all samples, which have their statistics in common, and a masked one of the chosen."""
    clean = views.clean(batch, views.model)
    # Statistics need two images. On every process there is a masked pass, through DDP and any synchronised layer.
    count, size = int(is_chosen.sum()), len(is_chosen)
    places = is_chosen.to(torch.int8).argsort(descending=True, stable=True)[: max(count, min(2, size))]
    share = batch.at(places)
    is_beside = torch.arange(len(places)) >= count
    share = share._replace(k=share.k.masked_fill(is_beside.to(share.k.device, non_blocking=True), 0))
    places = places.to(batch.images.device, non_blocking=True)
    state = random_state(batch.images.device)
    effect = views.effect(share, clean.logits[places], clean.gradient[places], views.model)
    if views.settings.shared_dropout and not torch.equal(state, random_state(batch.images.device)):
        raise ValueError(
            f"masked_share={views.settings.masked_share} is refused for a model with both batch statistics (BatchNorm) "
            "and dropout, whose draw for the whole batch cannot be repeated for a share of it: set "
            "shared_dropout=False, or masked_share=1 with masked_every above 1"
        )
    values = (put_in_place(value[:count], places[:count], size) for value in effect)
    return MaskedStep(clean.outputs, clean.ce, *values)


class _CleanView(NamedTuple):
    """The clean view of a batch; `gradient` is that of the score with respect to the images, (B, C, H, W)."""

    outputs: Any
    logits: Tensor
    ce: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class _Views:
    """How the views of samples are made: the arguments of `masked_step` that are not values of samples."""

    model: nn.Module
    network: nn.Module
    problem: Problem
    epoch: int
    settings: SmootSettings
    resize: Callable[[Tensor], Tensor] | None
    weights: Sequence[Tensor] | None
    clean_pass: Callable[..., CleanPass]

    def both(self, batch: Batch, clean_model: nn.Module, masked_model: nn.Module) -> MaskedStep:
        """The whole step, each view through a model of its own: the same one, in DDP or out of it."""
        outputs, logits, ce, gradient = self.clean(batch, clean_model)
        return MaskedStep(outputs, ce, *self.effect(batch, logits, gradient, masked_model))

    def standard(self, batch: Batch, model: nn.Module) -> MaskedStep:
        """The clean view alone, with the values of samples of which nothing is masked."""
        images = batch.images if self.resize is None else self.resize(batch.images)
        outputs, logits = forward(model, images, batch.inputs)
        ce = self.problem.loss(logits, batch.labels, self.settings.label_smoothing_factor)
        nothing = torch.zeros_like(ce)
        return MaskedStep(outputs, ce, nothing, nothing, torch.zeros_like(batch.images[:, :1], dtype=torch.bool))

    def clean(self, batch: Batch, model: nn.Module) -> _CleanView:
        """The clean view and its saliency; the random state is put back for the masked view."""
        settings, resize, weights, inputs = self.settings, self.resize, self.weights, batch.inputs
        images, labels, network = batch.images, batch.labels, self.network
        # The final backward pass ends at the model's input: nobody needs the gradient of the resizing there.
        leaf = images if resize is None else images.clone().requires_grad_()
        resized = leaf if resize is None else resize(leaf)
        pixel_values = resized.detach().requires_grad_()

        ce = None
        with _random_state_rewound(images.device, enabled=settings.shared_dropout):
            if settings.saliency_pass == "eval":
                outputs, logits = forward(model, pixel_values.detach(), inputs)
            elif weights is not None and self.problem.loss_gives_saliency and _asks_for_loss_gradient(settings):
                (outputs, logits, gradient), ce = loss_pass(model, pixel_values, labels, inputs, weights)
            else:
                ranked = model if self.clean_pass is shared_pass else network
                outputs, logits, gradient = self._ranked(ranked, pixel_values, labels, inputs)
        if settings.saliency_pass == "eval":
            with _eval_mode(network):
                gradient = self._ranked(network, pixel_values, labels, inputs).gradient
        if resize is not None:
            (gradient,) = torch.autograd.grad(resized, leaf, gradient)
        # Behind DDP all gradients would come at once, at the end, and none be sent while others are computed. A
        # compiled graph computes the images' gradient whoever asks.
        if settings.saliency_pass == "shared" and weights is not None and ce is None and self.model is network:
            logits = without_image_gradient(logits, weights)
        if ce is None:
            ce = self.problem.loss(logits, labels, settings.label_smoothing_factor)
        return _CleanView(outputs, logits, ce, gradient)

    def _ranked(self, model: nn.Module, pixel_values: Tensor, labels: Tensor, inputs: Mapping[str, Any]) -> CleanPass:
        """The clean pass, and the gradient of the score that the settings name."""
        target = labels if self.settings.saliency_target == "label" else None
        score, ranking_score = self.settings.saliency_score, self.problem.ranking_score
        return self.clean_pass(model, pixel_values, target, score, inputs, ranking_score)

    def effect(self, batch: Batch, logits: Tensor, gradient: Tensor, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """What masking does to the clean prediction: `kl`, `delta` and `is_masked` of `MaskedStep`."""
        settings = self.settings
        masked, is_masked = mask_images(batch.images, gradient, batch.sample_idx, batch.k, self.epoch, settings)
        with _running_statistics_kept(self.network):
            _, masked_logits = forward(model, masked if self.resize is None else self.resize(masked), batch.inputs)
        reference = logits if settings.kl_gradient == "both" else logits.detach()
        delta = self.problem.shift(
            logits, masked_logits, settings.alpha, settings.top_n, settings.delta_mode, batch.labels
        )
        return self.problem.divergence(reference, masked_logits), delta, is_masked


def mask_images(
    images: Tensor, gradient: Tensor, sample_idx: Tensor, k: Tensor, epoch: int, settings: SmootSettings
) -> tuple[Tensor, Tensor]:
    """The images with `k` positions replaced, and which pixels these are: (B, C, H, W), bool (B, 1, H, W).

    Positions are pixels, or the cells of `settings.mask_cell`, all pixels of which are replaced.

    Args:
        images: as in `masked_step`, as are the last four arguments.
        gradient: of the score with respect to the images, (B, C, H, W).

    Raises:
        ValueError: a cell does not fit into the images.
    """
    image_size, cell = images.shape[2:], settings.mask_cell
    ranks = None
    if settings.mask_positions == "random":
        grid = SF.cell_grid(image_size, cell, "mask_cell")
        ranks = SF.counter_uniform(settings.seed ^ _POSITION_STREAM, epoch, sample_idx, grid)
    saliency = SF.cell_sum(SF.channel_mean(gradient, settings.signed_saliency), cell)
    is_masked = SF.masked_positions(saliency, k, settings.mask_positions, epoch, ranks)
    is_masked = SF.spread_cells(is_masked, cell, image_size)
    if settings.mask_fill == "mean":
        fill = SF.mean_fill(images)
    elif settings.mask_fill == "other_image":
        fill = SF.other_image_fill(images)
    elif settings.mask_fill == "adversarial":
        fill = SF.adversarial_fill(images, gradient, settings.fill_step)
    else:
        noise = SF.counter_uniform(settings.seed, epoch, sample_idx, tuple(images.shape[1:]))
        fill = SF.uniform_fill(images, is_masked, noise)
    return torch.where(is_masked, fill, images), is_masked


def _asks_for_loss_gradient(settings: SmootSettings) -> bool:
    """Whether the gradient of the cross-entropy is all that is asked of the clean view's graph."""
    return (
        settings.kl_gradient == "masked"
        and settings.saliency_score == "log_prob"
        and settings.saliency_target == "label"
        and settings.saliency_pass == "shared"
        and settings.label_smoothing_factor == 0
    )


@contextmanager
def _random_state_rewound(device: torch.device, enabled: bool) -> Iterator[None]:
    """Put the random state back at the end, so that the next forward pass draws the same dropout as this one."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, enabled=enabled, device_type="cuda" if device.type == "cpu" else device.type):
        yield


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch's statistics without taking them over into the running ones, which evaluations use.

    An evaluation sees whole images, whose statistics are not those of masked ones.
    """
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    momenta = [layer.momentum for layer in tracking]
    for layer in tracking:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(tracking, momenta, strict=True):
            layer.momentum = momentum
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.sub_(1)


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
