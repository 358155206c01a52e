"""What is logged: averages over the logging window, and what a tracker shows once per evaluation."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.utils import make_grid
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, rewrite_logs
from transformers.utils import logging

from ..errors import first_line
from ..evaluation.attributions import attribute
from ..evaluation.ranked_batches import has_index
from ..functional import multi_label_target
from ..models.logits import LogitsModel
from ..models.state import is_run_together, model_device, model_dtype, untouched
from .mask_budget import MaskBudget


class LogWindow:
    """Sums of per-sample quantities since the last log; nothing waits for the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        # Tensors where the device alone knows the number.
        self._counts: dict[str, Tensor | int] = {}

    def add(self, is_counted: Tensor | None = None, **values: Tensor) -> None:
        """Take in a batch: (B,) per-sample values by name; detached here.

        Args:
            is_counted: bool (B,) on the device of the values, the samples that they are known of; `None`: all.
            **values: (B,) each.
        """
        for name, value in values.items():
            value = value.detach().float()
            count: Tensor | int = value.numel()
            if is_counted is not None:
                value, count = torch.where(is_counted, value, 0.0), is_counted.sum()
            total = value.sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + count

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the window and over all processes, which call this together; the window starts afresh.

        What was known of no sample is left out.
        """
        sums = self._sums
        counts = {name: torch.as_tensor(self._counts[name], device=total.device) for name, total in sums.items()}
        self._sums, self._counts = {}, {}
        if sums and accelerator.num_processes > 1:
            sums, counts = (accelerator.reduce(part, reduction="sum") for part in (sums, counts))
        return {name: (total / counts[name]).item() for name, total in sums.items() if counts[name].item()}


logger = logging.get_logger(__name__)

TRACKERS = frozenset({"tensorboard", "trackio", "wandb"})

GRID_IMAGES = 8
# Bounds of the side of an image in the grid, in pixels: digits of 8x8 must be seen, and event files stay small.
_SMALLEST_SIDE, _LARGEST_SIDE = 64, 128
# wandb takes no more.
_MOST_BINS = 512
# Five colours of matplotlib's magma, which this package does not import.
_MAGMA = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))


class Tracking(TrainerCallback):
    """Sends the histogram of K (`train/k`) and a saliency grid (`eval/saliency`) to the trackers after an evaluation.

    `SmootTrainer` adds it where `report_to` names TensorBoard, trackio or wandb. The grid shows the same images of the
    evaluated set every time, and below each the magnitude of the gradient of its label's logit. The main process alone
    does this; it leaves the model's modes and gradients and the random states as they were.

    Args:
        trainer: the `SmootTrainer`, whose reporting callbacks are written through.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        eval_dataloader: DataLoader | None = None,
        **_: Any,
    ) -> None:
        """After an evaluation, of each of several evaluation sets."""
        if not state.is_world_process_zero:
            return
        pictures = {}
        dataset: Any = getattr(eval_dataloader, "dataset", None)
        if is_run_together(self.trainer):
            logger.warning_once("no saliency grid for the tracker: one process alone cannot run a sharded model")
        elif eval_dataloader is not None and has_index(dataset) and len(dataset):
            try:
                pictures[_tag(metrics or {})] = self._grid(eval_dataloader)
            except Exception as error:
                # Whatever a model or a data set raises here (one without labels a KeyError): the training goes on.
                logger.warning_once(f"no saliency grid for the tracker: {first_line(error)}")
        else:
            logger.warning_once("no saliency grid for the tracker: the evaluation set has no length and index")
        histogram = None if self.trainer.mask_budget is None else histogram_of(self.trainer.mask_budget)
        for reporter in self.trainer.callback_handler.callbacks:
            if isinstance(reporter, TensorBoardCallback):
                _to_tensorboard(reporter.tb_writer, histogram, pictures, state.global_step)
            elif isinstance(reporter, WandbCallback):
                import wandb

                _to_run(wandb, histogram, pictures, state.global_step)
            elif isinstance(reporter, TrackioCallback):
                import trackio

                _to_run(trackio, histogram, pictures, state.global_step)

    def _grid(self, dataloader: DataLoader) -> Tensor:
        """The saliency grid of some rows, spread evenly over the evaluated set; uint8 (3, height, width)."""
        dataset: Any = dataloader.dataset
        count = min(GRID_IMAGES, len(dataset))
        rows = [place * len(dataset) // count for place in range(count)]
        model, pipeline = self.trainer.model, self.trainer.input_pipeline
        device = model_device(model)
        # Transforms of the caller's own may draw random numbers, and so does a loader when it begins.
        with untouched(model):
            chosen = DataLoader(Subset(dataset, rows), batch_size=count, collate_fn=dataloader.collate_fn)
            batch = next(iter(chosen))
            pixels = batch["pixel_values"].to(device)
            labels = batch[self.trainer.label_names[0]].to(device)
            images = pixels if pipeline is None else pipeline.normalize(pixels)
            images = images.to(model_dtype(model) or images.dtype)
            scorer = LogitsModel(model, pipeline and pipeline.resize)
            if labels.ndim == 2:
                labels = _target_of_weights(scorer, images, labels)
            saliency = attribute(scorer, images, labels, torch.tensor(rows), batch_size=count)
        # Normalised images have lost their scale: each is shown between its own darkest and brightest value.
        shown = pixels.float() / 255 if pipeline is not None else _stretched(pixels.float())
        return saliency_grid(shown.cpu(), saliency.float().cpu())


def _target_of_weights(model: LogitsModel, images: Tensor, weights: Tensor) -> Tensor:
    """What is explained of labels (B, classes): an image's labels, or of soft ones the class of the largest weight."""
    if not model.is_multi_label:
        return weights.argmax(dim=1)
    with torch.no_grad():
        return multi_label_target(model(images), weights)


def saliency_grid(images: Tensor, saliency: Tensor) -> Tensor:
    """A row of images, and below each its saliency as a share of its own maximum, from black to pale yellow.

    Args:
        images: (n, C, H, W) in [0, 1]; other than three channels are shown in grey.
        saliency: (n, H, W), at least 0.

    Returns:
        uint8 (3, height, width).
    """
    images = images if images.shape[1] == 3 else images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    share = saliency.nan_to_num() / saliency.nan_to_num().amax(dim=(1, 2), keepdim=True).clamp_min(1e-38)
    cells = _scaled(torch.cat([images, _coloured(share)]))
    grid = make_grid(cells, nrow=len(images), padding=2, pad_value=1.0)
    return (grid * 255).round().clamp(0, 255).to(torch.uint8)


def histogram_of(budget: MaskBudget) -> tuple[np.ndarray, np.ndarray]:
    """How many training images have which K: counts int64 (bins,) and edges (bins + 1,), halfway between whole numbers.

    One bin for each K from the lowest to the highest; where these are more than 512, each holds as many as needed.
    """
    counts = budget.histogram.cpu().numpy()
    used = np.flatnonzero(counts)
    lowest, span = int(used[0]), int(used[-1] - used[0] + 1)
    width = math.ceil(span / _MOST_BINS)
    bins = math.ceil(span / width)
    padded = np.zeros(bins * width, dtype=np.int64)
    padded[:span] = counts[lowest : lowest + span]
    edges = budget.k_min + lowest + np.arange(bins + 1) * width - 0.5
    return padded.reshape(bins, width).sum(axis=1), edges


def _tag(metrics: dict[str, float]) -> str:
    """`eval/saliency`; with several evaluation sets, `eval/<name>_saliency`, as their metrics are called."""
    prefix = next((name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")), "eval")
    return next(iter(rewrite_logs({f"{prefix}_saliency": None})))


def _stretched(images: Tensor) -> Tensor:
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(1e-12)


def _coloured(share: Tensor) -> Tensor:
    """(n, H, W) in [0, 1] -> (n, 3, H, W): linear between the colours."""
    colours = torch.tensor(_MAGMA) / 255
    place = share * (len(colours) - 1)
    below = place.floor().long().clamp(0, len(colours) - 2)
    part = (place - below)[..., None]
    return (colours[below] * (1 - part) + colours[below + 1] * part).permute(0, 3, 1, 2)


def _scaled(cells: Tensor) -> Tensor:
    """Small cells in larger pixels, large ones averaged."""
    height, width = cells.shape[2:]
    if max(height, width) > _LARGEST_SIDE:
        scale = _LARGEST_SIDE / max(height, width)
        return F.interpolate(cells, (max(1, round(height * scale)), max(1, round(width * scale))), mode="area")
    times = math.ceil(_SMALLEST_SIDE / max(height, width))
    return cells.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)


def _to_tensorboard(
    writer: Any, histogram: tuple[np.ndarray, np.ndarray] | None, pictures: dict[str, Tensor], step: int
) -> None:
    for tag, picture in pictures.items():
        writer.add_image(tag, picture, step)
    if histogram is not None:
        counts, edges = histogram
        middle = (edges[:-1] + edges[1:]) / 2
        # TensorBoard knows right edges only: an empty first bin says where the second begins.
        writer.add_histogram_raw(
            "train/k",
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float((counts * middle).sum()),
            sum_squares=float((counts * middle**2).sum()),
            bucket_limits=edges.tolist(),
            bucket_counts=[0, *counts.tolist()],
            global_step=step,
        )
    writer.flush()


def _to_run(
    tracker: Any, histogram: tuple[np.ndarray, np.ndarray] | None, pictures: dict[str, Tensor], step: int
) -> None:
    """To wandb or trackio, which share their interface; the step goes as the Trainer's own callbacks send it."""
    shown: dict[str, Any] = {
        tag: tracker.Image(picture.permute(1, 2, 0).numpy(), caption="images and their saliency, gradient of the label")
        for tag, picture in pictures.items()
    }
    if histogram is not None:
        shown["train/k"] = tracker.Histogram(np_histogram=histogram)
    if shown:
        tracker.log({**shown, "train/global_step": step})
