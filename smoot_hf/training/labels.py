"""The labels of a batch: their kind, which a glance tells, and their values, which are checked on the CPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Weights that were mixed in half precision do not add up to one exactly.
_SUM_TOLERANCE = 0.01
# How many weights an error shows.
_SHOWN = 8
_SOFT = "one class index per sample, int64 (B,), or soft labels, float (B, classes)"
_SEVERAL = "several labels per sample, (B, classes) of 0 and 1, as the model's problem_type says"


def read_labels(labels: Any, name: str, multi_label: bool) -> Tensor:
    """Labels as the loss takes them, by their type and shape alone.

    Args:
        labels: of a batch, in training or evaluation.
        name: their key in the batch.
        multi_label: whether an image may have several labels.

    Returns:
        int64 (B,), class indices of any integer or boolean type; or floating point (B, classes), soft or several.

    Raises:
        ValueError: they are no tensor of that kind.
    """
    is_tensor = isinstance(labels, Tensor) and not labels.is_complex()
    if is_tensor and multi_label and labels.ndim == 2:
        return labels if labels.is_floating_point() else labels.to(torch.float32)
    if is_tensor and not multi_label and labels.ndim == 2 - (not labels.is_floating_point()):
        return labels if labels.is_floating_point() else labels.to(torch.int64)
    found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    remedy = "let the data collator stack them into one tensor, all of one kind"
    if is_tensor and multi_label and labels.ndim == 1:
        remedy = "write 1 in the columns of an image's labels, or build the model with one label per image"
    elif is_tensor and labels.ndim == 1:
        remedy = "convert them in the data set or the data collator, labels.astype('int64') or labels.long()"
    elif is_tensor and labels.ndim == 2:
        remedy = "for several labels per image set model.config.problem_type='multi_label_classification'"
    raise ValueError(f"{name!r} must be {_SEVERAL if multi_label else _SOFT}, got {found}: {remedy}")


class LabelFault(NamedTuple):
    """What is wrong with the labels of a batch: "labels must `must`, but the one at `place` is `found`"."""

    place: int
    must: str
    found: str


def find_fault(labels: Tensor, num_labels: int | None, multi_label: bool) -> LabelFault | None:
    """What is wrong with the values of labels, of the first sample where it is; `None` where they are good.

    Args:
        labels: from `read_labels`; where they are on a GPU, the host waits for it.
        num_labels: classes of the model, `None` where it does not say.
        multi_label: as there.
    """
    if labels.ndim == 1:
        return None if num_labels is None else _fault_of_classes(labels, num_labels)
    width = labels.shape[1]
    if width < 2 or num_labels not in (None, width):
        return LabelFault(0, f"have {num_labels or 'at least 2'} weights, one for each class", f"{width} weights")
    wide = labels.to(torch.float64)
    is_bad = ~wide.isfinite() | (wide < 0)
    if multi_label:
        must, is_bad = "be 1 for each label that the image has, and 0 for the others", is_bad | (wide > 1)
    else:
        must = "be a distribution over the classes: no weight below 0, and 1 in sum"
        is_bad |= ((wide.sum(dim=1) - 1).abs() > _SUM_TOLERANCE)[:, None]
    if not is_bad.any():
        return None
    place = int(is_bad.any(dim=1).to(torch.int8).argmax())
    weights = ", ".join(f"{weight:.4g}" for weight in wide[place, :_SHOWN])
    return LabelFault(place, must, f"[{weights}{', ...' if width > _SHOWN else ''}]")


def _fault_of_classes(labels: Tensor, num_labels: int) -> LabelFault | None:
    is_bad = (labels < 0) | (labels >= num_labels)
    if not is_bad.any():
        return None
    place = int(is_bad.to(torch.int8).argmax())
    return LabelFault(place, f"lie in [0, {num_labels - 1}], the model's classes", str(int(labels[place])))


def check_evaluation_labels(labels: Tensor, num_labels: int, multi_label: bool) -> None:
    """Refuse labels of an evaluation batch that the model cannot be judged by; waits for the device.

    Args:
        labels: from `read_labels`.
        num_labels: classes of the model's logits.
        multi_label: whether an image may have several labels.

    Raises:
        ValueError: naming the first bad one.
    """
    fault = find_fault(labels, num_labels, multi_label)
    if fault is not None:
        raise ValueError(
            f"the labels of the evaluation set must {fault.must}, but one is {fault.found}: leave such samples out, or "
            "predict without labels"
        )
