"""Sanity check: whether saliency maps change with the weights of the model (Adebayo et al., NeurIPS 2018)."""

import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional.masking import ranking_key
from ..functional.removal import check_choice
from ..models.logits import AttributionScore, LogitsModel
from ..models.state import model_device, untouched
from .attributions import Method, attribute
from .ranked_batches import Collator, DataBatch, autocast, check_labels, data_batches, explained

Randomization = Literal["full", "cascading"]

# The new weights must not be those that the model started from, which it still resembles: whoever trained it with seed
# 0 will randomise it with seed 0.
_WEIGHT_STREAM = 0x72616E646F6D
# Standard deviation of what is zero everywhere: what transformers draw tokens and position embeddings with.
_SPREAD_OF_ZEROS = 0.02


@dataclass(frozen=True, eq=False)
class WeightRandomization:
    """How much an attribution resembles itself once the weights are random.

    Attributes:
        randomization: `"full"` or `"cascading"`.
        layers: names of the modules, in the order in which their weights were replaced; one entry, `"all"`, if full.
        correlation: float64 (len(layers), n), Spearman's rank correlation of each image's map with that of the trained
            model, after each replacement; NaN where a map is constant.
        n: images.
    """

    randomization: Randomization
    layers: tuple[str, ...]
    correlation: Tensor
    n: int

    @property
    def mean(self) -> Tensor:
        """(len(layers),), over the images with a correlation. Near 0 is what a faithful method gives at the end."""
        return self.correlation.nanmean(dim=1)

    @property
    def undefined(self) -> Tensor:
        """(len(layers),) images without a correlation, because a map is constant or holds a NaN."""
        return self.correlation.isnan().sum(dim=1)


def randomized_weights_correlation(
    model: nn.Module,
    dataset: Any,
    attribution: Method = "gradient",
    *,
    randomization: Randomization = "full",
    score: AttributionScore = "logit",
    signed: bool = False,
    input_pipeline: Any = None,
    data_collator: Collator | None = None,
    label_name: str | None = None,
    batch_size: int = 256,
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> WeightRandomization:
    """Rank correlation of a model's attributions with those of the same architecture with re-initialised weights.

    An attribution that stays the same depends on the images alone, and not on what the model has learned. Both explain
    the labels; of an image without any, of a multi-label model, the highest output of the trained one.

    Args:
        model: as in `evaluate_faithfulness`, like every argument that is not listed here. It works on a copy.
        dataset: a few hundred images are enough.
        attribution: a method of `attributions.attribute`.
        randomization: `"full"`: all weights at once, see `reinitialize`. `"cascading"`: the cascading
            randomization of Adebayo et al., which shows on how many of the last layers a map depends. The modules get
            new weights one after the other, from the output to the input, and keep them; costs one pass over the data
            for every module that has weights.
        score: whose gradient it is.
        signed: rank by the signed value, or by the magnitude.
        input_pipeline: normalises, and resizes to the model's input.
        data_collator: makes a batch of a list of rows.
        label_name: key of the labels; `None`: `labels` or `label`.
        batch_size: images per forward pass.
        autocast_dtype: `None` runs in the model's own precision.
        seed: of the new weights and of the noise of attributions.

    Returns:
        The correlations after every replacement, per image.

    Raises:
        ValueError: an unknown choice, a model without weights, a module whose weights cannot be drawn anew or come
            back as they were, or a data set that `data_batches` refuses.
    """
    check_choice("randomization", randomization, Randomization)
    given = LogitsModel(model, input_pipeline and input_pipeline.resize)
    options: dict[str, Any] = {"method": attribution, "score": score, "signed": signed, "seed": seed}

    def maps(judged: nn.Module, title: str) -> Tensor:
        scorer = LogitsModel(judged, input_pipeline and input_pipeline.resize)
        batches = data_batches(
            dataset,
            judged,
            input_pipeline=input_pipeline,
            data_collator=data_collator,
            label_name=label_name,
            batch_size=batch_size,
            title=title,
        )
        targets = ((batch, _target(given, batch)) for batch in batches)
        return torch.cat(
            [
                attribute(scorer, batch.images, target, batch.sample_idx, batch_size=batch_size, **options)
                for batch, target in targets
            ]
        )

    with untouched(model), autocast(model_device(model), autocast_dtype):
        trained = maps(model, "Trained weights")
        randomized = _copied(model)
        stages = _stages(randomized, randomization)
        torch.manual_seed(seed ^ _WEIGHT_STREAM)
        correlations = []
        for name, modules in stages:
            for module in modules:
                reinitialize(module)
            if name == stages[-1][0]:
                _check_all_new(model, randomized)
            correlations.append(rank_correlation(trained, maps(randomized, f"Random weights: {name}")))
    return WeightRandomization(
        randomization, tuple(name for name, _ in stages), torch.stack(correlations), len(trained)
    )


@torch.no_grad()
def _target(trained: LogitsModel, batch: DataBatch) -> Tensor:
    """The labels as `attribute` takes them."""
    if not trained.is_multi_label:
        return batch.labels
    outputs = trained(batch.images)
    check_labels(batch.labels, outputs.shape[1])
    return explained(outputs, batch.labels, is_multi_label=True)


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the model.

    The old weight norm and spectral norm keep the weight of their last forward pass, with its graph, as an attribute
    that cannot be copied; each forward pass makes it anew, so that the model does without that graph.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())
    return copy.deepcopy(model)


def _stages(model: nn.Module, randomization: Randomization) -> list[tuple[str, list[nn.Module]]]:
    """Names and modules that get new weights together; modules are registered from the input to the output."""
    weighted = [(name or "model", module) for name, module in model.named_modules() if _learned(module)]
    if not weighted:
        raise ValueError(f"{type(model).__name__} has no weights to randomise")
    if randomization == "full":
        return [("all", [module for _, module in weighted])]
    return [(name, [module]) for name, module in reversed(weighted)]


def _learned(module: nn.Module) -> dict[str, Tensor]:
    """What may hold learned values of a module's own, by name, as real numbers that share the memory.

    All parameters, and the floating-point buffers that a checkpoint keeps: running statistics, frozen weights. A buffer
    that no checkpoint keeps is computed from the configuration; one of integers holds indices or counts.
    """
    kept = {name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set}
    found = {name: value for name, value in module._parameters.items() if value is not None}
    found |= {n: v for n, v in kept.items() if v is not None and (v.is_floating_point() or v.is_complex())}
    return {n: torch.view_as_real(v.data) if v.is_complex() else v.data for n, v in found.items() if v.numel()}


def reinitialize(module: nn.Module) -> None:
    """Give a module's own parameters and learned buffers new random values, drawn from the global generator.

    By the module's `reset_parameters` (convolutions, linear and normalisation layers, embeddings; a batch norm's
    running statistics are reset with it to 0 and 1, which they start from: its statistics are learned from the data as
    its weights are). Whatever that method does not write, or of a module without one (position embeddings, class
    tokens, a subclass's further parameters, both kinds of weight norm, frozen batch norms), is drawn from a normal
    distribution of its own mean and spread; where all its values are the same, of a spread of that value, or of 0.02
    where it is 0. What has no negative value, as a variance has not, keeps none.

    Args:
        module: changed in place; its submodules are left alone.

    Raises:
        ValueError: a parameter that is not of a floating-point type, as those of quantised layers, by its name.
    """
    before = {name: values.clone() for name, values in _learned(module).items()}
    for name, values in before.items():
        if not values.is_floating_point():
            raise ValueError(
                f"{type(module).__name__}.{name} is of {values.dtype}: such weights cannot be drawn anew. Check the "
                "model before it is quantised."
            )
    written: set[str] = set()
    with torch.no_grad():
        if _can_reset(module):
            for values in _learned(module).values():
                values.fill_(torch.nan)
            module.reset_parameters()
            written = {name for name, values in _learned(module).items() if _is_reset(values, before[name])}
        for name, values in _learned(module).items():
            if name not in written:
                values.copy_(_drawn_like(before[name]))


def _can_reset(module: nn.Module) -> bool:
    """Whether there is a `reset_parameters` that asks for nothing."""
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        return False
    return all(p.default is not p.empty or p.kind.name.startswith("VAR") for p in signature(reset).parameters.values())


def _is_reset(values: Tensor, before: Tensor) -> bool:
    """Whether every value was written, and none of those before is left but a constant that nothing was learned in."""
    return not bool(values.isnan().any()) and (_is_constant(before) or not torch.equal(values, before))


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.flatten()[0]).all())


def _drawn_like(values: Tensor) -> Tensor:
    """Normal noise of the mean and the spread of the finite values, in float32 or wider; infinities stay."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    finite = wide[wide.isfinite()]
    if not len(finite):
        return wide
    mean, spread = finite.mean(), finite.std(correction=0)
    if _is_constant(finite):
        spread = mean.abs() if mean != 0 else torch.full_like(mean, _SPREAD_OF_ZEROS)
    drawn = mean + spread * torch.randn_like(wide)
    if bool((finite >= 0).all()):
        drawn = drawn.abs()
    return torch.where(wide.isfinite(), drawn, wide)


def _check_all_new(model: nn.Module, randomized: nn.Module) -> None:
    """Raise a ValueError that names the first learned values that are as they were.

    A constant that its module's `reset_parameters` writes as well (the weights of a norm that was never trained) holds
    nothing learned.
    """
    for (name, old), new in zip(model.named_modules(), randomized.modules(), strict=True):
        found = _learned(new)
        for own, values in _learned(old).items():
            if torch.equal(values, found[own]) and not (_is_constant(values) and _can_reset(old)):
                place = f"{name}.{own}" if name else own
                raise ValueError(
                    f"{place} of a {type(old).__name__} is as it was after all weights were replaced: "
                    "the check would call a faithful method unfaithful. Does something write it back?"
                )


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two maps of each image; equal values share the mean of their ranks.

    Args:
        a: (B, H, W) of any real type.
        b: (B, H, W) of any real type.

    Returns:
        float64 (B,) on the CPU, in [-1, 1]; NaN where a map is constant or holds a NaN.

    Raises:
        ValueError: complex values.
    """
    x, y = (_mean_ranks(ranking_key(values).flatten(1).cpu()) for values in (a, b))
    x, y = (ranks - ranks.mean(dim=1, keepdim=True) for ranks in (x, y))
    correlation = (x * y).sum(dim=1) / (x.square().sum(dim=1) * y.square().sum(dim=1)).sqrt()
    is_nan = a.isnan().flatten(1).any(dim=1) | b.isnan().flatten(1).any(dim=1)
    return correlation.masked_fill(is_nan.cpu(), torch.nan)


def _mean_ranks(values: Tensor) -> Tensor:
    """(B, P) -> (B, P): how many values are smaller, plus half of how many others are equal."""
    # Half-precision types cannot be searched; float64 holds them and float32 exactly.
    values = values.double() if values.is_floating_point() else values
    ordered = values.sort(dim=1).values
    smaller = torch.searchsorted(ordered, values, right=False)
    not_larger = torch.searchsorted(ordered, values, right=True)
    return (smaller + not_larger - 1).double() / 2
