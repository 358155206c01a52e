"""Removal of pixels: which positions go first, how many of them, and what replaces them."""

import itertools
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import cell_sum, spread_cells
from .masking import mean_fill, ranking_key, rising_positions, uniform_fill

Order = Literal["most_salient_first", "least_salient_first"]
Fill = Literal["corner", "mean", "zero", "uniform", "blur"]


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise a ValueError unless `value` is one of the strings of a `Literal` type."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def even_fractions(steps: int, last: float = 1.0, first: float = 0.0) -> tuple[float, ...]:
    """Fractions from `first` to `last`, both included, in `steps` equal steps.

    `even_fractions(10)` is 0, 0.1, ..., 1; the paper's 0 to 90 % by 10 is `even_fractions(9, 0.9)`.

    Args:
        steps: number of intervals, a whole number of at least 1; the curve has `steps + 1` points.
        last: the largest fraction, above `first` and at most 1.
        first: the smallest fraction, at least 0.

    Returns:
        `steps + 1` rising numbers.

    Raises:
        ValueError: `steps` below 1 or no integer, or not 0 <= `first` < `last` <= 1.
    """
    if not isinstance(steps, Integral):
        raise ValueError(f"steps must be a whole number, got {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0.0 <= first < last <= 1.0:
        raise ValueError(f"last must be in (first, 1] and first at least 0, got last={last}, first={first}")
    # 0.3, not 0.30000000000000004: these numbers are printed and compared.
    return tuple(round(first + (last - first) * step / steps, 12) for step in range(steps + 1))


def removed_counts(fractions: Sequence[float], positions: int) -> list[int]:
    """How many positions each fraction stands for: floor(fraction * positions).

    Args:
        fractions: rising numbers in [0, 1].
        positions: H * W, or the number of cells.

    Returns:
        One integer per fraction, between 0 and `positions`; divided by `positions`, the true fractions of the curve.

    Raises:
        ValueError: fewer than two fractions, one outside [0, 1], or two that do not rise.
    """
    if len(fractions) < 2:
        raise ValueError(f"fractions must hold at least 2 numbers, got {len(fractions)}")
    if not all(0.0 <= fraction <= 1.0 for fraction in fractions):
        raise ValueError(f"fractions must lie in [0, 1], got {list(fractions)}")
    if any(later <= earlier for earlier, later in itertools.pairwise(fractions)):
        raise ValueError(f"fractions must rise, got {list(fractions)}")
    # A product of floats can fall short of the integer it stands for: 0.29 * 100 = 28.999999999999996.
    return [math.floor(fraction * positions + 1e-6) for fraction in fractions]


def removal_ranks(attribution: Tensor, order: Order = "most_salient_first", cell: int = 1) -> Tensor:
    """The turn at which each position is removed: 0 is the first.

    The sort is stable, so that ties go row by row in both orders. NaN has no rank: it is removed last in both.

    Args:
        attribution: (B, H, W) of any real type; integers and booleans rank as their values.
        order: what is removed first.
        cell: side of the cells that are removed whole, in pixels. They rank by the sum of the attribution over the cell
            (`cell_sum`), and all pixels of a cell have its turn.

    Returns:
        int64 (B, H, W), each sample a permutation of 0 .. H*W - 1; with cells, of 0 to their number - 1 over the cells.

    Raises:
        ValueError: an unknown order, a complex attribution, or a cell that does not fit into the image.
    """
    check_choice("order", order, Order)
    image_size = attribution.shape[1:]
    attribution = cell_sum(attribution, cell)
    # torch sorts NaN behind every number, so both orders sort upwards.
    key = ranking_key(attribution, descending=order == "most_salient_first")
    turns = rising_positions(key.flatten(1))
    position = torch.arange(turns.shape[1], device=turns.device).expand_as(turns)
    ranks = torch.empty_like(turns).scatter_(1, turns, position).reshape(attribution.shape)
    return spread_cells(ranks, cell, image_size)


def blur_fill(images: Tensor, sigma: float) -> Tensor:
    """The images under a Gaussian blur of `sigma` pixels (cut at 3 sigma, edges repeated): shape and dtype are kept."""
    radius = max(1, math.ceil(3 * sigma))
    dtype = torch.promote_types(images.dtype, torch.float32)
    offset = torch.arange(-radius, radius + 1, device=images.device, dtype=dtype)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = kernel / kernel.sum()
    batch, channels, height, width = images.shape
    blurred = images.to(dtype).reshape(batch * channels, 1, height, width)
    blurred = F.conv2d(F.pad(blurred, (radius, radius, 0, 0), mode="replicate"), kernel[None, None, None, :])
    blurred = F.conv2d(F.pad(blurred, (0, 0, radius, radius), mode="replicate"), kernel[None, None, :, None])
    return blurred.reshape(images.shape).to(images.dtype)


def removal_fill(images: Tensor, fill: Fill, noise: Tensor | None = None) -> Tensor:
    """The values that removed pixels are replaced by, in the (normalised) units of the images.

    Args:
        images: (B, C, H, W).
        fill: `"corner"`: the image's top left pixel, which is background if the object is centred. `"mean"`: the mean
            of each channel of the image. `"zero"`: zero, which after the usual normalisation is the mean of the
            training set. `"uniform"`: noise for each pixel and channel, between the lowest and the highest value of
            that channel of the image. `"blur"`: the image after a Gaussian blur whose sigma is an eighth of the
            shorter side.
        noise: (B, C, H, W) in [0, 1), needed by `"uniform"` only.

    Returns:
        (B, C, 1, 1) or (B, C, H, W), in the dtype of the images.

    Raises:
        ValueError: an unknown fill, or `"uniform"` without noise.
    """
    check_choice("fill", fill, Fill)
    if fill == "corner":
        return images[:, :, :1, :1]
    if fill == "mean":
        return mean_fill(images)
    if fill == "zero":
        return torch.zeros_like(images[:, :, :1, :1])
    if fill == "blur":
        return blur_fill(images, min(images.shape[2:]) / 8)
    if noise is None:
        raise ValueError("fill='uniform' needs noise of shape (B, C, H, W), got None")
    everything = torch.ones_like(images[:, :1], dtype=torch.bool)
    return uniform_fill(images, everything, noise)
