"""A Trainer whose evaluations may report how faithful the saliency is."""

import math
from typing import Any

from torch.utils.data import DataLoader, Subset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .evaluation import evaluate_faithfulness
from .evaluation_data import NothingRankedError
from .input_pipeline import InputPipeline
from .refusals import refuse_evaluation_set

logger = logging.get_logger(__name__)


class MeasuringTrainer(Trainer):
    """Every evaluation gains `deletion_auc` where `args.deletion_auc_samples` asks for it."""

    input_pipeline: InputPipeline | None = None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, and the area under the deletion curve."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.args.deletion_auc_samples and description == "Evaluation":
            output.metrics[f"{metric_key_prefix}_deletion_auc"] = self._deletion_auc(dataloader.dataset)
        return output

    def _deletion_auc(self, dataset: Any) -> float:
        """Area under the deletion curve, in percent, over rows spread evenly over the evaluation set.

        NaN where in none of the images the saliency ranks the pixels.
        """
        refuse_evaluation_set(self.args, dataset)
        count = min(self.args.deletion_auc_samples, len(dataset))
        subset = Subset(dataset, [row * len(dataset) // count for row in range(count)])
        try:
            return evaluate_faithfulness(
                self.model, subset, curves=(), input_pipeline=self.input_pipeline, batch_size=self.args.eval_batch_size
            ).deletion_auc
        except NothingRankedError as error:
            # What has diverged has no saliency. The training goes on, as it does with a loss that is NaN.
            logger.warning(f"deletion_auc is NaN: {error}")
            return math.nan
