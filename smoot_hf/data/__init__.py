"""From data sets on the Hub or in folders to batches that a model takes."""

from .dataset import load_image_dataset
from .decoded_images import DecodedImages, decode_images
from .input_pipeline import InputPipeline
from .planted_evidence import PlantedImages, plant_splits, planted_digits

__all__ = [
    "DecodedImages",
    "InputPipeline",
    "PlantedImages",
    "decode_images",
    "load_image_dataset",
    "plant_splits",
    "planted_digits",
]
