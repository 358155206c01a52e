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
MOBILENET_SIZE = 32
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

    def require_plain(self, model, breaks=()):
        """What plain gradient descent on the equations makes of `model`; visits are forgotten at the `breaks`."""
        plain = PlainTraining(model, self.trainer.train_dataset, self.trainer.args)
        for start, end in zip((0, *breaks), (*breaks, len(self.calls)), strict=True):
            plain.follow(self.calls[start:end])
        assert largest_difference(self.weights, dict(plain.model.named_parameters())) < 1e-4
        assert self.k.tolist() == plain.k
        taken = plain.losses[breaks[-1] if breaks else 0 :]
        assert self.losses == pytest.approx(taken, rel=1e-4)


class Row:
    """One kind of model, trained again and again from the same weights."""

    def __init__(self, name, folder):
        self.name, self.folder = name, Path(folder)
        self.data = TinyImages(size=MOBILENET_SIZE if name == "MobileNetV2" else SIZE)

    def model(self):
        torch.manual_seed(0)
        return MODELS[self.name]()

    def trainer(self, model=None, trainer_class=SmootTrainer, trainer_kwargs=None, **overrides):
        rate = {"learning_rate": 0.005} if self.name == "MobileNetV2" else {}
        args = SmootTrainingArguments(output_dir=str(self.folder), **SETTINGS | rate | overrides)
        others = {"train_dataset": self.data} | (trainer_kwargs or {})
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
