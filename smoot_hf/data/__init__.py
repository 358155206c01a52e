"""Image data sets: loading them, decoding their images once, and preparing batches for a model."""

from .dataset import load_image_dataset
from .decoded_images import DecodedImages, decode_images
from .input_pipeline import InputPipeline
from .mixing import Mixing
from .planted_evidence import PlantedImages, plant_images, plant_splits, planted_digits

__all__ = [
    "DecodedImages",
    "InputPipeline",
    "Mixing",
    "PlantedImages",
    "decode_images",
    "load_image_dataset",
    "plant_images",
    "plant_splits",
    "planted_digits",
]
