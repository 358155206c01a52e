"""One kind of model, trained again and again from the same weights; what a training left, and what it must equal."""

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CLASSES, QUICK, SIZE, StepRecorder, TinyImages, build, largest_difference
from plain_training import PlainTraining
from torch import nn

from smoot_hf import SmootTrainer, SmootTrainingArguments

TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DEIT = transformers.DeiTConfig(image_size=SIZE, patch_size=4, **TRANSFORMER, initializer_range=0.1, num_labels=CLASSES)
SWIN = transformers.SwinConfig(
    image_size=SIZE, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, num_labels=CLASSES
)
CONVNEXT = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
# The batch statistics of its last layers are of one pixel where images are smaller.
MOBILENET_SIZE = 16
MOBILENET = transformers.MobileNetV2Config(
    image_size=MOBILENET_SIZE, depth_multiplier=0.1, output_stride=8, num_labels=CLASSES
)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: build("vit", dropout=0.1),
    "DeiT": lambda: transformers.DeiTForImageClassification(deepcopy(DEIT)),
    "DeiT, teacher's head": lambda: transformers.DeiTForImageClassificationWithTeacher(deepcopy(DEIT)),
    "Swin": lambda: transformers.SwinForImageClassification(deepcopy(SWIN)),
    "ConvNeXt": lambda: transformers.ConvNextForImageClassification(deepcopy(CONVNEXT)),
    "ResNet": lambda: build("resnet"),
    "MobileNetV2": lambda: transformers.MobileNetV2ForImageClassification(deepcopy(MOBILENET)),
    "timm ViT": lambda: build("timm"),
    "paper's CNN": lambda: build("cnn"),
}

# Six samples are drawn twice in an epoch or more often; three steps are an epoch, so the fourth reads what K became.
SETTINGS = QUICK | {
    "max_steps": 4,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    # Near delta = 0, where many samples are, float32 and the equations' float64 may fall on both sides of a floor.
    "step_size": 1000,
    "rounding": "nearest",
}

# Batch statistics of eight images magnify what a step changes, and with it every rounding.
RATES = {"ResNet": 0.01, "MobileNetV2": 1e-3}
# In fifty layers so much that runs which differ by a rounding part: trained in float64, but for half precision.
IN_FLOAT64 = {"MobileNetV2"}


class Run:
    """A training that has ended: the trainer, its recorded steps and what they left."""

    def __init__(self, trainer, calls):
        self.trainer, self.calls = trainer, calls
        self.weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        self.k, self.image_size = trainer.mask_budget.k, trainer.mask_budget.image_size
        self.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def require_sound(self):
        """Finite losses; K pixels replaced, no more and no fewer; K moved, within its bounds, for visited samples."""
        assert len(self.losses) == self.trainer.state.global_step > 0
        assert torch.tensor(self.losses).isfinite().all()
        for call in self.calls:
            assert torch.equal(call["step"].is_masked.sum((1, 2, 3)).int(), call["k"].int())
        pixels = self.image_size[0] * self.image_size[1]
        assert ((self.k >= int(0.2 * pixels)) & (self.k <= int(0.8 * pixels))).all()
        visited = {row for call in self.calls for row in call["sample_idx"].tolist()}
        start = int(self.trainer.args.mask_ratio * pixels)
        moved = {row for row, k in enumerate(self.k.tolist()) if k != start}
        assert moved <= visited
        assert len(moved) > 1
        return self

    def require_same(self, other, tolerance=0.0):
        """The other training's weights, to a share of the largest in each tensor, and its K."""
        assert largest_difference(self.weights, other.weights) <= tolerance
        assert torch.equal(self.k, other.k)

    def require_plain(self, model, breaks=(), is_mixed=False):
        """What plain gradient descent on the equations makes of `model`; visits are forgotten at the `breaks`."""
        initial = {name: value.detach().clone() for name, value in model.named_parameters()}
        plain = PlainTraining(model, self.trainer.train_dataset, self.trainer.args, is_mixed)
        for start, end in zip((0, *breaks), (*breaks, len(self.calls)), strict=True):
            plain.follow(self.calls[start:end])
        expected = {name: value.detach() for name, value in model.named_parameters()}
        assert largest_difference(self.weights, expected) < 1e-4
        # The way, too: where steps are small, weights that hardly moved are close to any others.
        assert distance(self.weights, expected) < 2e-3 * distance(initial, expected)
        assert self.k.tolist() == plain.k
        taken = plain.losses[breaks[-1] if breaks else 0 :]
        assert self.losses == pytest.approx(taken, rel=1e-4)


def distance(one, other):
    return torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()


class Row:
    """One kind of model, trained again and again from the same weights."""

    def __init__(self, name, folder):
        self.name, self.folder = name, Path(folder)
        self.dtype = torch.float64 if name in IN_FLOAT64 else torch.float32

    def data(self, dtype=None):
        data = TinyImages(size=MOBILENET_SIZE if self.name == "MobileNetV2" else SIZE)
        data.images = data.images.to(dtype or self.dtype)
        return data

    def model(self, dtype=None):
        torch.manual_seed(0)
        return MODELS[self.name]().to(dtype or self.dtype)

    def trainer(self, model=None, trainer_class=SmootTrainer, trainer_kwargs=None, **overrides):
        rate = {"learning_rate": RATES.get(self.name, SETTINGS["learning_rate"])}
        # Several trainings of a row save into its folder, one after the other.
        defaults = {"output_dir": str(self.folder), "overwrite_output_dir": True}
        args = SmootTrainingArguments(**defaults | SETTINGS | rate | overrides)
        others = {"train_dataset": self.data()} | (trainer_kwargs or {})
        if model is None and "model_init" not in others:
            model = self.model()
        return trainer_class(model, args, **others)

    def run(self, *args, resume=None, **overrides):
        trainer = self.trainer(*args, **overrides)
        return self.train(trainer, resume)

    def train(self, trainer, resume=None):
        with pytest.MonkeyPatch.context() as patch:
            recorder = StepRecorder(patch)
            trainer.train(resume_from_checkpoint=resume)
        return Run(trainer, recorder.calls)

    @cached_property
    def baseline(self):
        return self.run().require_sound()
