"""SmootTrainer: the objective of SMOOT, SGT and standard training inside the Hugging Face Trainer."""

import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from . import functional as SF
from .budget_moves import BudgetMoves
from .clean_pass import compiled_as_the_model, forward
from .evaluation import evaluate_faithfulness
from .fingerprint import dataset_fingerprint
from .hub_trainer import HubTrainer
from .indexed_trainer import IndexedTrainer
from .input_pipeline import InputPipeline
from .mask_budget import MaskBudget
from .masked_step import masked_step
from .random_state import random_state_kept
from .refusals import refuse_evaluation_set, refuse_unsupported
from .resumable_trainer import ResumableTrainer
from .sample_index import SAMPLE_IDX, check_class_labels
from .saving_trainer import make_output_dir
from .tracking import TRACKERS, Tracking
from .training_args import SmootTrainingArguments
from .training_log import LogWindow

logger = logging.get_logger(__name__)

MASK_BUDGET_NAME = "mask_budget.safetensors"

_NO_INDEX = (
    f"the training batch has no {SAMPLE_IDX!r}, by which K and augmentation are kept: train_dataset is a stream, or "
    "get_train_dataloader was replaced by one that does not attach it. Override _get_train_sampler or the data "
    "collator in its place"
)


class SmootTrainer(HubTrainer, IndexedTrainer, ResumableTrainer):
    """A `Trainer` that masks the least salient pixels and holds the prediction to what it was (Equations 1 to 6).

    Takes the place of `transformers.Trainer` for any image classifier whose output has `logits`. The trainer itself
    attaches each sample's index to the training batches and takes it off again: collators, transforms, metrics and
    callbacks need not know. Evaluation is the Trainer's own: no masking, and K does not move.

    Args:
        model: as in `Trainer`.
        args: `SmootTrainingArguments`, or plain `TrainingArguments` for the defaults of SMOOT.
        *others: as in `Trainer`.
        input_pipeline: augments, normalises and resizes uint8 images in batches on the device, so that masks live at
            the images' native resolution; without it the data set's own `pixel_values` are masked.
        **more: as in `Trainer`.

    Attributes:
        mask_budget: `MaskBudget` of the training set, the same on every process; `None` for standard training.

    Raises:
        ValueError: the model, the data or the hardware set-up would train silently wrong; see `refuse_unsupported`.
        SaveError: the output folder cannot be made.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        input_pipeline: InputPipeline | None = None,
        **more: Any,
    ) -> None:
        if args is None:
            args = SmootTrainingArguments(output_dir="tmp_trainer")
        elif not isinstance(args, SmootTrainingArguments):
            args = SmootTrainingArguments.from_training_arguments(args)
        make_output_dir(args)
        self.input_pipeline = input_pipeline
        self.mask_budget: MaskBudget | None = None
        super().__init__(model, args, *others, **more)
        # The loss below is normalised by the items of the whole accumulated batch, whatever the model declares.
        self.model_accepts_loss_kwargs = True
        # Some models (DeiT with its teacher's head) take no labels themselves; the loss below needs none of them to.
        self.label_names = self.label_names or ["labels"]
        self._log_window = LogWindow()
        self._budgeted: tuple[Any, Any] = (None, None)
        self._budget_moves = BudgetMoves(self.accelerator, self._move_budget)
        self.add_callback(self._budget_moves)
        self._clean_pass = compiled_as_the_model(self.accelerator)
        refuse_unsupported(self)
        if args.method != "standard" and self.train_dataset is not None:
            self.mask_budget = self._fresh_mask_budget()
        if not TRACKERS.isdisjoint(args.report_to):
            self.add_callback(Tracking(self))

    # --- the mask budget -------------------------------------------------------------------------------------------

    def _fresh_mask_budget(self) -> MaskBudget:
        """K of every training sample at its start; looks at the first sample for the size of the images."""
        dataset, collator = self.indexed_parts(self.train_dataset, "training")
        with random_state_kept():
            first = collator(dataset.__getitems__([0]))
        self._budgeted = weakref.ref(self.model), self.train_dataset  # weak: a search frees the model of each trial
        return MaskBudget.for_training(
            self.args, len(dataset), first["pixel_values"].shape[-2:], dataset_fingerprint(self.train_dataset)
        )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Every training starts here: by `train`, for each trial of a search, and again for each batch size tried."""
        self.args.check_smoot_fields()
        if self.args.method == "standard" or self.train_dataset is None:
            self.mask_budget = None
        else:
            refuse_unsupported(self)
            model, dataset = self._budgeted
            if self.mask_budget is not None and model() is self.model and dataset is self.train_dataset:
                self.mask_budget.forget_visits()
            else:
                self.mask_budget = self._fresh_mask_budget()
        self._log_window = LogWindow()
        self._budget_moves.begin(self.accelerator)
        return super()._inner_training_loop(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.mask_budget is not None and self.args.should_save:
            self.mask_budget.save(os.path.join(output_dir, MASK_BUDGET_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.mask_budget is None:
            return
        path = os.path.join(checkpoint, MASK_BUDGET_NAME)
        if os.path.isfile(path):
            self.mask_budget.restore(path)
        else:
            logger.warning(f"{checkpoint} has no {MASK_BUDGET_NAME}: K starts afresh at mask_ratio")
            self.mask_budget = self._fresh_mask_budget()

    # --- the step --------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.input_pipeline is None or "pixel_values" not in inputs:
            return inputs
        if not self.model.training:
            images = self.input_pipeline.prepare_evaluation(inputs["pixel_values"])
        elif SAMPLE_IDX in inputs:
            epoch = self.epoch_number()
            images = self.input_pipeline.prepare_training(inputs["pixel_values"], inputs[SAMPLE_IDX], epoch)
        else:
            raise ValueError(_NO_INDEX)
        return {**inputs, "pixel_values": images}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Cross-entropy, and in training by sgt or smoot the KL term of the masked images (Equation 5).

        Args:
            model: as in `Trainer`.
            inputs: the batch, on the device.
            return_outputs: return the model's own output (of the clean images) as well.
            num_items_in_batch: number of samples of the whole accumulated batch, which normalises the sum.

        Raises:
            ValueError: a batch without images or labels, or without `sample_idx` in training; a model without logits.
        """
        inputs, label_name = dict(inputs), self.label_names[0]
        for name in ("pixel_values", label_name):
            if inputs.get(name) is None:
                raise ValueError(f"the batch has no {name!r}, only {sorted(inputs)}")
        labels = inputs.pop(label_name)
        images = inputs.pop("pixel_values")
        sample_idx = inputs.pop(SAMPLE_IDX, None)
        is_training = model.training and torch.is_grad_enabled()
        if is_training and self.args.method != "standard":
            loss, outputs = self._masked_loss(model, images, labels, sample_idx, inputs, num_items_in_batch)
        else:
            # In evaluation the pipeline has resized already, as the image processor does.
            outputs, logits = forward(model, self._resize(images) if is_training else images, inputs)
            if not is_training:
                check_class_labels(labels, logits.shape[1])
            ce = SF.classification_loss(logits, labels, self.args.label_smoothing_factor)
            loss = self._classification_loss(outputs, labels, ce, num_items_in_batch)
            if is_training:
                self._log_window.add(ce_loss=ce)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes what was summed over all items
        return (loss, outputs) if return_outputs else loss

    def _masked_loss(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        sample_idx: Tensor | None,
        others: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Any]:
        """One step of Algorithm 2; returns the loss and the model's output on the clean images."""
        if sample_idx is None or self.mask_budget is None:
            raise ValueError(_NO_INDEX)
        args, budget, epoch = self.args, self.mask_budget, self.epoch_number()
        if images.shape[-2:] != budget.image_size:
            raise ValueError(
                "all training images must have one size, for K counts its pixels: got "
                f"{tuple(images.shape[-2:])} after {budget.image_size}"
            )
        budget.begin_epoch(epoch)

        step = masked_step(
            model,
            images,
            labels,
            sample_idx,
            budget.read(sample_idx),
            epoch,
            args,
            resize=None if self.input_pipeline is None else self.input_pipeline.resize,
            other_inputs=others,
            saliency_model=self.model,
            weights=self._loss_weights(),
            clean_pass=self._clean_pass,
        )
        self._log_window.add(ce_loss=step.ce, kl_loss=step.kl, delta=step.delta)
        ce_loss = self._classification_loss(step.outputs, labels, step.ce, num_items_in_batch)
        loss = ce_loss + args.kl_weight * _batch_mean(step.kl, num_items_in_batch)
        self._budget_moves.add(sample_idx, step.delta, loss)
        return loss, step.outputs

    def _loss_weights(self) -> list[Tensor] | None:
        """The trained parameters, where nothing forbids to take saliency from the loss' own backward pass.

        A loss of the user's own is another one; fp16 scales the loss so that its gradients do not vanish.
        """
        if self.compute_loss_func is not None or self.accelerator.scaler is not None:
            return None
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _resize(self, images: Tensor) -> Tensor:
        return images if self.input_pipeline is None else self.input_pipeline.resize(images)

    def _move_budget(self, sample_idx: Tensor, delta: Tensor) -> None:
        """Move K by what all processes saw, on each of them alike, once the optimizer has stepped."""
        budget = self.mask_budget
        assert budget is not None
        moved = budget.update(sample_idx, delta, self.args.step_in_pixels(budget.image_size), self.args.rounding)
        self._log_window.add(k_up=moved > 0, k_down=moved < 0)

    def _classification_loss(
        self, outputs: Any, labels: Tensor, ce: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        return _batch_mean(ce, num_items_in_batch)

    # --- what is reported ------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; evaluation gains `deletion_auc` where `deletion_auc_samples` asks for it."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.args.deletion_auc_samples and description == "Evaluation":
            output.metrics[f"{metric_key_prefix}_deletion_auc"] = self._deletion_auc(dataloader.dataset)
        return output

    def _deletion_auc(self, dataset: Any) -> float:
        """Area under the deletion curve, in percent, over rows spread evenly over the evaluation set."""
        refuse_evaluation_set(self.args, dataset)
        count = min(self.args.deletion_auc_samples, len(dataset))
        subset = Subset(dataset, [row * len(dataset) // count for row in range(count)])
        return evaluate_faithfulness(
            self.model, subset, curves=(), input_pipeline=self.input_pipeline, batch_size=self.args.eval_batch_size
        ).deletion_auc

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; training logs gain the parts of the loss and the statistics of K."""
        if "loss" in logs:
            logs.update(self._log_window.drain(self.accelerator))
        if self.mask_budget is not None and ("loss" in logs or "train_loss" in logs):
            logs.update(self.mask_budget.statistics())
        super().log(logs, start_time)


def _batch_mean(per_sample: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Mean over the batch, or this micro-batch's share of the mean over the whole accumulated batch."""
    return per_sample.mean() if num_items_in_batch is None else per_sample.sum() / num_items_in_batch
