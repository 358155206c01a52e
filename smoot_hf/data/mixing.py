"""Mixing: mixup, CutMix and random erasing of a training batch, whose labels become soft."""

from dataclasses import dataclass
from functools import cached_property

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Mixing:
    """The augmentations of DeiT that act on a batch, by timm; for `InputPipeline(mix=...)`.

    In each batch the images are mixed in pairs; of an odd number one stays as it is. They draw from the random states
    of Python and NumPy, which a Trainer saves and restores.

    Attributes:
        num_classes: of the model.
        mixup_alpha: mixup (arXiv:1710.09412): the share of an image is drawn from Beta(alpha, alpha); 0: no mixup.
        cutmix_alpha: CutMix (arXiv:1905.04899): the area of an image likewise; 0: no CutMix. With both, each batch gets
            one of them, with equal probability.
        erasing_probability: random erasing (arXiv:1708.04896): before it is mixed, an image loses a rectangle to noise
            with this probability.
        multi_label: labels come as (B, classes), several for an image; else as class indices (B,).

    Raises:
        ValueError: a field out of its range, by name.
    """

    num_classes: int
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    erasing_probability: float = 0.0
    multi_label: bool = False

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.erasing_probability <= 1:
            raise ValueError(f"erasing_probability must lie in [0, 1], got {self.erasing_probability}")
        if self.mixup_alpha == self.cutmix_alpha == 0:
            raise ValueError("mixup_alpha and cutmix_alpha are both 0, which mixes nothing: set one of them")

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: floating point (B, C, H, W), normalised; changed in place.
            labels: int64 (B,), or (B, classes) with `multi_label`.

        Returns:
            The images, and soft labels float32 (B, classes); the larger weight need not be that of the image's own.
        """
        if self.erasing_probability:
            images = RandomErasing(self.erasing_probability, mode="pixel", device=images.device)(images)
        paired = len(images) // 2 * 2
        rest = labels[paired:] if self.multi_label else F.one_hot(labels[paired:], self.num_classes)
        if not paired:
            return images, rest.float()
        mixed, soft = self._mixup(images[:paired], labels[:paired])
        return torch.cat([mixed, images[paired:]]), torch.cat([soft, rest.to(soft.dtype)])

    @cached_property
    def _mixup(self) -> Mixup:
        return Mixup(
            self.mixup_alpha,
            self.cutmix_alpha,
            label_smoothing=0.0,
            num_classes=self.num_classes,
            multi_label=self.multi_label,
        )
