"""Pillow's resizing of 8-bit images, to the grey value, in batches on the images' device.

timm's evaluation transform resizes by Pillow, whose results torchvision misses by up to two grey values: enough to move
a probability by a percent. The arithmetic is that of Pillow's `Resample.c`: weights in fixed point, one side after the
other, and 8 bits in between. Which side comes first depends on the sizes and on Pillow's release: Pillow is asked.
"""

import math
from functools import lru_cache

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PRECISION_BITS = 22
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
# Images resized at once: float64 takes eight times the memory of the images.
_AT_ONCE = 32


def pillow_resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """What `PIL.Image.resize` gives for every channel.

    Args:
        images: uint8 (B, C, H, W).
        size: (height, width) of the result.
        interpolation: `"bilinear"` or `"bicubic"`.

    Returns:
        uint8 (B, C, height, width).
    """
    return torch.cat([_resize(block, size, interpolation) for block in images.split(_AT_ONCE)])


def _resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    height, width = images.shape[-2:]
    return _in_order(images, size, interpolation, _height_first((height, width), size, interpolation))


def _in_order(images: Tensor, size: tuple[int, int], interpolation: str, height_first: bool) -> Tensor:
    # Sums of 8-bit values times 22-bit weights are whole numbers that float64 holds exactly, in any order.
    values = images.double()
    for side in ("height", "width") if height_first else ("width", "height"):
        if side == "height" and size[0] != values.shape[-2]:
            values = _to_8_bits(_weights(values.shape[-2], size[0], interpolation, images.device) @ values)
        elif side == "width" and size[1] != values.shape[-1]:
            values = _to_8_bits(values @ _weights(values.shape[-1], size[1], interpolation, images.device).T)
    return values.to(torch.uint8)


@lru_cache(maxsize=256)
def _height_first(native: tuple[int, int], size: tuple[int, int], interpolation: str) -> bool:
    """Whether the Pillow installed resizes the height first, found on one image of noise."""
    image = torch.randint(0, 256, native, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resample = Image.Resampling[interpolation.upper()]
    theirs = torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize(size[::-1], resample)))
    for height_first in (False, True):
        if torch.equal(_in_order(image[None, None], size, interpolation, height_first)[0, 0], theirs):
            return height_first
    logger.warning(
        f"Pillow {PIL.__version__} resizes {native} to {size} otherwise than the releases this was written for: "
        "evaluation and inference may differ by two grey values"
    )
    return False


def _to_8_bits(sums: Tensor) -> Tensor:
    half = 1 << (_PRECISION_BITS - 1)
    return sums.add_(half).div_(1 << _PRECISION_BITS).floor_().clamp_(0, 255)


@lru_cache(maxsize=32)
def _weights(length: int, resized: int, interpolation: str, device: torch.device) -> Tensor:
    """Whole numbers as float64 (resized, length): the share of every pixel in every new one, times 2^22."""
    scale = length / resized
    stretch = max(scale, 1.0)
    support = _SUPPORT[interpolation] * stretch
    weights = torch.zeros(resized, length, dtype=torch.float64)
    for row in range(resized):
        center = (row + 0.5) * scale
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), length)
        shares = [_filter((x - center + 0.5) * (1 / stretch), interpolation) for x in range(first, last)]
        total = sum(shares)
        fixed = [math.trunc(math.copysign(0.5, s) + s / total * (1 << _PRECISION_BITS)) for s in shares]
        weights[row, first:last] = torch.tensor(fixed, dtype=torch.float64)
    with torch.inference_mode(False):
        return weights.to(device)


def _filter(x: float, interpolation: str) -> float:
    x = abs(x)
    if interpolation == "bilinear":
        return max(1.0 - x, 0.0)
    a = -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0
