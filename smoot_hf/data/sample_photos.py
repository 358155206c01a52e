"""Sample photos: the two that scikit-learn ships, cut into small images, for sets that need photos and no files."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def photos_of_scikit_learn(count: int, size: int, *, seed: int) -> Tensor:
    """Random crops of the two photos that scikit-learn ships (a palace and a flower): uint8 (count, 3, size, size).

    Shrunk to 160 pixels high first, so that a small crop shows more than a plain colour.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("the sample photos need scikit-learn: pip install 'smoot-hf[recipes]'") from error
    generator = np.random.default_rng(seed)
    photos = []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        scale = 160 / pixels.shape[2]
        small = F.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)
        photos.append(small[0].round().clamp(0, 255).to(torch.uint8))
    crops = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for row in range(count):
        photo = photos[generator.integers(len(photos))]
        top, left = (int(generator.integers(side - size + 1)) for side in photo.shape[1:])
        crops[row] = photo[:, top : top + size, left : left + size]
    return crops
