"""Ranked batches: the images of an evaluation in batches, with their outputs, attributions and fills."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers.utils import logging

from ..functional import cell_grid, cell_sum, counter_uniform, input_saliency, multi_label_target, spread_cells
from ..functional.masking import ranking_key
from ..functional.perturbation import check_attribution, has_prediction, measure_outputs
from ..functional.removal import removal_fill
from ..models.logits import LogitsModel, is_multi_label, target_score
from ..models.state import model_device, model_dtype
from .attributions import attribute, needs_gradient
from .convention import Convention
from .image_identity import ImageIdentity

logger = logging.get_logger(__name__)


class NothingToMeasureError(ValueError):
    """No image has a prediction, or none has an attribution that ranks its positions."""


# (model, images (B, C, H, W), target (B,)) -> (B, H, W) of any real type: an attribution of the caller's own. Of a
# multi-label model the target is (B, classes), weights of the labels.
AttributionFunction = Callable[[LogitsModel, Tensor, Tensor], Tensor]

# What a data set gives for a list of rows -> a batch, a dict of tensors: as the data collator of a `Trainer`.
Collator = Callable[[Any], Mapping[str, Any]]

# Keys of the labels, where nobody names another.
LABEL_NAMES = ("labels", "label")

# Keeps the noise of a uniform fill apart from that of the random ranking, which has the same seed and samples.
_FILL_STREAM = 1


@dataclass(frozen=True)
class DataBatch:
    """Normalised images (B, C, H, W) at native resolution, labels int64 (B,), rows in the data set int64 (B,).

    Of a multi-label model the labels are (B, classes), 0 or 1 each.
    """

    images: Tensor
    labels: Tensor
    sample_idx: Tensor


@dataclass(frozen=True)
class RankedBatch(DataBatch):
    """A batch with the clean outputs (B, classes), the class followed (B,), the attribution (B, H, W) and the fill.

    What is removed from it are cells of `cell` by `cell` pixels. Of a multi-label model the target is the labels that
    are followed, (B, classes), at least one in each row.
    """

    outputs: Tensor
    target: Tensor
    attribution: Tensor
    fill: Tensor
    cell: int = 1

    @property
    def positions(self) -> int:
        """How many positions an image has: pixels, or cells."""
        return math.prod(cell_grid(self.images.shape[2:], self.cell))

    @property
    def has_prediction(self) -> Tensor:
        """Bool (B,): the outputs of the unmasked image predict a class."""
        return has_prediction(self.outputs)

    @property
    def is_correct(self) -> Tensor:
        """Bool (B,): the highest output is the label's; of a multi-label model all labels are predicted, and no other.

        Outputs that predict no class are wrong.
        """
        if self.labels.ndim == 1:
            return measure_outputs(self.outputs[:, None], self.labels, "accuracy")[:, 0].bool()
        return ((self.outputs > 0) == (self.labels > 0)).all(dim=1) & self.has_prediction

    @property
    def is_nan(self) -> Tensor:
        """Bool (B,): the attribution holds a NaN."""
        return self.attribution.isnan().flatten(1).any(dim=1)

    @property
    def is_flat(self) -> Tensor:
        """Bool (B,): the attribution has one value everywhere, or one sum in all cells, and ranks nothing."""
        is_flat = _has_one_value(self.attribution)
        return is_flat if self.cell == 1 else is_flat | _has_one_value(cell_sum(self.attribution, self.cell))


def _has_one_value(values: Tensor) -> Tensor:
    """Bool (B,), of (B, H, W)."""
    # Unsigned integers have no minimum in torch, their ranking keys have.
    low, high = ranking_key(values).flatten(1).aminmax(dim=1)
    return low == high


def data_batches(
    dataset: Any,
    model: nn.Module,
    *,
    input_pipeline: Any = None,
    data_collator: Collator | None = None,
    label_name: str | None = None,
    batch_size: int = 256,
    title: str = "Evaluating",
    identity: ImageIdentity | None = None,
) -> Iterator[DataBatch]:
    """One pass over a data set, in order, on the model's device, with a progress bar.

    No `DataLoader` of torch is used, because it draws from the global random generator.

    Args:
        dataset: has a length, and rows that are dicts of `pixel_values` and `labels` (or `label`), or (image, label)
            pairs. A label is a class index; of a multi-label model a row (classes,) of 0 and 1 of any type. A
            `__getitems__` is used where there is one; it gives a list of such rows, or one dict of batched tensors.
            With a `data_collator` the rows are of any kind that it takes.
        model: the images are moved to its device and converted to its floating-point type; its kind says what the
            labels are.
        input_pipeline: its `normalize` takes uint8 `pixel_values` to normalised images; `None` where they are already.
        data_collator: takes what the data set gives for a list of rows, and returns a dict of `pixel_values`
            (B, C, H, W) and labels, every row kept; `None`: the rows are stacked.
        label_name: key of the labels; `None`: `labels` or `label`.
        batch_size: rows at once, at least 1.
        title: of the progress bar.
        identity: takes in the rows as they are read.

    Raises:
        ValueError: no data set, or an empty one; a row without pixels or label; labels that are no integers, or of a
            multi-label model not 0 or 1 for each class; images of different shapes, or pixels that are not what is
            expected with or without a pipeline.
    """
    if not isinstance(batch_size, Integral):
        raise ValueError(f"batch_size must be a whole number, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_dataset(dataset)
    device, dtype, shape = model_device(model), model_dtype(model), None
    as_labels = _as_multi_hot if is_multi_label(model) else _as_class_indices
    # `disable=None`: no bar where nobody watches.
    for start in logging.tqdm(range(0, len(dataset), batch_size), desc=title, unit="batch", disable=None):
        rows = list(range(start, min(start + batch_size, len(dataset))))
        fetched = _fetch(dataset, rows, data_collator, label_name, as_labels)
        pixel_values, labels = (values.to(device) for values in fetched)
        if identity is not None:
            identity.update(pixel_values, labels)
        images = _normalise(pixel_values, input_pipeline, dtype)
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise ValueError(f"images must have one shape, got {tuple(shape)} and {tuple(images.shape[1:])}")
        yield DataBatch(images, labels, torch.tensor(rows, device=device))


def check_dataset(dataset: Any) -> None:
    """Refuse a data set without length and index, and what is often passed in the place of a data set.

    Raises:
        ValueError: saying what to pass.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        raise ValueError(
            "dataset must be a data set, got a DataLoader: pass its `dataset`, and its `collate_fn` as data_collator "
            "if it has one of its own"
        )
    if isinstance(dataset, Mapping):
        names = list(dataset)
        raise ValueError(
            f"dataset must be one data set, got a {kind} of {len(names)}, {names[:10]}: pass one of them, dataset[name]"
        )
    if not has_index(dataset):
        raise ValueError(f"dataset must have a length and an index, got a {kind}: load it with streaming=False")
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one image, got an empty one")


def has_index(dataset: Any) -> bool:
    """Whether a data set has a length, and rows that are asked for by number, one at a time or several at once.

    An `IterableDataset` has none, although torch gives it a `__getitem__`, which raises.
    """
    has_rows = hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")
    return has_rows and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def evenly_spread(dataset: Any, count: int) -> Subset:
    """At most `count` rows of a data set, spread evenly over it, the same ones every time.

    Raises:
        ValueError: as `check_dataset`.
    """
    check_dataset(dataset)
    count = min(count, len(dataset))
    return Subset(dataset, [row * len(dataset) // count for row in range(count)])


# (labels of a row or of a batch, their name) -> a tensor of integers.
_LabelReader = Callable[[Any, str], Tensor]


def _fetch(
    dataset: Any, rows: list[int], collator: Collator | None, label_name: str | None, as_labels: _LabelReader
) -> tuple[Tensor, Tensor]:
    """`pixel_values` (B, C, H, W) and labels int64 (B,), or of a multi-label model (B, classes), of some rows."""
    has_batches = callable(getattr(dataset, "__getitems__", None))
    fetched = dataset.__getitems__(rows) if has_batches else [dataset[row] for row in rows]
    if collator is None:
        batch = fetched if isinstance(fetched, Mapping) else [_named(row, label_name) for row in fetched]
    else:
        batch = collator(fetched)
        if not isinstance(batch, Mapping):
            raise ValueError(f"data_collator must return a dict of pixel_values and labels, got {type(batch).__name__}")
    names = set(batch if isinstance(batch, Mapping) else batch[0])
    label = next((name for name in ([label_name] if label_name else LABEL_NAMES) if name in names), None)
    if label is None or "pixel_values" not in names:
        wanted = repr(label_name) if label_name else " (or ".join(map(repr, LABEL_NAMES)) + ")"
        place = "dataset rows" if collator is None else "the data collator's batches"
        raise ValueError(f"{place} must hold 'pixel_values' and {wanted}, got {sorted(names)}")
    pixel_values, labels = _stack(batch, "pixel_values", _as_pixels), _stack(batch, label, as_labels)
    label_dims = 2 if as_labels is _as_multi_hot else 1
    if (
        0 in pixel_values.shape
        or pixel_values.ndim != 4
        or labels.ndim != label_dims
        or len(pixel_values) != len(labels)
    ):
        expected = "labels (classes,) of 0 and 1" if as_labels is _as_multi_hot else "one integer label"
        raise ValueError(
            f"dataset rows must hold pixel_values (C, H, W) and {expected}, "
            f"got batches of shapes {tuple(pixel_values.shape)} and {tuple(labels.shape)}"
        )
    if len(labels) != len(rows):
        raise ValueError(f"each of {len(rows)} rows must become an image of the batch, got {len(labels)} images")
    return pixel_values, labels.long()


def _named(row: Any, label_name: str | None) -> Mapping[str, Any]:
    """A row as a dict; torchvision's data sets give (image, label) pairs."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, tuple | list) and len(row) == 2:
        return {"pixel_values": row[0], label_name or LABEL_NAMES[0]: row[1]}
    found = f"a {type(row).__name__}" + (f" of {len(row)}" if isinstance(row, tuple | list) else "")
    raise ValueError(
        f"dataset rows must be dicts of 'pixel_values' and 'labels', or (image, label) pairs, got {found}: pass a "
        "data_collator that makes a dict of a list of them"
    )


def _stack(
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]], name: str, as_tensor: Callable[[Any, str], Tensor]
) -> Tensor:
    if isinstance(batch, Mapping):
        return as_tensor(batch[name], name)
    if any(row[name] is None for row in batch):
        raise ValueError(f"dataset rows must hold {name!r}, got None in some: leave those rows out")
    values = [as_tensor(row[name], name) for row in batch]
    if any(value.shape != values[0].shape for value in values):
        raise ValueError(f"{name} must have one shape, got {sorted({tuple(value.shape) for value in values})}")
    return torch.stack(values)


def _as_pixels(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be tensors or arrays, got {type(value).__name__}: let the data set's transform make them, as "
            "torchvision's ToTensor and Normalize do, or pass a data_collator that does"
        ) from error


def _as_class_indices(value: Any, name: str) -> Tensor:
    try:
        labels = torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be class indices, integers from 0, got {value!r}: number the labels as the model does, for "
            "example by model.config.label2id"
        ) from error
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name} must be class indices, integers from 0, got {labels.dtype}: soft labels and targets of a "
            "regression have no one class; convert class numbers that are kept as floats to integers. A model of "
            "several labels for an image says so by config.problem_type='multi_label_classification'"
        )
    return labels


def _as_multi_hot(value: Any, name: str) -> Tensor:
    expected = f"{name} of a multi-label model must be (classes,) for each image, 0 or 1 for each class"
    try:
        labels = torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{expected}, got {value!r}") from error
    if labels.ndim == 0:
        raise ValueError(f"{expected}, got the one value {value!r}: make a row with a 1 for each of its labels")
    if not bool(((labels == 0) | (labels == 1)).all()):
        found = labels[(labels != 0) & (labels != 1)][0].item()
        raise ValueError(f"{expected}, got the value {found}: faithfulness is measured by labels that are or are not")
    return labels


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


def is_ranked(is_nan: Tensor, is_flat: Tensor, convention: Convention) -> Tensor:
    """Which images count, bool (n,) on the CPU: those whose attribution ranks the positions.

    A NaN has no rank, and a flat map, with one value everywhere, would remove the pixels row by row. The number of
    images that are left out for either reason is logged as a warning.

    Args:
        is_nan: bool (n,), the attribution holds a NaN.
        is_flat: bool (n,), the attribution has one value at all positions.
        convention: names the attribution.

    Raises:
        NothingToMeasureError: none is left.
    """
    is_nan, is_flat = is_nan.cpu(), is_flat.cpu()
    name, n, keep = f"attribution {convention.attribution!r}", len(is_nan), ~is_nan & ~is_flat
    if bool(is_nan.all()):
        raise NothingToMeasureError(f"{name} holds NaN in every one of the {n} images")
    if not bool(keep.any()):
        raise NothingToMeasureError(
            f"{name} has one value at all positions in every one of the images, and ranks nothing: does the model "
            "round its input, or is it dead?"
        )
    for left_out, reason in ((int(is_nan.sum()), "holds NaN"), (int(is_flat.sum()), "has one value at all positions")):
        if left_out:
            logger.warning(f"{name} {reason} in {left_out} of {n} images: left out")
    return keep


def check_predictions(predicts: Tensor) -> None:
    """Refuse a model that predicts no class for any of the unmasked images, bool (n,): its area would be a perfect 0.

    Raises:
        NothingToMeasureError: as said.
    """
    if not bool(predicts.any()):
        raise NothingToMeasureError(
            f"the model's outputs hold a NaN or an infinity for every one of the {len(predicts)} unmasked images: it "
            "predicts nothing whose removal could be measured. Has its training diverged?"
        )


def warn_of_nan_predictions(count: int, total: int) -> None:
    """Say how many of all outputs of the model predict no class (`has_prediction`), if any do."""
    if count:
        logger.warning(
            f"{count} of {total} predictions hold a NaN or an infinity: counted as wrong. Does the model divide by the "
            "spread of its image, which is zero once every pixel is replaced?"
        )


def rank_batch(
    model: LogitsModel,
    batch: DataBatch,
    attribution: AttributionFunction | None,
    convention: Convention,
    seed: int,
    batch_size: int,
    ranker: LogitsModel | None = None,
) -> RankedBatch:
    """Clean outputs, the class that is followed, the attribution and the fill of a batch.

    The attribution is that of `ranker` where one is given, else the model's own.

    Raises:
        ValueError: labels that are no classes of the model, a model without logits, cells that do not fit into the
            images, or an attribution that is no tensor, has another shape than (B, H, W), is complex, or has no
            gradient to be made of.
    """
    cell_grid(batch.images.shape[2:], convention.cell)
    by_gradient = attribution is None and convention.attribution == "gradient" and ranker is None
    score, signed = convention.score or "logit", bool(convention.signed)
    images = batch.images.detach().requires_grad_(by_gradient)
    with torch.set_grad_enabled(by_gradient):
        outputs = model(images)
    check_labels(batch.labels, outputs.shape[1])
    target = explained(outputs, batch.labels if convention.target == "label" else None, model.is_multi_label)
    if by_gradient:
        # The forward pass that gave the outputs gives their gradient as well.
        with needs_gradient(model, "gradient"):
            values = input_saliency(target_score(outputs, target, score), images, signed)
        outputs = outputs.detach()
    elif attribution is None and convention.attribution == "random":
        values = random_map(seed, batch.sample_idx, batch.images.shape[2:], convention.cell)
    elif attribution is None:
        values = attribute(
            ranker or model,
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
        values = attribution(ranker or model, batch.images, target)
        if not isinstance(values, Tensor):
            raise ValueError(f"attribution must return a tensor (B, H, W), got a {type(values).__name__}")
        values = values.detach()
        check_attribution(images, values)
    noise = None
    if convention.fill == "uniform":
        noise = counter_uniform(seed, _FILL_STREAM, batch.sample_idx, tuple(batch.images.shape[1:]))
    fill = removal_fill(batch.images, convention.fill, noise)
    return RankedBatch(batch.images, batch.labels, batch.sample_idx, outputs, target, values, fill, convention.cell)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no classes of the model, or of a multi-label model not as many as it has classes.

    Raises:
        ValueError: as said.
    """
    if labels.ndim == 2 and labels.shape[1] != classes:
        raise ValueError(f"labels must have a column for each of the model's {classes} classes, got {labels.shape[1]}")
    if labels.ndim == 1 and bool(((labels < 0) | (labels >= classes)).any()):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels must be classes of the model, 0 to {classes - 1}, got {low} to {high}")


def explained(outputs: Tensor, labels: Tensor | None, is_multi_label: bool) -> Tensor:
    """The target of an attribution: the labels, or (`None`) what the model predicts.

    Args:
        outputs: (B, classes), of the whole images.
        labels: int64 (B,), or of a multi-label model (B, classes).
        is_multi_label: of the model.

    Returns:
        int64 (B,); of a multi-label model (B, classes) as from `functional.multi_label_target`.
    """
    if is_multi_label:
        return multi_label_target(outputs, labels)
    return outputs.argmax(dim=1) if labels is None else labels


def random_map(seed: int, sample_idx: Tensor, image_size: Sequence[int], cell: int = 1) -> Tensor:
    """The control: noise in the place of an attribution, float32 (B, H, W), a function of seed and sample alone.

    The pixels of a cell share its noise in equal parts, so that the sums over the cells are all drawn alike. Noise
    drawn by pixel would have smaller sums in the narrower cells at the edge, and remove these last.
    """
    noise = counter_uniform(seed, 0, sample_idx, cell_grid(image_size, cell))
    sizes = cell_sum(torch.ones(1, *image_size, device=noise.device), cell)
    return spread_cells(noise / sizes, cell, image_size)
