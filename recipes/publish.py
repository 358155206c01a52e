"""The end of a run: the model card with what is measured for it and, where it was asked for, the push to the Hub."""

from pathlib import Path
from typing import Any

from flags import RecipeArguments
from torch.utils.data import Subset
from transformers.utils import logging

from smoot_hf import Faithfulness, SmootTrainer, SmootTrainingArguments, evaluate_faithfulness
from smoot_hf.fingerprint import hub_revision
from smoot_hf.functional.removal import Fill
from smoot_hf.hub_trainer import PushError
from smoot_hf.saving_trainer import first_line

logger = logging.get_logger(__name__)

# The two fills of the tables: the fill moves the AUC as much as a training method does.
_FILLS: tuple[Fill, ...] = ("corner", "mean")


def publish(trainer: SmootTrainer, args: SmootTrainingArguments, recipe: RecipeArguments) -> None:
    """Write card, figures and results.json into the run's folder, and push it where `push_to_hub` says so.

    Where faithfulness cannot be measured, a warning says why, and the card goes without.

    Raises:
        PushError: what the Hub lacks, now or since a push during training; the model is saved by then.
    """
    # Of a local folder its name alone: the rest is nobody's business.
    card: dict[str, Any] = {"dataset": Path(recipe.dataset).name if Path(recipe.dataset).is_dir() else recipe.dataset}
    if trainer.is_world_process_zero():
        try:
            card["faithfulness"] = measure(trainer, args, recipe)
        except (ValueError, RuntimeError) as error:
            logger.warning(f"the card has no faithfulness, which could not be measured: {first_line(error)}")
        on_hub = hub_revision(trainer.train_dataset)
        card["dataset_tags"] = on_hub and on_hub[0]
    if not args.push_to_hub:
        trainer.create_model_card(**card)
        return
    trainer.push_to_hub(**card)
    if trainer.failed_pushes:
        raise PushError("; ".join(trainer.failed_pushes.values()))


def measure(trainer: SmootTrainer, args: SmootTrainingArguments, recipe: RecipeArguments) -> list[Faithfulness]:
    """Faithfulness on up to `card_samples` test images, spread evenly, by the library's convention with two fills."""
    test = trainer.eval_dataset
    count = min(recipe.card_samples, len(test))
    rows = Subset(test, [row * len(test) // count for row in range(count)])
    return [
        evaluate_faithfulness(
            trainer.model,
            rows,
            fill=fill,
            input_pipeline=trainer.input_pipeline,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
        )
        for fill in (_FILLS if count else ())
    ]
