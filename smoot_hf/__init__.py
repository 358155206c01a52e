"""SMOOT for Hugging Face: a Trainer that makes saliency maps sharp and faithful."""

from . import functional
from .input_pipeline import InputPipeline
from .mask_budget import MaskBudget
from .models import PaperCnnConfig, PaperCnnForImageClassification
from .trainer import SmootTrainer
from .training_args import SmootTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "InputPipeline",
    "MaskBudget",
    "PaperCnnConfig",
    "PaperCnnForImageClassification",
    "SmootTrainer",
    "SmootTrainingArguments",
    "functional",
]
