"""SmootTrainer and SmootMixin: the objective of SMOOT, SGT and standard training inside any Hugging Face Trainer."""

import math
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data.input_pipeline import InputPipeline
from ..evaluation.faithfulness import evaluate_faithfulness
from ..evaluation.ranked_batches import NothingToMeasureError, evenly_spread
from ..fingerprint import is_identified
from ..models.logits import is_multi_label
from ..models.state import random_state_kept
from .allocator import freed_memory_kept
from .arguments import SmootTrainingArguments
from .checkpoint_folder import RunIdentity, require_one_content
from .checkpoints import make_output_dir
from .checks import (
    check_mixed_labels,
    check_private_methods,
    refuse_evaluation_set,
    refuse_unsupported,
    warn_of_own_loss,
    warn_of_still_budget,
    warn_of_unseen_samples,
)
from .clean_pass import compiled_as_the_model, forward, runs_cuda_graphs
from .indexing import IndexingTrainer
from .labels import check_evaluation_labels, read_labels
from .mask_budget import BudgetMoves, MaskBudget
from .mask_budget_file import MASK_BUDGET_NAME
from .masked_share import in_masked_share
from .masked_step import masked_step
from .parallelism import refuse_model_parallelism
from .problem import problem_of
from .sample_index import SAMPLE_IDX, SAMPLE_ROWS
from .sharded_mask_budget import ShardedMaskBudget
from .trackers import TRACKERS, LogWindow, Tracking

logger = logging.get_logger(__name__)

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


class SmootMixin(IndexingTrainer):
    """Adds training by SMOOT and SGT (Equations 1 to 6) to any class that derives from `transformers.Trainer`.

    Define `class Mine(SmootMixin, TheirTrainer)`; `Mine` takes the arguments of both. `SmootTrainer` is this mixin on
    `Trainer` itself. The model may be any image classifier whose output has `logits`. The trainer attaches the index
    of each sample to the training batches and removes it before the model sees them, so that collators, transforms,
    metrics and callbacks need not know of it. Evaluation works as in `Trainer`: nothing is masked, and K does not move.

    Methods that `TheirTrainer` overrides keep working, with three exceptions: `compute_loss`, `create_model_card` and
    `push_to_hub` are implemented here, so that those of `TheirTrainer` would never run. If it has one of them, defining
    `Mine` raises a `TypeError`. `Mine` itself may override them and call `super()`; a `compute_loss` may add any term
    of the outputs and of the parameters. A `get_train_dataloader` of one's own may return any `DataLoader` over
    `self.train_dataset` itself that collates batches.

    A hook on a weight is called once in each step, with the whole gradient. Hooks on modules are called in every pass:
    forward hooks for the clean and for the masked images, backward hooks for the saliency as well.

    Args:
        model: as in `Trainer`.
        args: `SmootTrainingArguments`, or plain `TrainingArguments` for the defaults of SMOOT.
        *others: further arguments of `Trainer`, by position.
        input_pipeline: augments, normalises and resizes uint8 images in batches on the device. The mask then acts on
            the images at their native resolution, before they are resized. Without a pipeline it acts on the
            `pixel_values` of the data set.
        **more: further arguments of `Trainer`, by name.

    Attributes:
        mask_budget: `MaskBudget` of the training set, the same on every process; `ShardedMaskBudget` where
            `mask_budget_sharded` asks for it and there are several processes; `None` for standard training.

    Raises:
        TypeError: when a class is derived and a method of one of its other parents would never run.
        ValueError: this model, data or hardware would give wrong results without an error; see `refuse_unsupported`.
        SaveError: the output folder cannot be made.
    """

    args: SmootTrainingArguments
    data_collator: Any
    label_names: list[str]
    mask_budget: Any
    _epoch: int | None = None

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
        self.mask_budget = None
        # The model and the training set that K belongs to.
        self._budgeted: tuple[Any, Any] = (None, None)
        super().__init__(model, args, *others, input_pipeline=input_pipeline, **more)
        self._log_window = LogWindow()
        self._budget_moves = BudgetMoves(self.accelerator, self._move_budget)
        self.add_callback(self._budget_moves)
        # The loss below is normalised by the items of the whole accumulated batch, whatever the model declares.
        self.model_accepts_loss_kwargs = True
        # Some models (DeiT with its teacher's head) take no labels themselves; the loss below needs none of them to.
        self.label_names = self.label_names or ["labels"]
        self._first_batch_is_seen = False
        self._clean_pass = compiled_as_the_model(self.accelerator)
        refuse_unsupported(self)
        if args.method != "standard" and self.train_dataset is not None:
            self.begin_mask_budget()
        if not TRACKERS.isdisjoint(args.report_to):
            self.add_callback(Tracking(self))

    # --- K of every sample -------------------------------------------------------------------------------------------

    def begin_mask_budget(self) -> None:
        """K of every training sample at its start; looks at the first sample for the size of the images."""
        dataset, collator = self.indexed_parts(self.train_dataset, "training")
        with random_state_kept():
            first = collator(dataset.first())
        # Weak: a search frees the model of each trial.
        self._budgeted = weakref.ref(self.model), self.train_dataset
        image_size = first["pixel_values"].shape[-2:]
        is_sharded = self.args.mask_budget_sharded and self.accelerator.num_processes > 1
        self.mask_budget = (ShardedMaskBudget if is_sharded else MaskBudget).for_training(
            self.args.settings, len(dataset), image_size, self.dataset_fingerprint(), self.args.device
        )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Every training starts here: by `train`, for each trial of a search, and again for each batch size tried."""
        self.args.check_smoot_fields()
        refuse_unsupported(self)
        if self.args.method == "standard" or self.train_dataset is None:
            self.mask_budget = None
        else:
            model, dataset = self._budgeted
            if self.mask_budget is not None and model() is self.model and dataset is self.train_dataset:
                self.mask_budget.forget_visits()
            else:
                self.begin_mask_budget()
        self._log_window = LogWindow()
        self._budget_moves.begin(self.accelerator)
        with freed_memory_kept(self.args.keep_freed_memory and self.args.device.type == "cpu"):
            return super()._inner_training_loop(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.mask_budget is not None:
            path = os.path.join(output_dir, MASK_BUDGET_NAME) if self.args.should_save else None
            self.mask_budget.save(path, self._origin(self.run_identity))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.mask_budget is None:
            return
        path, content = os.path.join(checkpoint, MASK_BUDGET_NAME), None
        if os.path.isfile(path):
            content = self.mask_budget.restore(path, self._origin(RunIdentity.load(checkpoint)))
            if not is_identified(self.mask_budget.dataset_fingerprint):
                logger.warning(
                    f"K is taken from {path} row by row, but nothing identifies the training set: it must be the same, "
                    "in the same order. Give the data set an attribute `fingerprint`, a string that changes with its "
                    "content, and it is checked"
                )
        else:
            logger.warning(f"{checkpoint} has no {MASK_BUDGET_NAME}: K starts afresh at mask_ratio")
            self.begin_mask_budget()
        require_one_content(content, path, self.accelerator)

    def _origin(self, run: RunIdentity | None) -> dict[str, Any]:
        """What stands in the file of K beside the data: which training it is of, and after how many of its steps."""
        run_id = None if run is None else run.run_id
        return {"run_id": run_id, "seed": self.args.seed, "global_step": self.state.global_step}

    def _move_budget(self, sample_idx: Tensor, delta: Tensor) -> None:
        """Move K by what all processes saw, on each of them alike, once the optimizer has stepped."""
        budget = self.mask_budget
        assert budget is not None
        settings = self.args.settings
        moved = budget.update(sample_idx, delta, settings.step_in_positions(budget.image_size), settings.rounding)
        is_chosen = in_masked_share(settings, self.epoch_number(), sample_idx)
        self._log_window.add(is_chosen, k_up=moved > 0, k_down=moved < 0)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        # The Trainer counts what stands under "labels" alone, and each weight of a class as an item.
        name = self.label_names[0]
        named = [
            {"labels": batch[name].flatten(1)[:, 0] if batch[name].ndim > 1 else batch[name]}
            for batch in batch_samples
            if name in batch
        ]
        return super()._get_num_items_in_batch(named, device)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if epoch == 0 and self.mask_budget is not None and self.is_world_process_zero():
            warn_of_still_budget(self.mask_budget, self.args.settings, self.state.num_train_epochs)
        # The Trainer's state holds a fraction that an epoch cut short leaves behind; this is the number itself.
        self._epoch = epoch
        super()._run_epoch(*args, epoch=epoch, **kwargs)
        is_whole = self.state.epoch is not None and float(self.state.epoch).is_integer()
        if self.args.num_train_samples and self.mask_budget is not None and is_whole:
            warn_of_unseen_samples(self.mask_budget)

    def epoch_number(self) -> int:
        """Number of the epoch under way, from 0.

        Raises:
            RuntimeError: the installed transformers runs its epochs in another way.
        """
        if self.is_in_train and self._epoch is None:
            raise RuntimeError("this version of transformers does not tell SmootTrainer its epochs: K would never move")
        return self._epoch or 0

    # --- the step --------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.input_pipeline is None or "pixel_values" not in inputs:
            return inputs
        if not self.model.training:
            images = self.input_pipeline.prepare_evaluation(inputs["pixel_values"])
        elif SAMPLE_IDX in inputs:
            epoch, name = self.epoch_number(), self.label_names[0]
            images = self.input_pipeline.prepare_training(inputs["pixel_values"], inputs[SAMPLE_IDX], epoch)
            if self.input_pipeline.mix is not None:
                images, inputs[name] = self.input_pipeline.mix(images, inputs[name])
        else:
            raise ValueError(_NO_INDEX)
        # DeepSpeed's engine holds the weights themselves in bf16, and the Trainer casts what they are to take.
        return {**inputs, "pixel_values": self._prepare_input(images)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The cross-entropy; when training with sgt or smoot, plus the KL term of the masked images (Equation 5).

        Args:
            model: as in `Trainer`.
            inputs: the batch, on the device.
            return_outputs: return the model's own output (of the clean images) as well. In training its logits carry
                their graph, so that a `compute_loss` of one's own may add a term of them.
            num_items_in_batch: number of samples of the whole accumulated batch, which normalises the sum.

        Raises:
            ValueError: a batch without images or labels, or without `sample_idx` in training; labels of another kind
                than the model's; a model without logits.
        """
        inputs, label_name = dict(inputs), self.label_names[0]
        for name in ("pixel_values", label_name):
            if inputs.get(name) is None:
                raise ValueError(f"the batch has no {name!r}, only {sorted(inputs)}: let the data collator make it")
        labels = read_labels(inputs.pop(label_name), label_name, is_multi_label(self.model))
        images = inputs.pop("pixel_values")
        sample_idx, rows = inputs.pop(SAMPLE_IDX, None), inputs.pop(SAMPLE_ROWS, None)
        is_training = model.training and torch.is_grad_enabled()
        if is_training:
            self._look_at_first_batch(images, labels, inputs)
        if is_training and self.args.settings.masks_at(self.state.global_step):
            weights = self._loss_weights(return_outputs)
            loss, outputs = self._masked_loss(
                model, images, labels, sample_idx, rows, inputs, num_items_in_batch, weights
            )
        else:
            # In evaluation the pipeline has resized already, as the image processor does.
            outputs, logits = forward(model, self._resize(images) if is_training else images, inputs)
            if not is_training:
                check_evaluation_labels(labels, logits.shape[1], is_multi_label(self.model))
            ce = problem_of(self.model).loss(logits, labels, self.args.label_smoothing_factor)
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
        rows: list[int] | None,
        others: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        weights: list[Tensor] | None,
    ) -> tuple[Tensor, Any]:
        """One step of Algorithm 2; returns the loss and the model's output on the clean images."""
        if sample_idx is None or self.mask_budget is None:
            raise ValueError(_NO_INDEX)
        settings, budget, epoch = self.args.settings, self.mask_budget, self.epoch_number()
        if images.shape[-2:] != budget.image_size:
            raise ValueError(
                f"all training images must have one size, for K counts its {budget.unit} (resize them): got "
                f"{tuple(images.shape[-2:])} after {budget.image_size}"
            )
        budget.begin_epoch(epoch)

        is_chosen = None if rows is None else in_masked_share(settings, epoch, torch.tensor(rows))
        step = masked_step(
            model,
            images,
            labels,
            sample_idx,
            budget.read(sample_idx),
            epoch,
            settings,
            resize=None if self.input_pipeline is None else self.input_pipeline.resize,
            other_inputs=others,
            saliency_model=self.model,
            weights=weights,
            clean_pass=self._clean_pass,
            is_chosen=is_chosen,
        )
        self._log_window.add(ce_loss=step.ce)
        self._log_window.add(in_masked_share(settings, epoch, sample_idx), kl_loss=step.kl, delta=step.delta)
        ce_loss = self._classification_loss(step.outputs, labels, step.ce, num_items_in_batch)
        loss = ce_loss + settings.kl_factor * _batch_mean(step.kl, num_items_in_batch)
        self._budget_moves.add(sample_idx, step.delta, loss)
        return loss, step.outputs

    def _look_at_first_batch(self, images: Tensor, labels: Tensor, others: dict[str, Any]) -> None:
        """What is looked at once, since it waits for the device: labels that were mixed, and a loss of the model's."""
        if self._first_batch_is_seen:
            return
        self._first_batch_is_seen = True
        check_mixed_labels(self.input_pipeline, labels, is_multi_label(self.model))
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.compute_loss_func is None and not is_sharded and self.is_world_process_zero():
            warn_of_own_loss(self.model, self._resize(images), labels, self.label_names[0], others)

    def _loss_weights(self, return_outputs: bool) -> list[Tensor] | None:
        """The trained parameters, where nothing forbids to cut the backward passes down to what they need.

        A loss of the user's own may need the graph of the outputs; fp16 scales the loss so that its gradients do not
        vanish; a CUDA graph writes the gradients of the masked view over those of the clean one.
        """
        is_own = getattr(self.compute_loss, "__func__", None) is SmootMixin.compute_loss
        adds_to_loss = return_outputs or not is_own
        scales = self.accelerator.scaler is not None
        if adds_to_loss or scales or self.compute_loss_func is not None or runs_cuda_graphs(self.accelerator):
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

        The images are those that the evaluation itself has seen: the loader's rows, through its collator. What is
        removed are the cells that training masks. NaN where the model predicts nothing or its saliency ranks nothing in
        any image, as in a run that has diverged.
        """
        refuse_evaluation_set(self.args, dataloader.dataset)
        try:
            return evaluate_faithfulness(
                self.model,
                evenly_spread(dataloader.dataset, self.args.deletion_auc_samples),
                curves=(),
                cell=self.args.mask_cell,
                input_pipeline=self.input_pipeline,
                data_collator=dataloader.collate_fn,
                label_name=self.label_names[0],
                batch_size=self.args.eval_batch_size,
            ).deletion_auc
        except NothingToMeasureError as error:
            logger.warning(f"deletion_auc is NaN: {error}")
            return math.nan


def _batch_mean(per_sample: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Mean over the batch, or this micro-batch's share of the mean over the whole accumulated batch."""
    return per_sample.mean() if num_items_in_batch is None else per_sample.sum() / num_items_in_batch


class SmootTrainer(SmootMixin, Trainer):
    """A `Trainer` with the objective of SMOOT, SGT and standard training (Equations 1 to 6).

    It takes the place of `transformers.Trainer` and has its arguments, and one more, `input_pipeline`. `SmootMixin`
    says what it does, and gives the same to a trainer class of one's own.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        input_pipeline: InputPipeline | None = None,
        **of_newer_trainers: Any,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            input_pipeline=input_pipeline,
            **of_newer_trainers,
        )


# At import: nothing may be trained with a Trainer that would not call what is overridden above.
check_private_methods()
