"""Fixtures: tiny models built from a configuration and tiny data sets made in memory; no test touches the network."""

# ruff: noqa: E402 - the environment must be set before the libraries read it
import gc
import os
import shutil
import tempfile

# Each process of the tests has its own copies of code that is loaded by its path.
MODULES = tempfile.TemporaryDirectory(prefix="smoot-modules-", ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = MODULES.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import loopback_hub

# The Hub of the tests: nothing answers there, and the client stays offline, unless a test asks for `hub`.
os.environ |= {
    "HF_ENDPOINT": loopback_hub.ENDPOINT,
    "HF_TOKEN": loopback_hub.TOKEN,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import datasets
import torch
from hypothesis import settings

# Deadlines measure the machine, not the code.
settings.register_profile("smoot", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("smoot")

torch.set_num_threads(1)


import pytest
from torch.utils.data import Dataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from smoot_hf import PaperCnnConfig, PaperCnnForImageClassification, SmootTrainer, SmootTrainingArguments
from smoot_hf.training.masked_step import masked_step

SIZE, CHANNELS, CLASSES = 8, 3, 4


def pytest_collection_finish():
    """Every training collects garbage: most of the time of a tiny one, were it to look at all that is imported."""
    gc.freeze()


def pytest_unconfigure():
    """Let the interpreter clear up after itself: extension modules complain of what is left."""
    gc.unfreeze()
    MODULES.cleanup()


class TinyImages(Dataset):
    """Noise images in memory, an item a dict, labels in turn."""

    def __init__(self, length=24, classes=CLASSES, size=SIZE, channels=CHANNELS):
        self.images = torch.randn(length, channels, size, size, generator=torch.Generator().manual_seed(length))
        self.labels = [i % classes for i in range(length)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


class PixelImages(TinyImages):
    """The tiny images as bytes."""

    def __getitem__(self, i):
        return {"pixel_values": (self.images[i] * 40 + 128).clamp(0, 255).to(torch.uint8), "labels": self.labels[i]}


def tiny_vit(dropout=0.0, **overrides):
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        num_channels=CHANNELS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=CLASSES,
        **overrides,
    )
    return ViTForImageClassification(config)


def tiny_resnet(**overrides):
    config = ResNetConfig(
        num_channels=CHANNELS,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
        **overrides,
    )
    return ResNetForImageClassification(config)


def tiny_cnn(**overrides):
    settings = {"image_size": SIZE, "num_channels": CHANNELS, "num_labels": CLASSES} | overrides
    return PaperCnnForImageClassification(PaperCnnConfig(**settings))


def tiny_timm(**overrides):
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": CLASSES,
        "model_args": {"img_size": SIZE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    }
    return TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(config | overrides))


MODELS = {"vit": tiny_vit, "resnet": tiny_resnet, "cnn": tiny_cnn, "timm": tiny_timm}


def build(name, **overrides):
    """A tiny model with the same weights at every call."""
    torch.manual_seed(0)
    return MODELS[name](**overrides)


# Set as one would for a quick run on a CPU: short, quiet, no files but the checkpoints asked for.
QUICK = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture
def quick_args(tmp_path):
    """`SmootTrainingArguments` of a six-step run; keywords override."""

    def make(**overrides):
        return SmootTrainingArguments(**({"output_dir": str(tmp_path / "run")} | QUICK | overrides))

    return make


@pytest.fixture
def quick_trainer(quick_args):
    """A `SmootTrainer` on tiny images; keywords that Trainer does not know override the arguments."""

    def make(model="vit", train_dataset=None, trainer_kwargs=None, **overrides):
        return SmootTrainer(
            model=build(model) if isinstance(model, str) else model,
            args=quick_args(**overrides),
            train_dataset=TinyImages() if train_dataset is None else train_dataset,
            **(trainer_kwargs or {}),
        )

    return make


@pytest.fixture
def trained(quick_trainer):
    """A `quick_trainer` that has been trained, at once: the Trainer seeds when it is built."""

    def make(*args, **kwargs):
        trainer = quick_trainer(*args, **kwargs)
        trainer.train()
        return trainer

    return make


def parameters(trainer):
    """A copy of every parameter by name."""
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def largest_difference(one, other):
    """Over all tensors, relative to the largest entry of each (at least 1e-3: some gradients are rounding alone)."""
    assert one.keys() == other.keys()
    return max(((one[n] - other[n]).abs().max() / one[n].abs().max().clamp_min(1e-3)).item() for n in one)


def mean_difference(one, other):
    """Mean deviation over all entries, relative to their mean magnitude."""
    assert one.keys() == other.keys()
    deviation, size = (
        torch.cat([t.flatten().double() for t in ts]).abs().mean()
        for ts in ([one[n] - other[n] for n in one], list(one.values()))
    )
    return (deviation / size).item()


def freeze_batch_statistics(model):
    """Micro-batches have statistics of their own: with them in use, runs that divide a batch differ by right."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = lambda x, m=module: torch.nn.functional.batch_norm(
                x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps
            )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A `LoopbackHub` that the client of this process talks to, with a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    server = loopback_hub.LoopbackHub(tmp_path / "hub")
    yield server
    server.close()


class StepRecorder:
    """Keeps what `masked_step` was given and what it gave."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr("smoot_hf.training.trainer.masked_step", self)

    def __call__(self, model, images, labels, sample_idx, k, epoch, args, **others):
        call = {"images": images, "labels": labels, "sample_idx": sample_idx, "k": k, "epoch": epoch}
        call["random_state"] = torch.get_rng_state()
        step = masked_step(model, images, labels, sample_idx, k, epoch, args, **others)
        self.calls.append(call | {"step": step})
        return step


@pytest.fixture
def recorder(monkeypatch):
    """Everything that the steps of a training were given and gave."""
    return StepRecorder(monkeypatch)


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory):
    """The folder of a training that has ended: a model and a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    args = SmootTrainingArguments(
        output_dir=str(folder), **QUICK | {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    )
    trainer = SmootTrainer(build("vit"), args, train_dataset=TinyImages())
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def bad_input_folder(saved_run, tmp_path, monkeypatch):
    """A folder to work in, with an earlier result in `run` that must survive."""
    shutil.copytree(saved_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path
