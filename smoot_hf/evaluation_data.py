"""Evaluation data: a data set in batches, and each batch with what a curve takes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .attributions import LogitsModel, attribute, needs_gradient
from .convention import Convention
from .functional import class_score, counter_uniform, input_saliency
from .functional.perturbation import check_attribution
from .functional.removal import removal_fill
from .model_state import model_device, model_dtype

logger = logging.get_logger(__name__)

# (model, images (B, C, H, W), target (B,)) -> (B, H, W): an attribution of the caller's own.
AttributionFunction = Callable[[LogitsModel, Tensor, Tensor], Tensor]

# Keeps the noise of a uniform fill apart from that of the random ranking, which has the same seed and samples.
_FILL_STREAM = 1


class NothingRankedError(ValueError):
    """In no image does the attribution rank the pixels: it is NaN, or the same at all positions."""


@dataclass(frozen=True)
class DataBatch:
    """Normalised images (B, C, H, W) at native resolution, labels int64 (B,), rows in the data set int64 (B,)."""

    images: Tensor
    labels: Tensor
    sample_idx: Tensor


@dataclass(frozen=True)
class RankedBatch(DataBatch):
    """A batch with the clean outputs (B, classes), the class followed (B,), the attribution (B, H, W) and the fill."""

    outputs: Tensor
    target: Tensor
    attribution: Tensor
    fill: Tensor

    @property
    def is_nan(self) -> Tensor:
        """Bool (B,): the attribution holds a NaN."""
        return self.attribution.isnan().flatten(1).any(dim=1)

    @property
    def is_flat(self) -> Tensor:
        """Bool (B,): the attribution has one value everywhere, and ranks nothing."""
        low, high = self.attribution.flatten(1).aminmax(dim=1)
        return low == high


def data_batches(
    dataset: Any, model: nn.Module, *, input_pipeline: Any = None, batch_size: int = 256, title: str = "Evaluating"
) -> Iterator[DataBatch]:
    """One pass over a data set, in order, on the model's device, with a progress bar.

    The default loader of torch is left out on purpose: it draws from the global random generator.

    Args:
        dataset: has a length, and rows that are dicts of `pixel_values` and `labels` (or `label`). A `__getitems__` is
            used where there is one; it gives a list of such rows, or one dict of batched tensors.
        model: says the device and the floating-point type.
        input_pipeline: its `normalize` takes uint8 `pixel_values` to normalised images; `None` where they are already.
        batch_size: rows at once, at least 1.
        title: of the progress bar.

    Raises:
        ValueError: an empty data set, a row without pixels or label, images of different shapes, or pixels that are
            not what is expected with or without a pipeline.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"dataset must have a length and an index, got a {type(dataset).__name__}: streaming=False")
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one image, got an empty one")
    device, dtype, shape = model_device(model), model_dtype(model), None
    # `disable=None`: no bar where nobody watches.
    for start in logging.tqdm(range(0, len(dataset), batch_size), desc=title, unit="batch", disable=None):
        rows = list(range(start, min(start + batch_size, len(dataset))))
        pixel_values, labels = (values.to(device) for values in _fetch(dataset, rows))
        images = _normalise(pixel_values, input_pipeline, dtype)
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise ValueError(f"images must have one shape, got {tuple(shape)} and {tuple(images.shape[1:])}")
        yield DataBatch(images, labels, torch.tensor(rows, device=device))


def _fetch(dataset: Any, rows: list[int]) -> tuple[Tensor, Tensor]:
    """`pixel_values` (B, C, H, W) and labels int64 (B,) of some rows."""
    fetched = dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[row] for row in rows]
    first: Mapping[str, Any] = fetched if isinstance(fetched, Mapping) else fetched[0]
    label = next((name for name in ("labels", "label") if name in first), None)
    if label is None or "pixel_values" not in first:
        raise ValueError(f"dataset rows must hold 'pixel_values' and 'labels' (or 'label'), got {sorted(first)}")
    pixel_values, labels = (_stack(fetched, name) for name in ("pixel_values", label))
    if 0 in pixel_values.shape or pixel_values.ndim != 4 or labels.ndim != 1 or len(pixel_values) != len(labels):
        raise ValueError(
            "dataset rows must hold pixel_values (C, H, W) and one integer label, "
            f"got batches of shapes {tuple(pixel_values.shape)} and {tuple(labels.shape)}"
        )
    return pixel_values, labels.long()


def _stack(fetched: Mapping[str, Any] | Sequence[Mapping[str, Any]], name: str) -> Tensor:
    if isinstance(fetched, Mapping):
        return torch.as_tensor(fetched[name])
    if any(row[name] is None for row in fetched):
        raise ValueError(f"dataset rows must hold {name!r}, got None in some: leave those rows out")
    values = [torch.as_tensor(row[name]) for row in fetched]
    if any(value.shape != values[0].shape for value in values):
        raise ValueError(f"{name} must have one shape, got {sorted({tuple(value.shape) for value in values})}")
    return torch.stack(values)


def _normalise(pixel_values: Tensor, input_pipeline: Any, dtype: torch.dtype | None) -> Tensor:
    if input_pipeline is not None:
        images = input_pipeline.normalize(pixel_values)
    elif pixel_values.is_floating_point():
        images = pixel_values
    else:
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}: give normalised floats, or an input_pipeline that normalises"
        )
    return images if dtype is None else images.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype`, or (`None`) the precision of the model as it is."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def without_nan(is_nan: Tensor, is_flat: Tensor, convention: Convention) -> Tensor:
    """Which images count, bool (n,) on the CPU: those whose attribution has no NaN; says how many have one.

    Raises:
        NothingRankedError: none is left, or none of those left has an attribution that ranks anything: its number would
            be that of removing the pixels row by row.
    """
    keep = ~is_nan.cpu()
    left_out = len(keep) - int(keep.sum())
    if left_out == len(keep):
        raise NothingRankedError(
            f"attribution {convention.attribution!r} holds NaN in every one of the {len(keep)} images"
        )
    if bool(is_flat.cpu()[keep].all()):
        raise NothingRankedError(
            f"attribution {convention.attribution!r} has one value at all positions in every one of the images, and "
            "ranks nothing: does the model round its input, or is it dead?"
        )
    if left_out:
        logger.warning(
            f"attribution {convention.attribution!r} holds NaN in {left_out} of {len(keep)} images: left out"
        )
    return keep


def rank_batch(
    model: LogitsModel,
    batch: DataBatch,
    attribution: AttributionFunction | None,
    convention: Convention,
    seed: int,
    batch_size: int,
) -> RankedBatch:
    """Clean outputs, the class that is followed, the attribution and the fill of a batch.

    Raises:
        ValueError: a label that is no class of the model, or an attribution that is no tensor, has another shape than
            (B, H, W), or has no gradient to be made of.
    """
    by_gradient = attribution is None and convention.attribution == "gradient"
    score, signed = convention.score or "logit", bool(convention.signed)
    images = batch.images.detach().requires_grad_(by_gradient)
    with torch.set_grad_enabled(by_gradient):
        outputs = model(images)
    classes = outputs.shape[1]
    if bool(((batch.labels < 0) | (batch.labels >= classes)).any()):
        low, high = int(batch.labels.min()), int(batch.labels.max())
        raise ValueError(f"labels must be classes of the model, 0 to {classes - 1}, got {low} to {high}")
    target = batch.labels if convention.target == "label" else outputs.argmax(dim=1)
    if by_gradient:
        # The forward pass that gave the outputs gives their gradient as well.
        with needs_gradient(model, "gradient"):
            values = input_saliency(class_score(outputs, target, score), images, signed)
        outputs = outputs.detach()
    elif attribution is None:
        values = attribute(
            model,
            batch.images,
            target,
            batch.sample_idx,
            method=convention.attribution,  # type: ignore[arg-type]  # checked by `attribute`, which lists the names
            score=score,
            signed=signed,
            seed=seed,
            batch_size=batch_size,
        )
    else:
        values = attribution(model, batch.images, target)
        if not isinstance(values, Tensor):
            raise ValueError(f"attribution must return a tensor (B, H, W), got a {type(values).__name__}")
        values = values.detach()
        check_attribution(images, values)
    noise = None
    if convention.fill == "uniform":
        noise = counter_uniform(seed, _FILL_STREAM, batch.sample_idx, tuple(batch.images.shape[1:]))
    fill = removal_fill(batch.images, convention.fill, noise)
    return RankedBatch(batch.images, batch.labels, batch.sample_idx, outputs, target, values, fill)
