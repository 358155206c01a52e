"""The sizes of the images of a data set, read from the heads of their files."""

import io
from collections.abc import Iterator

import datasets
from datasets import Dataset, DatasetDict
from PIL import ExifTags, Image

from .dataset import IMAGE
from .input_pipeline import InputPipeline

# EXIF orientations of photographs that lie on their side.
_ON_THE_SIDE = {5, 6, 7, 8}
_ROWS = 1000


def must_be_resized(dataset: DatasetDict, pipeline: InputPipeline) -> bool:
    """Whether images are to be brought to the size of a model's input before the mask, as photographs are.

    They are where they have several sizes, or more pixels than the input. Smaller images of one size keep it: there the
    mask acts on the pixels that exist, and resizing comes after it, as the paper has it for CIFAR.

    Args:
        dataset: undecoded images, from `load_image_dataset`.
        pipeline: of the model's image processor.

    Raises:
        ValueError: images of several sizes, and the image processor says no size for all.
    """
    first, sizes = None, (size for split in dataset.values() for size in image_sizes(split))
    for height, width in sizes:
        first = first or (height, width)
        if pipeline.input_size is None and (height, width) != first:
            raise ValueError(
                f"the images have several sizes, such as {first[0]}x{first[1]} and {height}x{width}, and the image "
                "processor of the model says none that they could be brought to: set image_size (--image_size)"
            )
        if pipeline.input_size is not None:
            input_height, input_width = pipeline.input_size
            if (height, width) != first or height * width > input_height * input_width:
                return True
    return False


def image_sizes(split: Dataset) -> Iterator[tuple[int, int]]:
    """(height, width) of every image, upright, in order; those whose head cannot be read are left out."""
    undecoded = split.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False))
    for table in undecoded.with_format("arrow").iter(_ROWS):
        for value in table[IMAGE].to_pylist():
            try:
                source = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
                with Image.open(source) as image:
                    width, height = image.size
                    if width != height and image.getexif().get(ExifTags.Base.Orientation) in _ON_THE_SIDE:
                        width, height = height, width
            except Exception:  # as in `decode_image`, which names it
                continue
            yield height, width
