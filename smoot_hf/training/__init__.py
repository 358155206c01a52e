"""Training by SMOOT, SGT or in the standard way: one step, K of every sample, and the Trainer that holds both."""

from .arguments import SmootTrainingArguments
from .mask_budget import MaskBudget
from .masked_step import masked_step
from .settings import SmootSettings
from .trainer import SmootMixin, SmootTrainer

__all__ = ["MaskBudget", "SmootMixin", "SmootSettings", "SmootTrainer", "SmootTrainingArguments", "masked_step"]
