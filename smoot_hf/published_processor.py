"""Does the image processor that is published beside a model do what the model was evaluated with?"""

from typing import Any

from transformers.utils import logging

from .random_state import random_state_kept
from .saving_trainer import first_line

logger = logging.get_logger(__name__)


def processor_agrees(trainer: Any) -> bool | None:
    """Whether a `SmootTrainer`'s image processor does what its input pipeline does; `None` without a pipeline.

    Warns where it does not: what is published then gives other predictions than the numbers on its card.
    """
    if trainer.input_pipeline is None:
        return None
    wrong = _shortfall(trainer)
    if wrong is not None:
        logger.warning(
            f"{wrong}: with transformers alone nobody gets the evaluation's predictions. Give SmootTrainer "
            "processing_class=processor and input_pipeline=InputPipeline.from_image_processor(processor)"
        )
    return wrong is None


def _shortfall(trainer: Any) -> str | None:
    processor = trainer.processing_class
    if not hasattr(processor, "preprocess"):
        return "there is no image processor beside the model"
    try:
        agrees = trainer.input_pipeline.agrees_with(processor, _native_size(trainer))
    except Exception as error:  # its code may do anything with images that are not for it
        return f"{type(processor).__name__} does not take the evaluation's images ({first_line(error)})"
    return None if agrees else f"{type(processor).__name__} makes other pixels than the evaluation's input pipeline"


def _native_size(trainer: Any) -> tuple[int, int]:
    if trainer.mask_budget is not None:
        return trainer.mask_budget.image_size
    dataset = trainer.eval_dataset if trainer.train_dataset is None else trainer.train_dataset
    with random_state_kept():
        height, width = trainer.data_collator([dataset[0]])["pixel_values"].shape[-2:]
    return height, width
