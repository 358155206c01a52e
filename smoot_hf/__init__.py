"""SMOOT for Hugging Face: a Trainer that makes saliency maps sharp and faithful."""

from . import functional
from .comparison import compare_faithfulness
from .convention import Convention
from .evaluation import Faithfulness, evaluate_faithfulness
from .input_pipeline import InputPipeline
from .mask_budget import MaskBudget
from .mixin import SmootMixin
from .models import PaperCnnConfig, PaperCnnForImageClassification
from .trainer import SmootTrainer
from .training_args import SmootTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "Convention",
    "Faithfulness",
    "InputPipeline",
    "MaskBudget",
    "PaperCnnConfig",
    "PaperCnnForImageClassification",
    "SmootMixin",
    "SmootTrainer",
    "SmootTrainingArguments",
    "compare_faithfulness",
    "evaluate_faithfulness",
    "functional",
]
