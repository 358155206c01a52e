"""A Trainer whose evaluations may report how faithful the saliency is."""

import math

from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .evaluation import evaluate_faithfulness
from .evaluation_data import NothingToMeasureError, evenly_spread
from .input_pipeline import InputPipeline
from .refusals import refuse_evaluation_set

logger = logging.get_logger(__name__)


class MeasuringTrainer(Trainer):
    """Every evaluation gains `deletion_auc` where `args.deletion_auc_samples` asks for it."""

    input_pipeline: InputPipeline | None = None
    label_names: list[str]

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
            output.metrics[f"{metric_key_prefix}_deletion_auc"] = self._deletion_auc(dataloader)
        return output

    def _deletion_auc(self, dataloader: DataLoader) -> float:
        """Area under the deletion curve, in percent, over rows spread evenly over the evaluation set.

        The images are those that the evaluation itself has seen: the loader's rows, through its collator. NaN where the
        model predicts nothing or its saliency ranks nothing in any image, as in a run that has diverged.
        """
        refuse_evaluation_set(self.args, dataloader.dataset)
        try:
            return evaluate_faithfulness(
                self.model,
                evenly_spread(dataloader.dataset, self.args.deletion_auc_samples),
                curves=(),
                input_pipeline=self.input_pipeline,
                data_collator=dataloader.collate_fn,
                label_name=self.label_names[0],
                batch_size=self.args.eval_batch_size,
            ).deletion_auc
        except NothingToMeasureError as error:
            logger.warning(f"deletion_auc is NaN: {error}")
            return math.nan
