"""Sanity check of saliency maps: with other weights they must look different (Adebayo et al., NeurIPS 2018)."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attributions import AttributionScore, LogitsModel, Method, attribute
from .evaluation_data import Collator, autocast, data_batches
from .functional.removal import check_choice
from .model_state import model_device, untouched

Randomization = Literal["full", "cascading"]

# The new weights must not be those that the model started from, which it still resembles: whoever trained it with seed
# 0 will randomise it with seed 0.
_WEIGHT_STREAM = 0x72616E646F6D


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

    An attribution that stays the same shows the images, not what the model learned.

    Args:
        model: as in `evaluate_faithfulness`, like every argument that is not listed here. It works on a copy.
        dataset: a few hundred images are enough.
        attribution: a method of `attributions.attribute`.
        randomization: `"full"`: all weights at once. `"cascading"`: module by module, the last one first, each on top
            of those before; costs one pass over the data for every module that has weights.
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
        ValueError: an unknown choice, a model without weights, or a data set that `data_batches` refuses.
    """
    check_choice("randomization", randomization, Randomization)
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
        return torch.cat(
            [
                attribute(scorer, batch.images, batch.labels, batch.sample_idx, batch_size=batch_size, **options)
                for batch in batches
            ]
        )

    with untouched(model), autocast(model_device(model), autocast_dtype):
        trained = maps(model, "Trained weights")
        randomized = copy.deepcopy(model)
        stages = _stages(randomized, randomization)
        torch.manual_seed(seed ^ _WEIGHT_STREAM)
        correlations = []
        for name, modules in stages:
            for module in modules:
                reinitialize(module)
            correlations.append(rank_correlation(trained, maps(randomized, f"Random weights: {name}")))
    return WeightRandomization(
        randomization, tuple(name for name, _ in stages), torch.stack(correlations), len(trained)
    )


def _stages(model: nn.Module, randomization: Randomization) -> list[tuple[str, list[nn.Module]]]:
    """Names and modules that get new weights together; modules are registered from the input to the output."""
    weighted = [(name or "model", module) for name, module in model.named_modules() if module._parameters]
    if not weighted:
        raise ValueError(f"{type(model).__name__} has no weights to randomise")
    if randomization == "full":
        return [("all", [module for _, module in weighted])]
    return [(name, [module]) for name, module in reversed(weighted)]


def reinitialize(module: nn.Module) -> None:
    """Give a module's own parameters new random values, drawn from the global generator.

    By the module's `reset_parameters` (convolutions, linear and normalisation layers, embeddings); a parameter of any
    other module (position embeddings, class tokens) is drawn from a normal distribution of its own mean and spread.
    """
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            spread = parameter.std(correction=0)
            parameter.copy_(parameter.mean() + spread * torch.randn_like(parameter))


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two maps of each image; equal values share the mean of their ranks.

    Args:
        a: (B, H, W).
        b: (B, H, W).

    Returns:
        float64 (B,) on the CPU, in [-1, 1]; NaN where a map is constant or holds a NaN.
    """
    x, y = (_mean_ranks(values.flatten(1).cpu().double()) for values in (a, b))
    x, y = (ranks - ranks.mean(dim=1, keepdim=True) for ranks in (x, y))
    correlation = (x * y).sum(dim=1) / (x.square().sum(dim=1) * y.square().sum(dim=1)).sqrt()
    is_nan = a.isnan().flatten(1).any(dim=1) | b.isnan().flatten(1).any(dim=1)
    return correlation.masked_fill(is_nan.cpu(), torch.nan)


def _mean_ranks(values: Tensor) -> Tensor:
    """(B, P) -> (B, P): how many values are smaller, plus half of how many others are equal."""
    ordered = values.sort(dim=1).values
    smaller = torch.searchsorted(ordered, values, right=False)
    not_larger = torch.searchsorted(ordered, values, right=True)
    return (smaller + not_larger - 1).double() / 2
