"""Cells: squares of p x p pixels that are ranked, masked and removed as one."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor


def cell_grid(image_size: Sequence[int], cell: int, name: str = "cell") -> tuple[int, int]:
    """Rows and columns of the cells of an image: (ceil(H / cell), ceil(W / cell)).

    Args:
        image_size: (H, W) in pixels.
        cell: side of a cell in pixels; 1 makes every pixel a cell of its own.
        name: what an error calls `cell`.

    Raises:
        ValueError: `cell` is no whole number between 1 and the shorter side of the image.
    """
    height, width = image_size
    if not isinstance(cell, Integral) or isinstance(cell, bool):
        raise ValueError(f"{name} must be a whole number of pixels, got {cell!r}")
    if not 1 <= cell <= min(height, width):
        raise ValueError(
            f"{name} must be between 1 and {min(height, width)}, for a cell must fit into an image of "
            f"{height}x{width} pixels, got {cell}"
        )
    return math.ceil(height / cell), math.ceil(width / cell)


def cell_sum(values: Tensor, cell: int) -> Tensor:
    """Sum of the values in each cell.

    Cells are cut from the top left. Where H or W is no multiple of `cell`, the cells of the last row or column are
    narrower, and their sums are of fewer values. NaN in a cell makes its sum NaN.

    Args:
        values: (B, H, W) of any real type.
        cell: side of a cell in pixels, at most the shorter side of the image.

    Returns:
        (B, ceil(H / cell), ceil(W / cell)). For `cell=1` the values themselves; otherwise in float32 or wider, and in
        float64 for integers and booleans.

    Raises:
        ValueError: as `cell_grid`, or complex values.
    """
    cell_grid(values.shape[1:], cell)
    if cell == 1:
        return values
    if values.is_complex():
        raise ValueError(f"only real numbers can be ranked, got values of {values.dtype}: take .abs() or .real")
    is_float = values.is_floating_point()
    wide = values.to(torch.promote_types(values.dtype, torch.float32) if is_float else torch.float64)
    # A pooling window reaches over the edge without counting what is not there, and the divisor of 1 leaves the sum.
    return F.avg_pool2d(wide.unsqueeze(1), cell, ceil_mode=True, divisor_override=1).squeeze(1)


def spread_cells(values: Tensor, cell: int, image_size: Sequence[int]) -> Tensor:
    """Give every pixel the value of its cell.

    Args:
        values: (..., ceil(H / cell), ceil(W / cell)) of any type.
        cell: side of a cell in pixels.
        image_size: (H, W) in pixels.

    Returns:
        (..., H, W), in the type of the values; for `cell=1` the values themselves.

    Raises:
        ValueError: as `cell_grid`, or values of another grid.
    """
    grid = cell_grid(image_size, cell)
    if tuple(values.shape[-2:]) != grid:
        raise ValueError(f"values must have shape (..., {grid[0]}, {grid[1]}), got {tuple(values.shape)}")
    if cell == 1:
        return values
    height, width = image_size
    return values.repeat_interleave(cell, dim=-2).repeat_interleave(cell, dim=-1)[..., :height, :width]
