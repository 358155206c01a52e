"""SmootMixin: the objective of SMOOT, SGT and standard training inside any Hugging Face Trainer."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from . import functional as SF
from .budgeted_trainer import BudgetedTrainer
from .clean_pass import compiled_as_the_model, forward
from .hub_trainer import HubTrainer
from .input_pipeline import InputPipeline
from .masked_step import masked_step
from .measuring_trainer import MeasuringTrainer
from .refusals import refuse_model_parallelism, refuse_unsupported, warn_of_own_loss
from .resumable_trainer import ResumableTrainer
from .sample_index import SAMPLE_IDX, check_class_labels, class_indices
from .saving_trainer import make_output_dir
from .tracking import TRACKERS, Tracking
from .training_args import SmootTrainingArguments

_NO_INDEX = (
    f"the training batch has no {SAMPLE_IDX!r}, by which K and augmentation are kept: train_dataset is a stream, or "
    "get_train_dataloader was replaced by one that returns something else than a DataLoader over self.train_dataset "
    "itself, in batches. Return one, or override _get_train_sampler or the data collator in its place"
)

# What SmootMixin does without asking the next class in line, and where a change of it belongs instead.
_REPLACED = {
    "compute_loss": "pass a loss of the logits and labels as compute_loss_func",
    "create_model_card": "pass what the card shall say to push_to_hub",
    "push_to_hub": "upload further files with huggingface_hub after it",
}


class SmootMixin(HubTrainer, BudgetedTrainer, MeasuringTrainer, ResumableTrainer):
    """Masks the least salient pixels and holds the prediction to what it was (Equations 1 to 6), in any `Trainer`.

    `class Mine(SmootMixin, TheirTrainer)` gives SMOOT to a class that derives from `transformers.Trainer`; `Mine` takes
    the arguments of both. `SmootTrainer` is this mixin on `Trainer` itself. For any image classifier whose output has
    `logits`. Each sample's index is attached to the training batches and taken off again: collators, transforms,
    metrics and callbacks need not know. Evaluation is the Trainer's own: no masking, and K does not move.

    What `TheirTrainer` overrides keeps working, except for the methods whose work is done here and nowhere else,
    `compute_loss`, `create_model_card` and `push_to_hub`: a class that has one of its own is refused when `Mine` is
    defined. `Mine` itself may override them and call `super()`; a `compute_loss` may add any term of the outputs and
    the parameters.
    A hook on a weight is called once a step, with the whole gradient. Hooks on modules are called in every pass:
    forward hooks for the clean and the masked images, backward hooks for the saliency as well. A `get_train_dataloader`
    of one's own may return any `DataLoader` over `self.train_dataset` itself that collates batches.

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
        TypeError: when a class is derived, where a method of its other parents would never run.
        ValueError: the model, the data or the hardware set-up would train silently wrong; see `refuse_unsupported`.
        SaveError: the output folder cannot be made.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        for parent in order[order.index(SmootMixin) + 1 : order.index(Trainer)]:
            hidden = _REPLACED & vars(parent).keys()
            if hidden and parent not in SmootMixin.__mro__:
                name = hidden.pop()
                raise TypeError(
                    f"{parent.__name__}.{name} would never run in {cls.__name__}, since SmootMixin has its own: "
                    f"{_REPLACED[name]}, or override {name} in {cls.__name__} and call super().{name}"
                )

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
        # Before the Trainer, which fails in accelerate's words where the processes are too few.
        refuse_model_parallelism(model, args.parallelism_config)
        make_output_dir(args)
        self.input_pipeline = input_pipeline
        super().__init__(model, args, *others, **more)
        # The loss below is normalised by the items of the whole accumulated batch, whatever the model declares.
        self.model_accepts_loss_kwargs = True
        # Some models (DeiT with its teacher's head) take no labels themselves; the loss below needs none of them to.
        self.label_names = self.label_names or ["labels"]
        self._own_loss_is_known = False
        self._clean_pass = compiled_as_the_model(self.accelerator)
        refuse_unsupported(self)
        if args.method != "standard" and self.train_dataset is not None:
            self.begin_mask_budget()
        if not TRACKERS.isdisjoint(args.report_to):
            self.add_callback(Tracking(self))

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
            return_outputs: return the model's own output (of the clean images) as well. In training its logits carry
                their graph, so that a `compute_loss` of one's own may add a term of them.
            num_items_in_batch: number of samples of the whole accumulated batch, which normalises the sum.

        Raises:
            ValueError: a batch without images or labels, or without `sample_idx` in training; labels that are not one
                whole number per sample; a model without logits.
        """
        inputs, label_name = dict(inputs), self.label_names[0]
        for name in ("pixel_values", label_name):
            if inputs.get(name) is None:
                raise ValueError(f"the batch has no {name!r}, only {sorted(inputs)}: let the data collator make it")
        labels = class_indices(inputs.pop(label_name), label_name)
        images = inputs.pop("pixel_values")
        sample_idx = inputs.pop(SAMPLE_IDX, None)
        is_training = model.training and torch.is_grad_enabled()
        if is_training:
            self._warn_of_own_loss_once(images, labels, inputs)
        if is_training and self.args.method != "standard":
            weights = self._loss_weights(return_outputs)
            loss, outputs = self._masked_loss(model, images, labels, sample_idx, inputs, num_items_in_batch, weights)
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
        weights: list[Tensor] | None,
    ) -> tuple[Tensor, Any]:
        """One step of Algorithm 2; returns the loss and the model's output on the clean images."""
        if sample_idx is None or self.mask_budget is None:
            raise ValueError(_NO_INDEX)
        args, budget, epoch = self.args, self.mask_budget, self.epoch_number()
        if images.shape[-2:] != budget.image_size:
            raise ValueError(
                "all training images must have one size, for K counts its pixels (resize them): got "
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
            weights=weights,
            clean_pass=self._clean_pass,
        )
        self._log_window.add(ce_loss=step.ce, kl_loss=step.kl, delta=step.delta)
        ce_loss = self._classification_loss(step.outputs, labels, step.ce, num_items_in_batch)
        loss = ce_loss + args.kl_weight * _batch_mean(step.kl, num_items_in_batch)
        self._budget_moves.add(sample_idx, step.delta, loss)
        return loss, step.outputs

    def _warn_of_own_loss_once(self, images: Tensor, labels: Tensor, others: dict[str, Any]) -> None:
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self._own_loss_is_known or self.compute_loss_func is not None or is_sharded:
            return
        self._own_loss_is_known = True
        if self.is_world_process_zero():
            warn_of_own_loss(self.model, self._resize(images), labels, self.label_names[0], others)

    def _loss_weights(self, return_outputs: bool) -> list[Tensor] | None:
        """The trained parameters, where nothing forbids to cut the backward passes down to what they need.

        A loss of the user's own may need the graph of the outputs; fp16 scales the loss so that its gradients do not
        vanish.
        """
        is_own = getattr(self.compute_loss, "__func__", None) is SmootMixin.compute_loss
        adds_to_loss = return_outputs or not is_own
        if adds_to_loss or self.compute_loss_func is not None or self.accelerator.scaler is not None:
            return None
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _resize(self, images: Tensor) -> Tensor:
        return images if self.input_pipeline is None else self.input_pipeline.resize(images)

    def _classification_loss(
        self, outputs: Any, labels: Tensor, ce: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        return _batch_mean(ce, num_items_in_batch)

    # --- what is reported ------------------------------------------------------------------------------------------

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
