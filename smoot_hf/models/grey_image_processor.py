"""The image processor of models that take one channel: it converts colours to grey.

`pipeline` gives every image in three channels. This file travels with every model saved beside it, for machines
without smoot_hf (`trust_remote_code=True`): it imports transformers alone, and nothing beside it.
"""

from typing import Any

from transformers import ViTImageProcessor
from transformers.image_utils import ImageType, get_image_type


class GreyImageProcessor(ViTImageProcessor):
    """A `ViTImageProcessor` for one channel: resizes, rescales and normalises what Pillow makes grey (ITU-R 601-2).

    A grey image that was turned into RGB comes back unchanged, to the grey value. Arrays and tensors say nothing of
    their colours: they must have one channel already.
    """

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """As `ViTImageProcessor.process_image`: one image to a uint8 tensor (1, H, W).

        Raises:
            ValueError: an array or tensor of another number of channels.
        """
        if get_image_type(image) == ImageType.PIL:
            image = image.convert("L")
        pixels = super().process_image(image, *args, **kwargs)
        if pixels.shape[0] != 1:
            raise ValueError(
                f"the model takes images of one channel, got an array of {pixels.shape[0]}: give Pillow images, which "
                "are made grey"
            )
        return pixels
