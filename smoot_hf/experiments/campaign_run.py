"""One run of a campaign: a small network trained in this process, then judged; no Trainer, no files but the result.

`train` is the loop of `SmootTrainer` with an AdamW of its own at a constant rate and without clipping: the library's
`masked_step` and `MaskBudget` in tens of lines. A test holds it to the Trainer's weights and K, to the last bit.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import set_seed

from .. import functional as SF
from ..data import (
    DecodedImages,
    InputPipeline,
    PlantedImages,
    decode_images,
    load_image_dataset,
    plant_splits,
)
from ..data.planted_evidence import LabelledPixels
from ..data.sample_photos import photos_of_scikit_learn
from ..evaluation import evaluate_faithfulness, evaluate_localisation
from ..evaluation.convention import resolve_convention
from ..evaluation.diff_roar import diff_roar
from ..models import PaperCnnConfig, PaperCnnForImageClassification
from ..training import MaskBudget, SmootSettings, SmootTrainingArguments, masked_step
from ..training.allocator import freed_memory_kept
from ..training.masked_step import CleanPass, shared_pass
from .small_cnn import SmallCnn

# What the loop below reads of the Trainer's own arguments; the others would change nothing, and are refused.
READ_OF_THE_TRAINER = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay")
# Keep the signs of a random walk, the order of the batches and a drawn mask apart from the fill, whose seed, epoch and
# samples are the same.
_WALK_STREAM, _SHUFFLE_STREAM, _OUTSIDE_STREAM = 0x77616C6B, 0x73687566, 0x6F757473


@dataclass(frozen=True)
class Data:
    """What a campaign trains and judges on.

    Attributes:
        planted: a set of `smoot_hf.data.planted_evidence`, or "plain": the images as they are, without evidence.
        source: "digits", a Hub id or a local directory of images with classes.
        partners: the same, for "pair".
        photos: the same, for "on-photo"; "scikit-learn" takes crops of the two photos that it ships.
        labelled: whose labels "pair" carries.
        train_samples: training images, drawn anew for every seed; 0: all.
        test_samples: test images, the same for every seed; 0: all.
        gap_samples: test images whose deletion curves are measured; 0: none.
        history_samples: test images on which accuracy and localisation are measured after every epoch; 0: none.
        tables: also measure the deletion areas by which the paper's tables could have been made, see `paper_tables`.
        roar_kept: fraction of the positions that DiffROAR leaves a fresh network to learn from, twice as long as
            standard training takes; 0: not measured.
    """

    planted: Literal["plain", "block", "block-fixed", "pair", "on-photo", "decoy"] = "block"
    source: str = "digits"
    partners: str = ""
    photos: str = "scikit-learn"
    labelled: Literal["first", "second"] = "first"
    train_samples: int = 0
    test_samples: int = 0
    gap_samples: int = 1000
    history_samples: int = 0
    tables: bool = False
    roar_kept: float = 0.0


@dataclass(frozen=True)
class Controls:
    """Controls of a comparison, which are no options of the library.

    Attributes:
        k_control: "shuffled": every image is masked by the K of another, in a new order each epoch, and its own K moves
            by what came of it. "random_walk": K moves by steps of the same size with random signs.
        gradient_penalty: weight of the squared norm of the cross-entropy's input gradient, mean over the images (double
            backpropagation; Ross and Doshi-Velez 2018): a known way to clear maps. With `method="standard"`.
        masked_outside_evidence: the K positions are drawn at random outside of the evidence: a mask that no saliency
            map could better. With `method="sgt"` and magnitudes, and a set whose evidence is known.
        adversarial_epsilon: train on images moved by this much, in normalised units, along the sign of that gradient
            (FGSM): the known-good way. With `method="standard"`.
    """

    k_control: Literal["own", "shuffled", "random_walk"] = "own"
    masked_outside_evidence: bool = False
    gradient_penalty: float = 0.0
    adversarial_epsilon: float = 0.0


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
        if controls.k_control not in ("own", "shuffled", "random_walk"):
            raise ValueError(f"{self.name}: k_control must be 'own', 'shuffled' or 'random_walk'")
        if controls.k_control != "own" and method != "smoot":
            raise ValueError(f"{self.name}: k_control={controls.k_control!r} needs method='smoot', whose K moves")
        plain = self.images().planted == "plain"
        if controls.masked_outside_evidence and (method != "sgt" or self.train.get("signed_saliency", False) or plain):
            raise ValueError(
                f"{self.name}: masked_outside_evidence needs method='sgt', ranking by magnitude and planted evidence"
            )
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
        return Data(**self.data)


class Splits(NamedTuple):
    """Training and test images, uint8, and what normalises them."""

    train: Any
    test: Any
    pipeline: InputPipeline


def run(plan: Plan, weights: Path | None = None) -> dict[str, Any]:
    """Train and judge; the result as plain values, the settings left out.

    Args:
        plan: what to do.
        weights: a safetensors file that receives the trained network.

    Returns:
        "accuracy" in percent; "localisation" by score, where there is evidence; "deletion" with the gap and the area of
        the plain curve; "diff_roar" where it was asked for; "k" in positions, `None` for standard training; "seconds"
        of training and of judging, by the clock and ("_cpu") of the processor.
        after_epoch()
    """
    args, controls, data = plan.arguments(), plan.controls(), plan.images()
    splits = make_splits(data, plan.seed)
    set_seed(args.seed)
    model = make_network(plan.network, splits)
    images = splits.pipeline.normalize(splits.train.pixel_values)
    history: list[dict[str, float]] = []

    def measure_epoch() -> None:
        if data.history_samples:
            history.append(measure_briefly(model, splits, data))

    clocks = [_clocks()]
    with freed_memory_kept():
        budget = train(
            model,
            images,
            splits.train.labels,
            args,
            controls,
            after_epoch=measure_epoch,
            evidence=splits.train.evidence,
        )
    clocks.append(_clocks())
    if weights is not None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
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
    classes = int(max(splits.train.labels.max(), splits.test.labels.max())) + 1
    channels, height, width = splits.train.image_shape
    model: nn.Module
    if network == "paper":
        config = PaperCnnConfig(image_size=[height, width], num_channels=channels, num_labels=classes)
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
    """Train in place, by AdamW at a constant rate, in an order that `args.seed` fixes.

    Args:
        model: with an output that has `logits`.
        images: float (N, C, H, W), normalised.
        labels: int64 (N,).
        args: method and settings.
        controls: of the comparison.
        after_epoch: called after every epoch; may put the model in eval mode.
        evidence: bool (N, H, W), which `controls.masked_outside_evidence` needs.

    Returns:
        K of every image; `None` for standard training.
    """
    settings, image_size = args.settings, (images.shape[2], images.shape[3])
    is_standard = settings.method == "standard"
    budget = None if is_standard else MaskBudget.for_training(settings, len(labels), image_size)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=args.weight_decay)
    for epoch in range(int(args.num_train_epochs)):
        model.train()
        if budget is not None:
            budget.begin_epoch(epoch)
            lender = _lenders(len(labels), epoch, args.seed, controls)
        for rows in epoch_order(len(labels), epoch, args.seed).split(args.per_device_train_batch_size):
            if budget is None:
                loss = _standard_loss(model, images[rows], labels[rows], args, controls)
            else:
                k = budget.read(lender[rows])
                named: dict[str, Any] = {"weights": weights}
                if controls.masked_outside_evidence and evidence is not None:
                    noise = SF.counter_uniform(args.seed ^ _OUTSIDE_STREAM, epoch, rows, image_size)
                    named = {"clean_pass": partial(_pass_ranked_by, (evidence[rows] + noise)[:, None])}
                step = masked_step(model, images[rows], labels[rows], rows, k, epoch, settings, **named)
                loss = step.ce.mean() + settings.kl_weight * step.kl.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if budget is not None:
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
    return SF.classification_loss(model(pixel_values=images).logits, labels, args.label_smoothing_factor).mean()


def _input_gradient(model: nn.Module, images: Tensor, labels: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B,) and its gradient like the images; with `keep` both can be differentiated."""
    leaf = images.clone().requires_grad_()
    ce = F.cross_entropy(model(pixel_values=leaf).logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(ce.sum(), leaf, create_graph=keep)
    return ce, gradient


def judge(model: nn.Module, splits: Splits, data: Data) -> dict[str, Any]:
    """What is measured of a trained network; see `run`."""
    result: dict[str, Any] = {}
    if data.planted == "plain":
        result["accuracy"] = _accuracy(model, splits)
    else:
        found = evaluate_localisation(model, splits.test, input_pipeline=splits.pipeline).to_dict()
        result |= {"accuracy": found.pop("accuracy"), "localisation": found}
    if data.gap_samples:
        some = Subset(splits.test, range(min(data.gap_samples, len(splits.test))))
        curves = evaluate_faithfulness(
            model, some, curves=("least_salient_first",), input_pipeline=splits.pipeline
        ).to_dict()
        result["deletion"] = {name: curves[name] for name in ("gap", "gap_interval", "n", "convention")}
        result["deletion"]["auc"] = curves["deletion"]["auc"]
    if data.tables:
        result["tables"] = paper_tables(model, splits, data)
    return result


def paper_tables(model: nn.Module, splits: Splits, data: Data) -> dict[str, float]:
    """Deletion areas in percent by both presets and two fills, and by the score that rounds p_y to 1.

    The last, "paper corner float32", ranks by the gradient of a plain float32 log-softmax: where p_y is rounded to 1 it
    has no share of the label. "saturated" is the percentage of the images whose p_y is rounded to 1.
    """
    some = Subset(splits.test, range(min(data.gap_samples, len(splits.test))))
    areas = {
        f"{preset} {fill}": evaluate_faithfulness(
            model, some, convention=resolve_convention(preset, fill=fill), curves=(), input_pipeline=splits.pipeline
        ).deletion_auc
        for preset in ("paper", "default")
        for fill in ("corner", "mean")
    }
    areas["paper corner float32"] = evaluate_faithfulness(
        model, some, _float32_log_prob_map, convention="paper", curves=(), input_pipeline=splits.pipeline
    ).deletion_auc
    return areas | {"saturated": saturated_share(model, splits, data.gap_samples)}


def _float32_log_prob_map(model: Callable[[Tensor], Tensor], images: Tensor, target: Tensor) -> Tensor:
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.nll_loss(model(leaf).log_softmax(1), target, reduction="sum"), leaf)
    return SF.channel_mean(gradient, signed=False)


@torch.no_grad()
def saturated_share(model: nn.Module, splits: Splits, count: int) -> float:
    """Percentage of the first `count` test images whose softmax output of the label is 1 in float32."""
    model.eval()
    images, labels = splits.pipeline.normalize(splits.test.pixel_values[:count]), splits.test.labels[:count]
    outputs = torch.cat([model(pixel_values=batch).logits.softmax(1) for batch in images.split(256)])
    return 100 * float((outputs.gather(1, labels[:, None]) == 1).double().mean())


def measure_briefly(model: nn.Module, splits: Splits, data: Data) -> dict[str, float]:
    """Accuracy, saturated share and, where there is evidence, the null share of the top 10 %, on some test images."""
    count = min(data.history_samples, len(splits.test))
    found = {
        "saturated": saturated_share(model, splits, count),
        "accuracy": _accuracy(model, splits, count),
    }
    # In the first epochs it may be that no image is classified correctly, and then there is nothing to localise.
    if data.planted == "plain" or not found["accuracy"]:
        return found
    some = Subset(splits.test, range(count))
    local = evaluate_localisation(model, some, top=(0.1,), input_pipeline=splits.pipeline)
    return found | {"outside_0.1": local.outside[0.1].value}


def judge_anew(model: nn.Module, splits: Splits, plan: Plan) -> dict[str, float]:
    """DiffROAR by a fresh network of the same kind, trained for as long as `plan` says, in the standard way."""
    own = {name: plan.train[name] for name in READ_OF_THE_TRAINER if name in plan.train}
    args = replace(plan, train={**own, "method": "standard"}).arguments()

    def train_judge(images: Tensor, labels: Tensor) -> nn.Module:
        set_seed(args.seed)
        network = make_network(plan.network, splits)
        train(network, images, labels, args, Controls())
        return network

    shown, tested = ((splits.pipeline.normalize(one.pixel_values), one.labels) for one in (splits.train, splits.test))
    found = diff_roar(model, train_judge, shown, tested, plan.images().roar_kept, seed=plan.seed)
    return {"top": found.top, "bottom": found.bottom, "difference": found.difference, "kept": found.kept}


@torch.no_grad()
def _accuracy(model: nn.Module, splits: Splits, count: int | None = None) -> float:
    model.eval()
    images, labels = splits.pipeline.normalize(splits.test.pixel_values[:count]), splits.test.labels[:count]
    predicted = torch.cat([model(pixel_values=batch).logits.argmax(dim=1) for batch in images.split(256)])
    return 100 * float((predicted == labels).double().mean())


def make_splits(data: Data, seed: int) -> Splits:
    """The images of a run: of its seed the draw and the planting of the training images; the test images never change.

    Raises:
        ValueError: fewer images than are asked for, or an unknown set.
        OSError: the data cannot be loaded.
    """
    pixels = {split: load_pixels(data.source, split) for split in ("train", "test")}
    chosen = {
        "train": _some(pixels["train"], data.train_samples, seed, "train_samples"),
        "test": _some(pixels["test"], data.test_samples, 0, "test_samples"),
    }
    if data.planted == "plain":
        planted = [PlantedImages(*chosen[split], chosen[split][0][:, 0] < 0) for split in ("train", "test")]
    else:
        others = photos = None
        if data.planted == "pair":
            others = {split: load_pixels(data.partners, split) for split in ("train", "test")}
        if data.planted == "on-photo":
            photos = {split: _photos(data.photos, split) for split in ("train", "test")}
        planted = [
            plant_splits(data.planted, chosen, seed=of_split, others=others, photos=photos, labelled=data.labelled)[
                split
            ]
            for split, of_split in (("train", seed), ("test", 0))
        ]
    return Splits(planted[0], planted[1], InputPipeline(*planted[0].channel_statistics()))


@lru_cache(maxsize=8)
def load_pixels(source: str, split: str) -> LabelledPixels:
    """All images of a split, uint8 (N, C, H, W), and their labels; kept for the next run of this process."""
    rows = DecodedImages(decode_images(load_image_dataset(source))[split])
    batch = rows.__getitems__(range(len(rows)))
    return batch["pixel_values"], batch["labels"]


def _photos(source: str, split: str) -> Tensor:
    if source == "scikit-learn":
        return photos_of_scikit_learn(1000, 32, seed=int(split == "test"))
    return load_pixels(source, split)[0]


def _some(split: LabelledPixels, count: int, seed: int, argument: str) -> LabelledPixels:
    """`count` images drawn without replacement; 0: all in their order."""
    pixels, labels = split
    if count > len(labels):
        raise ValueError(f"{argument} is {count}, but there are {len(labels)} images")
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    return (pixels[rows], labels[rows]) if count else split


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]
