"""One run of a campaign: a small network trained in this process, then judged; no Trainer, no files but the result.

`train` is the loop of `SmootTrainer` with an AdamW of its own at a constant rate and without clipping: the library's
`masked_step` and `MaskBudget` in tens of lines. A test holds it to the Trainer's weights and K, to the last bit.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import set_seed

from .. import functional as SF
from ..evaluation.diff_roar import diff_roar
from ..models import PaperCnnConfig, PaperCnnForImageClassification
from ..models.logits import MULTI_LABEL
from ..training import MaskBudget, SmootSettings, SmootTrainingArguments, masked_step
from ..training.allocator import freed_memory_kept
from ..training.clean_pass import CleanPass, shared_pass
from ..training.problem import problem_of
from .campaign_images import Data, Splits, make_splits
from .campaign_scores import judge, measure_briefly
from .small_cnn import SmallCnn

# What the loop below reads of the Trainer's own arguments; the others would change nothing, and are refused.
READ_OF_THE_TRAINER = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay")
_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adadelta": torch.optim.Adadelta}
# Keep the signs of a random walk, the order of the batches and a drawn mask apart from the fill, whose seed, epoch and
# samples are the same.
_WALK_STREAM, _SHUFFLE_STREAM, _OUTSIDE_STREAM = 0x77616C6B, 0x73687566, 0x6F757473


@dataclass(frozen=True)
class Controls:
    """Controls of a comparison, which are no options of the library, and the optimizer.

    Attributes:
        k_control: "shuffled": every image is masked by the K of another, in a new order each epoch, and its own K moves
            by what came of it. "random_walk": K moves by steps of the same size with random signs.
        gradient_penalty: weight of the squared norm of the cross-entropy's input gradient, mean over the images (double
            backpropagation; Ross and Doshi-Velez 2018): a known way to clear maps. With `method="standard"`.
        masked_outside_evidence: the K positions are drawn at random outside of the evidence: a mask that no saliency
            map could better. With `method="sgt"` and magnitudes, and a set whose evidence is known.
        optimizer: "adamw" of PyTorch, or "adadelta", which the paper trains its CNN with.
        adversarial_epsilon: train on images moved by this much, in normalised units, along the sign of that gradient
            (FGSM): the known-good way. With `method="standard"`.
    """

    k_control: Literal["own", "shuffled", "random_walk"] = "own"
    masked_outside_evidence: bool = False
    gradient_penalty: float = 0.0
    adversarial_epsilon: float = 0.0
    optimizer: Literal["adamw", "adadelta"] = "adamw"


@dataclass(frozen=True)
class Plan:
    """A run: the name of its setting, its seed, and by name what differs from the defaults."""

    name: str
    seed: int
    data: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    network: Literal["paper", "small"] = "paper"

    def arguments(self, output_dir: str = "unused") -> SmootTrainingArguments:
        """The arguments of the training, of which the loop reads the settings and `READ_OF_THE_TRAINER`.

        Raises:
            ValueError: a name that the loop does not read, or a value out of its range.
        """
        known = (set(_names(SmootSettings)) - {"seed"}) | set(READ_OF_THE_TRAINER) | set(_names(Controls))
        unknown = sorted(set(self.train) - known)
        if unknown:
            raise ValueError(
                f"{self.name}: a campaign does not read {unknown[0]!r}; it reads {', '.join(sorted(known))}"
            )
        values = {name: value for name, value in self.train.items() if name not in _names(Controls)}
        return SmootTrainingArguments(output_dir, seed=self.seed, use_cpu=True, report_to="none", **values)

    def controls(self) -> Controls:
        """The controls of the run.

        Raises:
            ValueError: a control that its method has no use for, or an unknown one.
        """
        controls = Controls(**{name: self.train[name] for name in _names(Controls) if name in self.train})
        method = self.train.get("method", "smoot")
        if controls.optimizer not in _OPTIMIZERS:
            raise ValueError(f"{self.name}: optimizer must be 'adamw' or 'adadelta', got {controls.optimizer!r}")
        if controls.k_control not in ("own", "shuffled", "random_walk"):
            raise ValueError(f"{self.name}: k_control must be 'own', 'shuffled' or 'random_walk'")
        if controls.masked_outside_evidence and self.train.get("masked_share", 1) != 1:
            raise ValueError(f"{self.name}: masked_outside_evidence needs masked_share=1")
        if controls.k_control != "own" and method != "smoot":
            raise ValueError(f"{self.name}: k_control={controls.k_control!r} needs method='smoot', whose K moves")
        plain = self.images().planted == "plain"
        if controls.masked_outside_evidence and (method != "sgt" or self.train.get("signed_saliency", False) or plain):
            raise ValueError(
                f"{self.name}: masked_outside_evidence needs method='sgt', ranking by magnitude and planted evidence"
            )
        is_plain = controls == Controls(optimizer=controls.optimizer)
        if self.images().planted == "several" and not (is_plain and self.network == "paper"):
            raise ValueError(f"{self.name}: planted='several' needs network='paper', and no control but the optimizer")
        if (controls.gradient_penalty or controls.adversarial_epsilon) and method != "standard":
            raise ValueError(f"{self.name}: gradient_penalty and adversarial_epsilon go with method='standard'")
        return controls

    def images(self) -> Data:
        """The data of the run.

        Raises:
            ValueError: an unknown entry.
        """
        unknown = sorted(set(self.data) - set(_names(Data)))
        if unknown:
            raise ValueError(f"data has no entry {unknown[0]!r}, only {', '.join(_names(Data))}")
        data = Data(**self.data)
        of_one_label = ("gap_samples", "history_samples", "tables", "roar_kept")
        measured = [name for name in of_one_label if data.planted == "several" and getattr(data, name)]
        if measured:
            raise ValueError(f"{measured[0]} is of images with one label: set it to 0 for planted='several'")
        return data


def run(plan: Plan, weights: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """Train and judge; the result as plain values, the settings left out.

    Args:
        plan: what to do.
        weights: a safetensors file that receives the trained network.
        device: where to compute, "cpu" or "cuda". The images, their order, the mask and its fill are the same on both;
            the weights at the start are drawn on the CPU.

    Returns:
        "accuracy" in percent; "localisation" by score, where there is evidence; "deletion" with the gap and the area of
        the plain curve; "diff_roar" where it was asked for; "k" in positions, `None` for standard training; "seconds"
        of training and of judging, by the clock and ("_cpu") of the processor.
    """
    args, controls, data = plan.arguments(), plan.controls(), plan.images()
    splits = make_splits(data, plan.seed)
    set_seed(args.seed)
    model = make_network(plan.network, splits).to(device)
    images = splits.pipeline.normalize(splits.train.pixel_values).to(device)
    history: list[dict[str, float]] = []

    def measure_epoch() -> None:
        if data.history_samples:
            history.append(measure_briefly(model, splits, data))

    clocks = [_clocks()]
    with freed_memory_kept(device == "cpu"):
        budget = train(
            model,
            images,
            splits.train.labels.to(device),
            args,
            controls,
            after_epoch=measure_epoch,
            evidence=splits.train.evidence.to(device),
        )
    clocks.append(_clocks())
    if weights is not None:
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, weights)
    result = judge(model, splits, data)
    if history:
        result["history"] = history
    if data.roar_kept:
        result["diff_roar"] = judge_anew(model, splits, plan)
    clocks.append(_clocks())
    (begun, cpu_begun), (trained, cpu_trained), (ended, cpu_ended) = clocks
    seconds = {"train": trained - begun, "judge": ended - trained}
    seconds |= {"train_cpu": cpu_trained - cpu_begun, "judge_cpu": cpu_ended - cpu_trained}
    return result | {"k": None if budget is None else budget.statistics(), "seconds": seconds}


def _clocks() -> tuple[float, float]:
    """Wall-clock time, and the processor time of this process, which others on the machine do not lengthen."""
    return time.perf_counter(), time.process_time()


def make_network(network: str, splits: Splits) -> nn.Module:
    """The paper's CNN or a small one, with random weights, in the layout that a CPU is faster in.

    Raises:
        ValueError: an unknown network.
    """
    several = splits.train.labels.ndim == 2
    classes = int(max(splits.train.labels.max(), splits.test.labels.max())) + 1
    if several:
        classes = splits.train.labels.shape[1]
    channels, height, width = splits.train.image_shape
    model: nn.Module
    if network == "paper":
        config = PaperCnnConfig(image_size=[height, width], num_channels=channels, num_labels=classes)
        config.problem_type = MULTI_LABEL if several else None
        model = PaperCnnForImageClassification(config)
    elif network == "small":
        model = SmallCnn(splits.train.image_shape, classes)
    else:
        raise ValueError(f"network must be 'paper' or 'small', got {network!r}")
    return model.to(memory_format=torch.channels_last)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    args: SmootTrainingArguments,
    controls: Controls,
    after_epoch: Callable[[], None] = lambda: None,
    evidence: Tensor | None = None,
) -> MaskBudget | None:
    """Train in place, at a constant rate, in an order that `args.seed` fixes.

    Args:
        model: with an output that has `logits`.
        images: float (N, C, H, W), normalised, on the device of the model, as are labels and evidence.
        labels: int64 (N,), or of a multi-label model (N, classes).
        args: method and settings.
        controls: of the comparison.
        after_epoch: called after every epoch; may put the model in eval mode.
        evidence: bool (N, H, W), which `controls.masked_outside_evidence` needs.

    Returns:
        K of every image; `None` for standard training.
    """
    settings, image_size = args.settings, (images.shape[2], images.shape[3])
    is_standard = settings.method == "standard"
    budget = None if is_standard else MaskBudget.for_training(settings, len(labels), image_size, device=images.device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = _OPTIMIZERS[controls.optimizer](weights, lr=args.learning_rate, weight_decay=args.weight_decay)
    global_step = 0
    for epoch in range(int(args.num_train_epochs)):
        model.train()
        if budget is not None:
            budget.begin_epoch(epoch)
            lender = _lenders(len(labels), epoch, args.seed, controls).to(images.device)
        order = epoch_order(len(labels), epoch, args.seed).to(images.device)
        for rows in order.split(args.per_device_train_batch_size):
            is_masked = settings.masks_at(global_step)
            global_step += 1
            if budget is None or not is_masked:
                loss = _standard_loss(model, images[rows], labels[rows], args, controls)
            else:
                k = budget.read(lender[rows])
                named: dict[str, Any] = {"weights": weights}
                if controls.masked_outside_evidence and evidence is not None:
                    noise = SF.counter_uniform(args.seed ^ _OUTSIDE_STREAM, epoch, rows, image_size)
                    named = {"clean_pass": partial(_pass_ranked_by, (evidence[rows] + noise)[:, None])}
                step = masked_step(model, images[rows], labels[rows], rows, k, epoch, settings, **named)
                loss = step.ce.mean() + settings.kl_factor * step.kl.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if budget is not None and is_masked:
                # A step whose loss is not finite says nothing of the mask.
                delta = torch.where(torch.isfinite(loss.detach()), step.delta, math.nan)
                if controls.k_control == "random_walk":
                    sign = SF.counter_uniform(args.seed ^ _WALK_STREAM, epoch, rows, (1,))[:, 0].sub(0.5).sign()
                    delta = delta.abs() * sign
                budget.update(rows, delta, settings.step_in_positions(image_size), settings.rounding)
        after_epoch()
    return budget


def _pass_ranked_by(ranks: Tensor, *args: Any) -> CleanPass:
    """The clean pass, with (B, 1, H, W) in place of the gradient that ranks the pixels."""
    return shared_pass(*args)._replace(gradient=ranks)


def epoch_order(count: int, epoch: int, seed: int) -> Tensor:
    """The order of the training images in an epoch: a permutation, the same for all methods of a seed."""
    return SF.counter_uniform(seed ^ _SHUFFLE_STREAM, epoch, torch.zeros(1, dtype=torch.int64), (count,))[0].argsort()


def _lenders(count: int, epoch: int, seed: int, controls: Controls) -> Tensor:
    """Whose K each image is masked by: its own, or in the control that of another."""
    if controls.k_control != "shuffled":
        return torch.arange(count)
    return epoch_order(count, epoch, ~seed)


def _standard_loss(
    model: nn.Module, images: Tensor, labels: Tensor, args: SmootTrainingArguments, controls: Controls
) -> Tensor:
    """Cross-entropy, or one of the positive controls."""
    if controls.adversarial_epsilon:
        gradient = _input_gradient(model, images, labels, keep=False)[1]
        images = images + controls.adversarial_epsilon * gradient.sign()
    if controls.gradient_penalty:
        ce, gradient = _input_gradient(model, images, labels, keep=True)
        return ce.mean() + controls.gradient_penalty * gradient.square().sum(dim=(1, 2, 3)).mean()
    return problem_of(model).loss(model(pixel_values=images).logits, labels, args.label_smoothing_factor).mean()


def _input_gradient(model: nn.Module, images: Tensor, labels: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B,) and its gradient like the images; with `keep` both can be differentiated."""
    leaf = images.clone().requires_grad_()
    ce = F.cross_entropy(model(pixel_values=leaf).logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(ce.sum(), leaf, create_graph=keep)
    return ce, gradient


def judge_anew(model: nn.Module, splits: Splits, plan: Plan) -> dict[str, float]:
    """DiffROAR by a fresh network of the same kind, trained for as long as `plan` says, in the standard way."""
    own = {name: plan.train[name] for name in READ_OF_THE_TRAINER if name in plan.train}
    args = replace(plan, train={**own, "method": "standard"}).arguments()

    def train_judge(images: Tensor, labels: Tensor) -> nn.Module:
        set_seed(args.seed)
        network = make_network(plan.network, splits).to(images.device)
        train(network, images, labels, args, Controls())
        return network

    device = next(model.parameters()).device
    shown, tested = (
        (splits.pipeline.normalize(one.pixel_values.to(device)), one.labels.to(device))
        for one in (splits.train, splits.test)
    )
    found = diff_roar(model, train_judge, shown, tested, plan.images().roar_kept, seed=plan.seed)
    return {"top": found.top, "bottom": found.bottom, "difference": found.difference, "kept": found.kept}


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]
