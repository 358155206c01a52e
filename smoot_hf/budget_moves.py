"""The moves of K that wait for the weights: K moves where the optimizer has stepped."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from .training_args import SmootTrainingArguments

_NOTHING_MASKED = (
    "method={method!r}, but no image of this step was masked: a compute_loss of your own has taken the place of "
    "SmootMixin's. Call super().compute_loss in it, or pass the loss of the logits as compute_loss_func"
)


class BudgetMoves(TrainerCallback):
    """Holds back the deltas of a step until its fate is known, then moves K by them, or not at all.

    A step whose loss is not finite, and one that the loss scaler of fp16 skips because its gradients overflowed, says
    nothing of the mask: no K of its samples moves, on any process. Nothing waits for the device.

    Args:
        accelerator: gathers the deltas of all processes, and holds the loss scaler where there is one.
        move: takes `sample_idx` int64 (B,) and `delta` (B,) of the whole step; delta is NaN where K must stay.
    """

    def __init__(self, accelerator: Accelerator, move: Callable[[Tensor, Tensor], None]) -> None:
        self.accelerator = accelerator
        self.move = move
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._scale: Tensor | None = None

    def add(self, sample_idx: Tensor, delta: Tensor, loss: Tensor) -> None:
        """Take in a batch: (B,) rows of the training set, (B,) deltas, and the batch's loss."""
        self._waiting.append((sample_idx, torch.where(torch.isfinite(loss.detach()), delta, math.nan)))

    def begin(self, accelerator: Accelerator) -> None:
        """Begin a training: drop what waits, for one that was broken off took no step with it.

        Args:
            accelerator: of this training; each trial of a search has one, and a loss scaler, of its own.
        """
        self.accelerator = accelerator
        self._waiting, self._scale = [], None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Keep the loss scale that the step is about to be taken with."""
        self._scale = self._loss_scale()

    def on_optimizer_step(self, args: SmootTrainingArguments, *_: Any, **__: Any) -> None:
        """Move K by everything that the step was made of.

        Raises:
            RuntimeError: nothing was masked, though `args.method` says so.
        """
        if args.method == "standard":
            return
        if not self._waiting:
            raise RuntimeError(_NOTHING_MASKED.format(method=args.method))
        batches, self._waiting = self._waiting, []
        if self.accelerator.num_processes > 1:
            batches = [self.accelerator.gather(batch) for batch in batches]
        sample_idx, delta = (torch.cat(column) for column in zip(*batches, strict=True))
        is_taken = torch.isfinite(delta).all()
        scale = self._loss_scale()
        if scale is not None and self._scale is not None:
            # The scaler lowers its scale after a step that it skipped, and only then. `optimizer_step_was_skipped` of
            # accelerate does not see a skip by a fused optimizer, the Trainer's default.
            is_taken &= scale >= self._scale
        self.move(sample_idx, torch.where(is_taken, delta, math.nan))

    def _loss_scale(self) -> Tensor | None:
        """What the loss is multiplied by at present, on the device; `None` without a scaler."""
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.scale(torch.ones((), device=self.accelerator.device))
