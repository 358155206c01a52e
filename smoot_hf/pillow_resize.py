"""Pillow's resizing of 8-bit images, for batches of tensors.

timm's evaluation transform resizes by Pillow, whose results torchvision misses by up to two grey values: enough to move
a probability by a percent.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pillow_resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """What `PIL.Image.resize` gives for every channel. Runs on the CPU: images on a GPU are copied there and back.

    Args:
        images: uint8 (B, C, H, W).
        size: (height, width) of the result.
        interpolation: `"bilinear"` or `"bicubic"`.

    Returns:
        uint8 (B, C, height, width), on the images' device.
    """
    resample = Image.Resampling[interpolation.upper()]
    channels = images.flatten(0, 1).cpu().numpy()
    resized = [np.asarray(Image.fromarray(channel).resize(size[::-1], resample)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).to(images.device).unflatten(0, images.shape[:2])
