"""Perturbation curves: what a classifier still says when pixels are removed by rank (deletion, insertion; RISE, 2018).

`perturbed_outputs` runs the classifier on samples times steps, `measure_outputs` turns its outputs into the values of
a curve; what is removed, and by what it is replaced, is in `removal.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .cells import cell_grid
from .removal import Order, check_choice, removal_ranks, removed_counts

Measure = Literal["accuracy", "probability", "output", "label_probability"]

# The activations of more images than this leave the caches of a CPU: on one core, 256 images by 64 took the paper's CNN
# two thirds, and DeiT-tiny on 32x32 three quarters, of their time as a single batch.
CPU_CHUNK = 64

# images (M, C, H, W) -> outputs (M, classes): logits wherever a probability is measured.
Score = Callable[[Tensor], Tensor]


def perturbed_outputs(
    score: Score,
    images: Tensor,
    fill: Tensor,
    ranks: Tensor,
    counts: Sequence[int],
    chunk_size: int = 256,
    known: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Outputs of the classifier for every sample and every number of removed positions.

    Samples and steps share one batch dimension, cut into forward passes of at most `chunk_size` images, and of at
    most 64 on a CPU, whose caches hold no more.

    Args:
        score: (M, C, H, W) -> (M, classes); called under `torch.no_grad`.
        images: (B, C, H, W).
        fill: broadcastable to the images.
        ranks: int64 (B, H, W), the turn at which a pixel is removed, from `removal_ranks`.
        counts: S numbers of removed positions.
        chunk_size: images per forward pass, at least 1.
        known: outputs (B, classes) that need no forward pass, by the number of removed positions: 0 is the unmasked
            image, all positions the fill alone. Several curves of the same images share these two.

    Returns:
        (B, S, classes), in the dtype of the outputs.

    Raises:
        ValueError: `chunk_size` below 1, or outputs that are not (M, classes).
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    by_count = dict(known or {})
    unknown = sorted(set(counts) - by_count.keys())
    if unknown:
        outputs = _run(score, images, fill.expand_as(images), ranks, unknown, chunk_size)
        by_count.update(zip(unknown, outputs.unbind(dim=1), strict=True))
    return torch.stack([by_count[count] for count in counts], dim=1)


def _run(score: Score, images: Tensor, fill: Tensor, ranks: Tensor, counts: list[int], chunk_size: int) -> Tensor:
    """Forward passes over samples times counts: (B, S, classes)."""
    ranks = ranks.unsqueeze(1)
    removed = torch.tensor(counts, device=images.device)
    jobs = torch.arange(len(images) * len(counts), device=images.device)
    if images.device.type == "cpu":
        chunk_size = min(chunk_size, CPU_CHUNK)
    outputs = []
    with torch.no_grad():
        for job in jobs.split(chunk_size):
            sample = job // len(counts)
            is_removed = ranks[sample] < removed[job % len(counts), None, None, None]
            output = score(torch.where(is_removed, fill[sample], images[sample]))
            if output.ndim != 2 or len(output) != len(job):
                raise ValueError(f"score must return ({len(job)}, classes), got shape {tuple(output.shape)}")
            outputs.append(output)
    return torch.cat(outputs).reshape(len(images), len(counts), -1)


def has_prediction(outputs: Tensor) -> Tensor:
    """Whether a classifier's outputs predict a class: bool (...,) for outputs (..., classes).

    Outputs with a NaN or +inf among them, or with nothing but -inf, have no softmax and predict none. A highest one can
    be named all the same: torch calls that of a NaN the highest.
    """
    return outputs.amax(dim=-1).isfinite()


def measure_outputs(outputs: Tensor, target: Tensor, measure: Measure) -> Tensor:
    """What a curve shows of the outputs.

    Outputs that predict no class (`has_prediction`) count as wrong: 0 in accuracy and probabilities.

    Args:
        outputs: (B, S, classes).
        target: int64 (B,), the class of each sample; for `"label_probability"` (B, classes), above 0 for each of its
            labels, of which it has at least one.
        measure: `"accuracy"`: 1 where the target has the highest output (of equal ones the first counts), else 0.
            `"probability"`: its softmax output. `"output"`: its output as it is, NaN included.
            `"label_probability"`: the mean sigmoid output of the labels, of a classifier with several for an image.

    Returns:
        (B, S), in float32 or wider.

    Raises:
        ValueError: an unknown measure, a single class, or a target of the other measures' shape.
    """
    check_choice("measure", measure, Measure)
    if outputs.shape[-1] < 2:
        raise ValueError(f"a curve needs at least 2 classes, got outputs of shape {tuple(outputs.shape)}")
    _check_target(len(outputs), target, measure)
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    predicts = has_prediction(outputs)
    if measure == "label_probability":
        is_label = (target > 0).to(outputs.dtype)
        mean = (outputs.sigmoid() * is_label[:, None]).sum(dim=-1) / is_label.sum(dim=-1, keepdim=True)
        return mean.where(predicts, 0.0)
    if measure == "accuracy":
        return ((outputs.argmax(dim=-1) == target[:, None]) & predicts).to(outputs.dtype)
    if measure == "probability":
        outputs = outputs.softmax(dim=-1).where(predicts[..., None], 0.0)
    return outputs.gather(-1, target[:, None, None].expand(-1, outputs.shape[1], 1)).squeeze(-1)


def check_attribution(images: Tensor, attribution: Tensor) -> None:
    """Raise a ValueError unless there is an image, and one real number per position: (B, H, W) for (B, C, H, W)."""
    expected = (images.shape[0], *images.shape[2:])
    if tuple(attribution.shape) != expected:
        raise ValueError(
            f"attribution must have shape {expected}, one value per position of the images {tuple(images.shape)}, "
            f"got {tuple(attribution.shape)}"
        )
    if attribution.is_complex():
        raise ValueError(f"attribution must hold real numbers, got {attribution.dtype}: take .abs() or .real")
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got 0")


def _check_target(count: int, target: Tensor, measure: Measure) -> None:
    is_multi_label = measure == "label_probability"
    if target.ndim != 1 + is_multi_label or len(target) != count:
        expected = f"({count}, classes)" if is_multi_label else f"({count},)"
        raise ValueError(f"target must have shape {expected}, got {tuple(target.shape)}")


def deletion_outputs(
    score: Score,
    images: Tensor,
    attribution: Tensor,
    fractions: Sequence[float],
    fill: Tensor,
    *,
    order: Order = "most_salient_first",
    cell: int = 1,
    chunk_size: int = 256,
    known: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """The classifier's outputs at every point of a deletion curve: (B, S+1, classes).

    Arguments and errors are those of `deletion_curve`.
    """
    check_attribution(images, attribution)
    ranks = removal_ranks(attribution, order, cell)
    counts = removed_counts(fractions, math.prod(cell_grid(images.shape[2:], cell)))
    return perturbed_outputs(score, images, fill, ranks, counts, chunk_size, known)


def insertion_outputs(
    score: Score,
    images: Tensor,
    attribution: Tensor,
    fractions: Sequence[float],
    fill: Tensor,
    *,
    cell: int = 1,
    chunk_size: int = 256,
    known: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """The classifier's outputs at every point of an insertion curve: (B, S+1, classes).

    Arguments and errors are those of `insertion_curve`.
    """
    check_attribution(images, attribution)
    # Putting back the first c in rank is removing the others: the same ranks, read backwards.
    ranks = removal_ranks(attribution, cell=cell)
    positions = math.prod(cell_grid(images.shape[2:], cell))
    counts = [positions - restored for restored in removed_counts(fractions, positions)]
    return perturbed_outputs(score, images, fill, positions - 1 - ranks, counts, chunk_size, known)


def deletion_curve(
    score: Score,
    images: Tensor,
    attribution: Tensor,
    target: Tensor,
    fractions: Sequence[float],
    fill: Tensor,
    *,
    order: Order = "most_salient_first",
    measure: Measure = "accuracy",
    cell: int = 1,
    chunk_size: int = 256,
    known: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Deletion: the value at each fraction when the most salient positions are removed first. Lower is better.

    Args:
        score: (M, C, H, W) -> outputs (M, classes).
        images: (B, C, H, W).
        attribution: (B, H, W) of any real type; NaN is removed last.
        target: int64 (B,), the class that is followed; with `measure="label_probability"` (B, classes), the labels.
        fractions: S+1 rising fractions in [0, 1]; the point at `f` has floor(f * positions) of them removed, where the
            positions are the H * W pixels, or the cells.
        fill: broadcastable to the images, for example from `removal_fill`.
        order: what is removed first.
        measure: what the curve shows, see `measure_outputs`.
        cell: side of the cells that are removed whole, in pixels, see `removal_ranks`.
        chunk_size: images per forward pass, at least 1.
        known: outputs by the number of removed positions, where they are known already, see `perturbed_outputs`.

    Returns:
        (B, S+1), one curve per sample, in float32 or wider.

    Raises:
        ValueError: shapes that do not match, no image, a complex attribution, a single class, or an argument out of
            range, as a cell that does not fit into the images.
    """
    _check_target(len(images), target, measure)
    outputs = deletion_outputs(
        score, images, attribution, fractions, fill, order=order, cell=cell, chunk_size=chunk_size, known=known
    )
    return measure_outputs(outputs, target, measure)


def insertion_curve(
    score: Score,
    images: Tensor,
    attribution: Tensor,
    target: Tensor,
    fractions: Sequence[float],
    fill: Tensor,
    *,
    measure: Measure = "accuracy",
    cell: int = 1,
    chunk_size: int = 256,
    known: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Insertion: from the filled image, the most salient positions are put back first. Higher is better.

    Arguments, result and errors are those of `deletion_curve`; the point at fraction `f` has floor(f * positions) of
    them in place, so that 0 is the fill alone and 1 the image as it is.
    """
    _check_target(len(images), target, measure)
    outputs = insertion_outputs(
        score, images, attribution, fractions, fill, cell=cell, chunk_size=chunk_size, known=known
    )
    return measure_outputs(outputs, target, measure)


def area_under_curve(fractions: Tensor, values: Tensor) -> Tensor:
    """Area under a curve by the trapezoid rule over the true fractions. It is not divided by their span.

    Args:
        fractions: (S+1,) rising: `removed_counts(...)` divided by the number of positions.
        values: (..., S+1).

    Returns:
        (...), in the unit of the values.

    Raises:
        ValueError: not as many fractions as values, or fewer than two.
    """
    if fractions.ndim != 1 or len(fractions) < 2 or values.shape[-1] != len(fractions):
        raise ValueError(
            "fractions must be (S+1,) and values (..., S+1) with S at least 1, "
            f"got {tuple(fractions.shape)} and {tuple(values.shape)}"
        )
    return torch.trapezoid(values, fractions.to(values), dim=-1)
