"""The input pipeline: augmentation, normalisation and resizing of uint8 batches, on the device of the model."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from ..functional import counter_uniform
from .image_processor import INTERPOLATIONS, Interpolation, read_image_processor, run_image_processor

# Nearest as Pillow and the image processors mean it; "nearest" of torch is another, kept for old code.
_TORCH_MODE = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
_TORCHVISION_MODE = {
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
# Parts the augmentation's random numbers from the fill's, which come from the same seed, epoch and sample.
_AUGMENTATION_STREAM = 0x6175676D656E74


@dataclass(frozen=True)
class InputPipeline:
    """What an image processor does, in batches on the images' device, and the augmentation of training.

    All methods take or give batches (B, C, H, W). None waits for the device, with one exception: an evaluation that
    resizes by Pillow, which runs on the CPU. Random crops and flips are a function of (seed, epoch, sample), so a
    sample is augmented in the same way whatever the batch or the number of processes; `mix` alone depends on both.

    Attributes:
        mean: mean of each channel, of pixels / 255.
        std: standard deviation of each channel, of pixels / 255; positive.
        size: (height, width) to resize to, or the length of the shorter side; `None` keeps the native size.
        interpolation: of resizing; antialiased, except for "nearest".
        resized_by: library that resizes the 8-bit images of an evaluation, "torchvision" (as transformers does) or
            "pillow" (as timm does). The two differ by up to two of the 256 grey values.
        crop_size: (height, width) to crop from the centre after resizing; `None`: no crop.
        crop_rounding: where the margin is odd, "floor" puts the crop higher and further left (transformers), "round"
            rounds half to even (torchvision, timm).
        crop_padding: augmentation: random crop of the native size after padding each side by that many black pixels.
        horizontal_flip: augmentation: mirror left and right with probability 1/2.
        mix: augmentation: mixes the images of a training batch, and their labels. A function of normalised images
            (B, C, H, W) and labels, which gives both, the labels soft: (B, classes). `Mixing` is one, and so are
            mixup and CutMix of timm and of torchvision. It draws from a random state of its own library.
        seed: of crop and flip.
        is_resized: the images are at the size of the model's input, to which `resize_images` has brought them when
            they were decoded: neither resized nor cropped any more.

    Raises:
        ValueError: a field out of its range, by name.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | int | None = None
    interpolation: Interpolation = "bilinear"
    resized_by: Literal["torchvision", "pillow"] = "torchvision"
    crop_size: tuple[int, int] | None = None
    crop_rounding: Literal["floor", "round"] = "floor"
    crop_padding: int = 0
    horizontal_flip: bool = False
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    seed: int = 0
    is_resized: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean and std must have one number per channel each, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive in every channel, got {self.std}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}")
        # As people write them, and image processors hold them.
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0 pixels, got {self.crop_padding}")

    @classmethod
    def from_image_processor(
        cls,
        processor: Any,
        *,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
    ) -> Self:
        """The pipeline that gives, at evaluation, what an image processor gives.

        The pipeline and the processor are both run on one random image, and refused where they differ. They agree to
        1e-6. Processors of transformers that resize by Pillow differ by up to two of the 256 grey values, since
        torchvision rounds differently.

        Args:
            processor: an image processor of transformers (fixed size, shorter side and centre crop, ConvNeXT's
                `crop_pct`) or timm's wrapper.
            crop_padding: as the attribute.
            horizontal_flip: as the attribute.
            mix: as the attribute.
            seed: as the attribute.

        Raises:
            ValueError: the processor does something that the pipeline cannot; the message names its attribute.
        """
        fields = read_image_processor(processor)
        pipeline = cls(**fields, crop_padding=crop_padding, horizontal_flip=horizontal_flip, mix=mix, seed=seed)
        pipeline._check_parity(processor)
        return pipeline

    def prepare_training(self, pixel_values: Tensor, sample_idx: Tensor, epoch: int) -> Tensor:
        """Augment and normalise: what the mask acts on.

        Args:
            pixel_values: uint8 (B, C, H, W).
            sample_idx: int64 (B,), row of each sample in the training set, on the same device.
            epoch: the current epoch, from 0.

        Returns:
            float32 (B, C, H, W), native resolution, normalised.

        Raises:
            ValueError: images of another type or shape.
        """
        self._check_images(pixel_values)
        return self.normalize(self._augment(pixel_values, sample_idx, epoch))

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, C, H, W), native resolution, without augmentation.

        Raises:
            ValueError: images of another type or shape.
        """
        self._check_images(pixel_values)
        mean, std = (_channels(values, pixel_values.device) for values in (self.mean, self.std))
        return pixel_values.to(torch.float32).sub_(mean).div_(std)

    def resize(self, images: Tensor) -> Tensor:
        """Resize and crop images to the size of the model's input; differentiable. An image of that size is kept.

        Float pixels are neither rounded nor clamped, so the result differs from `prepare_evaluation` by up to one of
        the 256 grey values, and by more at edges with "bicubic", which overshoots.

        Args:
            images: float (B, C, H, W), after the mask.

        Returns:
            (B, C, h, w) in the dtype of `images`.

        Raises:
            ValueError: the images are smaller than the centre crop.
        """
        if self.is_resized:
            return images
        target = self._resized(images.shape[-2:])
        if target != tuple(images.shape[-2:]):
            antialias = self.interpolation != "nearest"
            align_corners = False if antialias else None
            mode = _TORCH_MODE[self.interpolation]
            # Torch has no antialiasing of bfloat16 or float16 on a CPU.
            precise = images.to(torch.promote_types(images.dtype, torch.float32))
            resized = F.interpolate(precise, target, mode=mode, align_corners=align_corners, antialias=antialias)
            images = resized.to(images.dtype)
        return self._center_crop(images)

    def prepare_evaluation(self, pixel_values: Tensor) -> Tensor:
        """The model's input as the image processor makes it: resize and round in uint8, crop, then normalise.

        Args:
            pixel_values: uint8 (B, C, H, W).

        Returns:
            float32 (B, C, h, w), within 1e-6 of what the processor gives on the same device. By torchvision a GPU
            resizes uint8 in float, and may round to the neighbour of the CPU's grey value.

        Raises:
            ValueError: images of another type or shape, or smaller than the centre crop.
        """
        self._check_images(pixel_values)
        return self.normalize(pixel_values if self.is_resized else self.resize_images(pixel_values))

    def resize_images(self, pixel_values: Tensor) -> Tensor:
        """What the image processor makes of images before it normalises them: resized, rounded in uint8, and cropped.

        Args:
            pixel_values: uint8 (B, C, H, W), of any number of channels.

        Returns:
            uint8 (B, C, h, w).

        Raises:
            ValueError: images smaller than the centre crop.
        """
        target = self._resized(pixel_values.shape[-2:])
        if target != tuple(pixel_values.shape[-2:]):
            if self.resized_by == "pillow" and self.interpolation != "nearest":
                pixel_values = pillow_resize(pixel_values, target, self.interpolation)
            else:
                mode = _TORCHVISION_MODE[self.interpolation]
                pixel_values = tvF.resize(pixel_values, list(target), interpolation=mode, antialias=True)
        return self._center_crop(pixel_values)

    def with_images_resized(self) -> Self:
        """The same pipeline for images that `decode_images` has brought to the size of the model's input by it."""
        return replace(self, is_resized=True)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) to which images of every size are brought; `None`: it depends on theirs."""
        return self.crop_size or (self.size if isinstance(self.size, tuple) else None)

    def _check_images(self, pixel_values: Tensor) -> None:
        shape = tuple(pixel_values.shape)
        if pixel_values.dtype != torch.uint8 or pixel_values.ndim != 4 or shape[1] != len(self.mean):
            raise ValueError(
                f"pixel_values must be uint8 (B, {len(self.mean)}, H, W), got {pixel_values.dtype} {shape}"
            )

    def _augment(self, pixel_values: Tensor, sample_idx: Tensor, epoch: int) -> Tensor:
        """Random crop and flip in one gather, with row and column of the source pixel worked out per sample."""
        if not self.crop_padding and not self.horizontal_flip:
            return pixel_values
        batch, channels, height, width = pixel_values.shape
        pad = self.crop_padding
        draws = counter_uniform(self.seed ^ _AUGMENTATION_STREAM, epoch, sample_idx, (3,))
        offsets = (draws[:, :2] * (2 * pad + 1)).long().clamp_(max=2 * pad)
        rows = torch.arange(height, device=pixel_values.device) + offsets[:, :1]
        columns = torch.arange(width, device=pixel_values.device) + offsets[:, 1:]
        if self.horizontal_flip:
            columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
        source = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).reshape(batch, 1, height * width)
        padded = F.pad(pixel_values, (pad, pad, pad, pad)).flatten(2)
        return padded.gather(2, source.expand(-1, channels, -1)).reshape(pixel_values.shape)

    def _resized(self, native: torch.Size) -> tuple[int, int]:
        """Height and width after resizing, before the crop."""
        height, width = native
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        # Integer arithmetic as in the processors, which cut the longer side to whole pixels.
        longer = int(self.size * max(height, width) / min(height, width))
        return (longer, self.size) if width <= height else (self.size, longer)

    def _center_crop(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.crop_size is None or self.crop_size == (height, width):
            return images
        if self.crop_size[0] > height or self.crop_size[1] > width:
            raise ValueError(f"crop_size {self.crop_size} is larger than the images, ({height}, {width})")
        to_whole = math.floor if self.crop_rounding == "floor" else round
        top, left = (to_whole((side - kept) / 2) for side, kept in zip((height, width), self.crop_size, strict=True))
        return images[..., top : top + self.crop_size[0], left : left + self.crop_size[1]]

    def agrees_with(self, processor: Any, image_size: tuple[int, int]) -> bool:
        """Whether a processor makes of an image of that (height, width) what `prepare_evaluation` does.

        Both are run on one random image; two of the 256 grey values are allowed, by which resizers differ. Resizing is
        compared also where it is done when images are decoded (`is_resized`).
        """
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (len(self.mean), *image_size), dtype=torch.uint8, generator=generator)
        ours = replace(self, is_resized=False).prepare_evaluation(image[None])[0]
        theirs = run_image_processor(processor, image)
        two_levels = 2 / 255 / torch.tensor(self.std)[:, None, None] + 1e-5
        return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= two_levels).all())

    def _check_parity(self, processor: Any) -> None:
        """Run both on one image, for what no attribute tells: a processor's code may do anything."""
        # Not square, and odd: a wrong order of the sides or a wrong rounding of the crop shows.
        sides = (301, 275) if self.size is not None else (self.crop_size or (32, 32))
        if not self.agrees_with(processor, sides):
            raise ValueError(
                f"{type(processor).__name__} gives other pixels than its attributes say: InputPipeline cannot stand "
                "in for it. Use it in the data set's own transform instead, without an input pipeline"
            )


@lru_cache(maxsize=32)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, C, 1, 1) float32 in units of uint8 pixels; kept, so that it is uploaded once."""
    with torch.inference_mode(False):
        return (torch.tensor(values) * 255.0).reshape(1, -1, 1, 1).to(device)


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
