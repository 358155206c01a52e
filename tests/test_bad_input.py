"""Bad input gets one clear error, before training starts where it can be known."""

import math

import pytest
import torch
from conftest import CLASSES, TinyImages, build
from datasets import IterableDataset
from torch import nn
from transformers import PreTrainedModel, ViTConfig

from smoot_hf import SmootTrainer


class Altered(TinyImages):
    """Tiny images, one of whose samples is changed by a function of the item."""

    def __init__(self, change, at=0, **settings):
        super().__init__(**settings)
        self.change, self.at = change, at

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return self.change(item) if i == self.at else item


def with_nan(item):
    return item | {"pixel_values": torch.where(torch.rand(3, 8, 8) < 0.1, math.nan, item["pixel_values"])}


WRONG_IN_THE_FIRST_SAMPLE = {
    "no images": (lambda i: {"labels": i["labels"]}, r"no 'pixel_values', only \['labels'\]"),
    "flat images": (
        lambda i: i | {"pixel_values": i["pixel_values"].flatten()},
        r"shape \(B, C, H, W\), got \(1, 192\)",
    ),
    "integer images": (
        lambda i: i | {"pixel_values": i["pixel_values"].to(torch.uint8)},
        "uint8 with an input_pipeline",
    ),
    "NaN": (with_nan, r"NaN or infinite values, in the training samples \[0\]"),
    "infinity": (lambda i: i | {"pixel_values": i["pixel_values"] + math.inf}, "NaN or infinite"),
    "no labels": (lambda i: {"pixel_values": i["pixel_values"]}, r"no 'labels', only \['pixel_values'\]"),
    "label too large": (lambda i: i | {"labels": 4}, r"'labels' must lie in \[0, 3\].* training sample 0 has 4"),
    "negative label": (lambda i: i | {"labels": -100}, "training sample 0 has -100"),
    "soft label": (lambda i: i | {"labels": [0.5, 0.5, 0.0, 0.0]}, r"one class index per sample.*soft labels"),
    "an index of its own": (lambda i: i | {"sample_idx": 3}, "'sample_idx' is attached by the trainer"),
}


@pytest.mark.parametrize("case", WRONG_IN_THE_FIRST_SAMPLE)
def test_a_wrong_first_sample_is_refused_when_the_trainer_is_built(case, quick_trainer):
    """Catches an error deep in the model, hours later, that does not name the data."""
    change, message = WRONG_IN_THE_FIRST_SAMPLE[case]
    with pytest.raises(ValueError, match=message):
        quick_trainer(train_dataset=Altered(change), remove_unused_columns=False)


@pytest.mark.parametrize("case", ["NaN", "infinity", "label too large", "negative label"])
@pytest.mark.parametrize("method", ["standard", "smoot"])
def test_a_wrong_sample_later_names_itself(case, method, quick_trainer):
    """Catches an index error, a device assertion or a NaN loss that does not say which sample it was."""
    change, message = WRONG_IN_THE_FIRST_SAMPLE[case]
    trainer = quick_trainer(train_dataset=Altered(change, at=17), method=method)
    with pytest.raises(ValueError, match=message.replace("0\\]", "17\\]").replace("sample 0", "sample 17")):
        trainer.train()


def test_a_stream_without_length_is_refused(quick_trainer):
    """A K per sample needs samples that can be counted; standard training does not."""
    items = [item | {"pixel_values": item["pixel_values"].tolist()} for item in TinyImages()]
    stream = IterableDataset.from_generator(lambda: iter(items))
    with pytest.raises(ValueError, match="IterableDataset without length and index"):
        quick_trainer(train_dataset=stream)
    trainer = quick_trainer(train_dataset=stream.with_format("torch"), method="standard")
    trainer.train()
    assert trainer.state.global_step == 6


def test_images_of_several_sizes_are_refused(quick_trainer):
    """K counts the pixels of one size; catches a budget of the first image applied to all."""
    other = Altered(lambda i: i | {"pixel_values": torch.zeros(3, 72, 72)}, at=5, size=64)
    trainer = quick_trainer("resnet", train_dataset=other, per_device_train_batch_size=1, max_steps=24)
    with pytest.raises(ValueError, match=r"must have one size.* got \(72, 72\) after \(64, 64\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification' is refused"),
        ({"problem_type": "regression"}, "problem_type='regression' is refused"),
    ],
)
def test_targets_without_one_distribution_are_refused(overrides, message, quick_trainer):
    """Catches a cross-entropy over labels that do not exclude each other."""
    with pytest.raises(ValueError, match=message):
        quick_trainer(build("vit", **overrides))


def test_a_model_of_one_class_is_refused(quick_trainer):
    """One class has no distribution whose change could be ranked."""
    with pytest.raises(ValueError, match="at least 2 classes, got num_labels=1"):
        quick_trainer(build("cnn", num_labels=1))


class WithoutLogits(PreTrainedModel):
    config_class = ViTConfig
    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__(ViTConfig(num_labels=CLASSES))
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values, labels=None):
        return {"features": pixel_values * self.weight}


def test_a_model_without_logits_is_refused(quick_trainer):
    """Catches a KeyError that does not say what was expected."""
    with pytest.raises(ValueError, match=r"output \(dict\) has no 'logits'"):
        quick_trainer(WithoutLogits()).train()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ddp_static_graph": True}, "ddp_static_graph=True is refused"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True is refused"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant.* is refused"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_silently_wrong_set_ups_are_refused_by_name(overrides, message, quick_trainer):
    """Each of these would train, and train something else."""
    with pytest.raises(ValueError, match=message):
        quick_trainer(**overrides)
    quick_trainer(method="standard", **overrides)


def test_data_parallel_is_refused(quick_args):
    """DataParallel loses the gradients of autograd.grad; catches a machine with several GPUs and no launcher."""
    args = quick_args()
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel over 2 GPUs is refused.*accelerate launch"):
        SmootTrainer(build("vit"), args, train_dataset=TinyImages())


def test_a_loader_that_lost_the_index_is_refused(quick_args):
    """Catches K of sample 0 used for all, where a user replaced the loader."""

    class Replaced(SmootTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)

    trainer = Replaced(build("vit"), quick_args(), train_dataset=TinyImages())
    with pytest.raises(ValueError, match=r"no 'sample_idx'.* get_train_dataloader was replaced"):
        trainer.train()


def test_an_empty_training_set_is_refused(quick_trainer):
    """Catches an IndexError from the user's data set."""
    empty = torch.utils.data.Subset(TinyImages(), [])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        quick_trainer(train_dataset=empty)


def test_an_evaluation_batch_without_images_is_refused_by_name(quick_trainer):
    """Catches a bare KeyError."""
    trainer = quick_trainer(remove_unused_columns=False)
    with pytest.raises(ValueError, match=r"the batch has no 'pixel_values', only \['image', 'labels'\]"):
        trainer.evaluate([{"image": torch.zeros(3, 8, 8), "labels": 0}] * 4)


def test_labels_of_any_integer_type_will_do(quick_trainer):
    """Catches int32 labels that reach the loss as they are."""
    narrow = Altered(lambda i: i)
    narrow.labels = torch.tensor(narrow.labels, dtype=torch.int32).numpy()
    quick_trainer(train_dataset=narrow, trainer_kwargs={"data_collator": collate_as_they_are}).train()


def collate_as_they_are(examples):
    return {
        "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
        "labels": torch.tensor([e["labels"] for e in examples], dtype=torch.int32),
    }


def test_a_collator_that_drops_samples_is_refused(quick_trainer):
    """Catches K written to the neighbours of the samples that remained."""

    def drop_last(examples):
        kept = examples[: max(1, len(examples) - 1)]
        return {
            "pixel_values": torch.stack([e["pixel_values"] for e in kept]),
            "labels": torch.tensor([e["labels"] for e in kept]),
        }

    trainer = quick_trainer(trainer_kwargs={"data_collator": drop_last})
    with pytest.raises(ValueError, match="made 7 images of 8 samples"):
        trainer.train()
