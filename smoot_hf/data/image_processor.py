"""Image processors: reading one into the fields of an `InputPipeline`, and checking the one that is published."""

import math
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor
from transformers.utils import logging

from ..errors import first_line
from ..models.state import random_state_kept

logger = logging.get_logger(__name__)

Interpolation = Literal["nearest", "bilinear", "bicubic"]
INTERPOLATIONS = get_args(Interpolation)

_FROM_PILLOW: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}

# Switches that the pipeline carries out, or that say nothing about uint8 images with the right channels.
_HONOURED = {"do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"}

# ConvNeXT and its kin crop below this size only, and squash the image above it.
_CONVNEXT_NO_CROP = 384


def read_image_processor(processor: Any) -> dict[str, Any]:
    """The fields of `InputPipeline` that stand for an image processor of transformers or timm's wrapper.

    Raises:
        ValueError: it does something that the pipeline cannot; the message names its attribute.
    """
    return _read_timm(processor) if hasattr(processor, "data_config") else _read_transformers(processor)


def run_image_processor(processor: Any, image: Tensor) -> Tensor:
    """Run a processor on one uint8 (C, H, W) image, given as inference would: by Pillow. float32 (C, h, w)."""
    array = image.permute(1, 2, 0).numpy()
    pillow = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    return processor(pillow, return_tensors="pt")["pixel_values"][0]


def _read_timm(processor: Any) -> dict[str, Any]:
    """The fields that timm's evaluation transform stands for."""
    config = processor.data_config
    _, height, width = config["input_size"]
    crop_mode, interpolation = config.get("crop_mode", "center"), config["interpolation"]
    scaled = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
    if crop_mode not in ("center", "squash") or (crop_mode == "center" and scaled[0] != scaled[1]):
        raise ValueError(f"InputPipeline cannot honour crop_mode={crop_mode!r} with input_size={config['input_size']}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"InputPipeline cannot honour interpolation={interpolation!r} of timm")
    return {
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "size": scaled[0] if crop_mode == "center" else scaled,
        "interpolation": interpolation,
        "resized_by": "pillow",
        "crop_size": (height, width),
        "crop_rounding": "round",
    }


def _read_transformers(processor: Any) -> dict[str, Any]:
    """The fields that a processor of transformers stands for."""
    for name, value in vars(processor).items():
        if name.startswith("do_") and value and name not in _HONOURED:
            raise ValueError(f"InputPipeline cannot honour {name}={value} of {type(processor).__name__}")
    size, crop_size = _read_size(processor)
    fields: dict[str, Any] = {**_read_normalization(processor), "size": size, "crop_size": crop_size}
    if size is not None:
        resample = int(processor.resample)
        if resample not in _FROM_PILLOW:
            raise ValueError(f"InputPipeline cannot honour resample={resample} of {type(processor).__name__}")
        fields["interpolation"] = _FROM_PILLOW[resample]
    return fields


def _read_size(processor: Any) -> tuple[tuple[int, int] | int | None, tuple[int, int] | None]:
    """The fields `size` and `crop_size`."""
    crop_size = None
    if getattr(processor, "do_center_crop", False):
        crop_size = (processor.crop_size["height"], processor.crop_size["width"])
    if not getattr(processor, "do_resize", False):
        return None, crop_size
    given = {name: side for name, side in dict(processor.size).items() if side is not None}
    if set(given) == {"height", "width"}:
        return (given["height"], given["width"]), crop_size
    if set(given) != {"shortest_edge"}:
        raise ValueError(f"InputPipeline cannot honour size={given} of {type(processor).__name__}")
    shorter, crop_pct = given["shortest_edge"], getattr(processor, "crop_pct", None)
    if crop_pct is None:
        return shorter, crop_size
    if shorter >= _CONVNEXT_NO_CROP:
        return (shorter, shorter), crop_size
    return int(shorter / crop_pct), (shorter, shorter)


def _read_normalization(processor: Any) -> dict[str, tuple[float, ...]]:
    """The fields `mean` and `std`, on the scale of pixels / 255 whatever the processor's own scale is."""
    normalizes = getattr(processor, "do_normalize", False)
    mean = processor.image_mean if normalizes else [0.0] * len(processor.image_mean or (0, 0, 0))
    std = processor.image_std if normalizes else [1.0] * len(mean)
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", False) else 255.0
    return {"mean": tuple(value / scale for value in mean), "std": tuple(value / scale for value in std)}


def processor_agrees(trainer: Any) -> bool | None:
    """Whether a `SmootTrainer`'s image processor does what its input pipeline does; `None` without a pipeline.

    Warns where it does not: what is published then gives other predictions than the numbers on its card.
    """
    if trainer.input_pipeline is None:
        return None
    wrong = _shortfall(trainer)
    if wrong is not None:
        logger.warning(
            f"{wrong}: with transformers alone nobody gets the evaluation's predictions. Give SmootTrainer "
            "processing_class=processor and input_pipeline=InputPipeline.from_image_processor(processor)"
        )
    return wrong is None


def _shortfall(trainer: Any) -> str | None:
    processor = trainer.processing_class
    if not hasattr(processor, "preprocess"):
        return "there is no image processor beside the model"
    try:
        agrees = trainer.input_pipeline.agrees_with(processor, _native_size(trainer))
    except Exception as error:  # its code may do anything with images that are not for it
        return f"{type(processor).__name__} does not take the evaluation's images ({first_line(error)})"
    return None if agrees else f"{type(processor).__name__} makes other pixels than the evaluation's input pipeline"


def _native_size(trainer: Any) -> tuple[int, int]:
    if trainer.mask_budget is not None:
        return trainer.mask_budget.image_size
    dataset = trainer.eval_dataset if trainer.train_dataset is None else trainer.train_dataset
    with random_state_kept():
        height, width = trainer.data_collator([dataset[0]])["pixel_values"].shape[-2:]
    return height, width
