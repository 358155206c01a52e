"""The update of the mask budget K (Equation 4)."""

import torch
from torch import Tensor

_ROUNDINGS = {"floor": torch.floor, "trunc": torch.trunc, "nearest": torch.round}


def update_budget(
    k: Tensor, delta: Tensor, step_size: float, k_min: int, k_max: int, rounding: str = "floor"
) -> Tensor:
    """K <- clip(K + round(mu * delta), K_min, K_max), Equation 4.

    A sample whose delta is not finite (its loss overflowed) keeps its K.

    Args:
        k: (B,) integers, number of masked pixel positions.
        delta: (B,) in [-1, 1], from `probability_shift`.
        step_size: mu, in pixels, at least 0.
        k_min: least allowed K, in pixels.
        k_max: largest allowed K, in pixels.
        rounding: `"floor"` as in the paper (any negative delta costs a pixel), `"trunc"` towards zero, or `"nearest"`
            (halves to even). The product is taken in float64, so that it is rounded once.

    Returns:
        (B,) the new K, in the dtype of `k`.

    Raises:
        ValueError: `rounding` is none of the three.
    """
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(map(repr, _ROUNDINGS))}, got {rounding!r}")
    step = _ROUNDINGS[rounding](step_size * delta.to(torch.float64))
    moved = (k + step).clamp(k_min, k_max)
    return torch.where(torch.isfinite(step), moved, k).to(k.dtype)
