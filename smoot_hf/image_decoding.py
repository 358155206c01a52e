"""Stored images become uint8 arrays: what cannot be decoded is named by its row."""

import re
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from .data_columns import IMAGE, LABELS, PIXELS

_TO_GREY = {"L", "1"}
_TO_RGB = {"RGB", "P", "PA", "RGBA", "LA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def pixels_of(image: Image.Image, convert_rgb: bool) -> np.ndarray:
    """uint8 (C, H, W) of one image.

    Raises:
        ValueError: more than 8 bits per channel.
    """
    if image.mode not in _TO_GREY | _TO_RGB:
        raise ValueError(f"images of mode {image.mode!r} have more than 8 bits per channel: scale them to 8 bits first")
    is_grey = image.mode in _TO_GREY and not convert_rgb
    array = np.asarray(image.convert("L" if is_grey else "RGB"))
    return array[None] if is_grey else array.transpose(2, 0, 1)


def stored_image(value: dict[str, Any] | None, feature: datasets.Image, split: str, row: int) -> Image.Image:
    """The image that is stored as `value`.

    Raises:
        ValueError: there is none, or it cannot be decoded; naming the row and, where there is one, the file.
    """
    if value is None:
        raise ValueError(f"row {row} of split {split!r} has no image (null): remove it")
    try:
        return feature.decode_example(value)
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, struct.error
        reason = re.sub(r" <_io.*>", "", str(error)) or type(error).__name__  # the address of a buffer helps nobody
        where = f" ({value['path']})" if value.get("path") else ""
        raise ValueError(
            f"the image in row {row} of split {split!r}{where} cannot be decoded ({reason}): mend or remove it"
        ) from error


def decode_batch(
    batch: dict[str, list[Any]],
    rows: list[int],
    shape: tuple[int, int, int],
    convert_rgb: bool,
    feature: datasets.Image,
    split: str,
) -> pa.Table:
    """Undecoded rows (bytes or path) as the columns "pixel_values" and "labels".

    Raises:
        ValueError: an image that cannot be decoded, or is of another (channels, height, width) than `shape`.
    """
    images = (stored_image(value, feature, split, row) for value, row in zip(batch[IMAGE], rows, strict=True))
    arrays = [pixels_of(image, convert_rgb) for image in images]
    others = sorted({array.shape for array in arrays} - {shape})
    if others:
        raise ValueError(
            f"all images must have one size, found (channels, height, width) {shape} and {others[:3]}: resize the "
            "images beforehand, convert_rgb makes grey ones agree with coloured ones, or use a transform of your own"
        )
    pixels = pa.array(np.stack(arrays).ravel())
    for length in reversed(shape):
        pixels = pa.FixedSizeListArray.from_arrays(pixels, length)
    return pa.table({PIXELS: pixels, LABELS: pa.array(batch[LABELS], type=pa.int64())})
