"""Image classifiers: loading any of them, reading their logits, and the paper's convolutional network."""

from .classifier import load_image_processor, load_model
from .logits import LogitsModel
from .modeling_smoot_cnn import PaperCnnConfig, PaperCnnForImageClassification

__all__ = [
    "LogitsModel",
    "PaperCnnConfig",
    "PaperCnnForImageClassification",
    "load_image_processor",
    "load_model",
]
