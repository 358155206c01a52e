"""Stored images become uint8 arrays: what cannot be decoded is named by its row and file."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from .data_columns import IMAGE, LABELS, PIXELS

# What shows through where an image is transparent. Drawings on nothing are mostly dark, and on paper white.
BACKGROUND = "white"

_TO_GREY = {"L", "1"}
_TO_RGB = {"RGB", "P", "PA", "RGBA", "LA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


class Decoding(NamedTuple):
    """How images are decoded. The cache of decoded images is kept by these values, not by the code.

    Attributes:
        convert_rgb: three channels for grey images as well.
        image_size: side of the square that images are resized and cropped to, in pixels; `None`: as they are.
        background: colour that shows through transparency.
    """

    convert_rgb: bool = False
    image_size: int | None = None
    background: str = BACKGROUND


def pixels_of(image: Image.Image, decoding: Decoding) -> np.ndarray:
    """uint8 (C, H, W) of one image; see `decode_images`.

    Raises:
        ValueError: more than 8 bits per channel.
    """
    if image.mode not in _TO_GREY | _TO_RGB:
        raise ValueError(f"its mode {image.mode!r} has more than 8 bits per channel, scale it to 8 bits")
    is_grey = image.mode in _TO_GREY and not decoding.convert_rgb
    flat = on_background(image, decoding.background).convert("L" if is_grey else "RGB")
    if decoding.image_size is not None:
        flat = ImageOps.fit(flat, (decoding.image_size, decoding.image_size), Image.Resampling.BILINEAR)
    array = np.asarray(flat)
    return array[None] if is_grey else array.transpose(2, 0, 1)


def on_background(image: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """An image without transparency: laid on the background where it has some, the same image where it has none."""
    if not image.has_transparency_data:
        return image
    # Pillow converts premultiplied grey by way of grey alone.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    laid = Image.alpha_composite(Image.new("RGBA", image.size, background), rgba)
    return laid.convert("L" if image.mode in _TO_GREY else "RGB")


def decode_image(
    value: dict[str, Any] | None, decoding: Decoding, feature: datasets.Image, split: str, row: int
) -> np.ndarray:
    """uint8 (C, H, W) of the image that is stored as `value`, upright as its EXIF data say.

    Raises:
        ValueError: there is none, or it cannot be decoded; naming the row and, where there is one, the file.
    """
    if value is None:
        raise ValueError(f"row {row} of split {split!r} has no image (null): remove it")
    try:
        return pixels_of(feature.decode_example(_with_bytes(value)), decoding)
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, struct.error
        reason = re.sub(r" <_io.*>", "", str(error)) or type(error).__name__  # the address of a buffer helps nobody
        raise ValueError(f"{_place(value, split, row)} cannot be decoded ({reason}): mend or remove it") from error


def decode_batch(
    batch: dict[str, list[Any]],
    rows: list[int],
    shape: tuple[int, int, int],
    decoding: Decoding,
    feature: datasets.Image,
    split: str,
) -> pa.Table:
    """Undecoded rows (bytes or path) as the columns "pixel_values" and "labels".

    Args:
        batch: the rows.
        rows: their numbers in the split.
        shape: (channels, height, width) that every image must have.
        decoding: how.
        feature: that decodes an image.
        split: its name, for errors.

    Raises:
        ValueError: an image that cannot be decoded, or is of another (channels, height, width) than `shape`.
    """
    arrays = []
    for value, row in zip(batch[IMAGE], rows, strict=True):
        array = decode_image(value, decoding, feature, split, row)
        if array.shape != shape:
            advice = (
                "set convert_rgb (--convert_rgb), which gives grey images three channels as well"
                if array.shape[1:] == shape[1:]
                else "set image_size (--image_size), the side of a square that all are resized and cropped to"
            )
            raise ValueError(
                f"all images must have one size: the first is {shape} (channels, height, width), "
                f"{_place(value, split, row)} is {array.shape}; {advice}"
            )
        arrays.append(array)
    pixels = pa.array(np.stack(arrays).ravel())
    for length in reversed(shape):
        pixels = pa.FixedSizeListArray.from_arrays(pixels, length)
    return pa.table({PIXELS: pixels, LABELS: pa.array(batch[LABELS], type=pa.int64())})


def _with_bytes(value: dict[str, Any]) -> dict[str, Any]:
    """The stored image with the content of its file, which HF Datasets leaves open where it cannot be decoded."""
    if value["bytes"] is None and os.path.isfile(value["path"] or ""):
        return value | {"bytes": Path(value["path"]).read_bytes()}
    return value


def _place(value: dict[str, Any], split: str, row: int) -> str:
    where = f" ({value['path']})" if value.get("path") else ""
    return f"the image in row {row} of split {split!r}{where}"
