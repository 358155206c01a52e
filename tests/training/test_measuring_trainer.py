"""What a trainer's own evaluation measures: `deletion_auc` of the images that its collator makes, and the card's."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CHANNELS, CLASSES, SIZE, PixelImages, TinyImages, build
from torch import nn
from torch.utils.data import Dataset
from transformers import default_data_collator
from transformers.modeling_outputs import ImageClassifierOutput

from smoot_hf import InputPipeline, evaluate_faithfulness
from smoot_hf.evaluation.attributions import attribute
from smoot_hf.models.logits import LogitsModel
from smoot_hf.publishing.card import _examples

MEAN = torch.tensor([0.6, 0.3, 0.5])[:, None, None]


class Raw(Dataset):
    """Rows as they are before any collator: a function of the image (C, H, W) in [0, 1] and its label."""

    def __init__(self, row, length=12, size=SIZE):
        generator = torch.Generator().manual_seed(length)
        self.images = torch.rand(length, CHANNELS, size, size, generator=generator)
        self.row = row

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.row(self.images[i], i * 7 % CLASSES)


def as_dict(image, label):
    return {"pixel_values": image, "labels": label}


def stacked(images, labels):
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def normalising(rows):
    return stacked([(row["pixel_values"] - MEAN) * 40 for row in rows], [row["labels"] for row in rows])


def resizing(rows):
    batch = stacked([row["pixel_values"] for row in rows], [row["labels"] for row in rows])
    return {**batch, "pixel_values": F.interpolate(batch["pixel_values"], (SIZE, SIZE))}


def reordering(rows):
    return stacked([row["pixel_values"].flip(0) for row in rows], [row["labels"] for row in rows])


def making(rows):
    return stacked([row["image"].permute(2, 0, 1) for row in rows], [row["class"] for row in rows])


def unpacking(rows):
    return stacked([image for image, _ in rows], [label for _, label in rows])


# name -> collator, data set, arguments of the training
COLLATORS = {
    "normalises": (normalising, Raw(as_dict), {}),
    "resizes": (resizing, Raw(as_dict, size=2 * SIZE), {}),
    "reorders channels": (reordering, Raw(as_dict), {}),
    "makes pixel_values": (
        making,
        Raw(lambda image, label: {"image": image.permute(1, 2, 0), "class": label}),
        {"remove_unused_columns": False},
    ),
    "unpacks tuples": (unpacking, Raw(lambda image, label: (image, label)), {}),
    "names the labels otherwise": (
        default_data_collator,
        Raw(lambda image, label: {"pixel_values": image, "fine_label": label}),
        {"label_names": ["fine_label"]},
    ),
}


def auc_by_hand(model, images, labels):
    """Area under the accuracy while positions of the highest gradient become the corner's, ten steps, in percent."""
    model = model.eval()
    areas = []
    for image, label in zip(images, labels, strict=True):
        leaf = image[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(pixel_values=leaf).logits[0, label], leaf)
        order = gradient[0].abs().mean(dim=0).flatten().argsort(descending=True, stable=True)
        counts = [step * len(order) // 10 for step in range(11)]
        values = []
        for count in counts:
            masked = image.flatten(1).clone()
            masked[:, order[:count]] = image[:, :1, 0]
            with torch.no_grad():
                values.append(float(model(pixel_values=masked.reshape(1, *image.shape)).logits.argmax() == label))
        steps = zip(counts[:-1], counts[1:], values[:-1], values[1:], strict=True)
        areas.append(sum((b - a) / len(order) * (x + y) / 2 for a, b, x, y in steps))
    return 100 * sum(areas) / len(areas)


@pytest.fixture
def collated(quick_trainer):
    """A trained trainer, with the images and labels that its collator makes of the evaluation set."""

    def make(name, **overrides):
        collator, data, arguments = COLLATORS[name]
        trainer = quick_trainer(
            "resnet",
            data,
            trainer_kwargs={"eval_dataset": data, "data_collator": collator},
            **({"deletion_auc_samples": len(data)} | arguments | overrides),
        )
        trainer.train()
        batch = collator([data[i] for i in range(len(data))])
        return trainer, batch["pixel_values"], batch[trainer.label_names[0]]

    return make


@pytest.mark.parametrize("name", COLLATORS)
def test_deletion_auc_is_measured_on_what_the_collator_makes(collated, name):
    """Catches a measurement of the data set's raw rows: a wrong number without a word, or an end of the training."""
    trainer, images, labels = collated(name)
    found = trainer.evaluate()["eval_deletion_auc"]
    assert found == pytest.approx(auc_by_hand(trainer.model, images, labels), abs=1e-4)
    # What the rows themselves give is another number, where they can be measured at all.
    if name in ("normalises", "reorders channels", "resizes"):
        assert evaluate_faithfulness(trainer.model, trainer.eval_dataset, curves=()).deletion_auc != found


@pytest.mark.parametrize("name", COLLATORS)
def test_the_cards_examples_are_what_the_collator_makes(collated, name):
    """Catches a grid of raw rows: saliency of images that the model has never seen, or no card at all."""
    trainer, images, labels = collated(name, deletion_auc_samples=0)
    rows = [place * 12 // 8 for place in range(8)]
    pictures, titles, maps = _examples(trainer)
    low, high = images[rows].amin(dim=(1, 2, 3), keepdim=True), images[rows].amax(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(pictures, (images[rows] - low) / (high - low))
    assert [title[0] for title in titles] == [f"LABEL_{label}" for label in labels[rows].tolist()]
    with torch.enable_grad():
        expected = attribute(LogitsModel(trainer.model.eval()), images[rows], labels[rows], torch.arange(8))
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("name", COLLATORS)
def test_a_measurement_of_ones_own_takes_the_collator(collated, name):
    """Catches a `data_collator` or `label_name` that one of the three measurements does not pass on."""
    trainer, images, labels = collated(name)
    own = {"data_collator": trainer.data_collator, "label_name": trainer.label_names[0]}
    found = evaluate_faithfulness(trainer.model, trainer.eval_dataset, **own, curves=(), batch_size=5)
    assert found.deletion_auc == pytest.approx(auc_by_hand(trainer.model, images, labels), abs=1e-4)


def test_an_input_pipeline_still_normalises_what_the_collator_makes(quick_trainer):
    """Catches bytes measured as they are, or normalised twice, behind the trainer's collator."""
    data, pipeline = PixelImages(12), InputPipeline(mean=(0.5,) * 3, std=(0.15,) * 3)
    trainer = quick_trainer(
        "resnet", data, deletion_auc_samples=12, trainer_kwargs={"eval_dataset": data, "input_pipeline": pipeline}
    )
    trainer.train()
    images = pipeline.normalize(torch.stack([data[i]["pixel_values"] for i in range(12)]))
    expected = auc_by_hand(trainer.model, images, torch.tensor(data.labels))
    assert trainer.evaluate()["eval_deletion_auc"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("weight", ["bias", "weight"])
def test_a_run_that_has_diverged_reports_nan_and_goes_on(quick_trainer, weight):
    """Catches a training that is ended by the measurement of a model whose outputs are NaN, and an area of 0, the best.

    A NaN in the bias leaves the gradient whole, so that every image is ranked.
    """
    model = build("vit")
    nn.init.constant_(getattr(model.classifier, weight), math.nan)
    trainer = quick_trainer(model, deletion_auc_samples=4, trainer_kwargs={"eval_dataset": TinyImages(8)})
    assert math.isnan(trainer.evaluate()["eval_deletion_auc"])


class Standardising(nn.Module):
    """Divides each image by its own spread, as some models do: NaN for an image of one colour."""

    def __init__(self, order=tuple(range(CLASSES))):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(CHANNELS * SIZE * SIZE, CLASSES)
        with torch.no_grad():
            self.head.weight.copy_(self.head.weight[list(order)])
            self.head.bias.copy_(self.head.bias[list(order)])

    def forward(self, pixel_values, labels=None):
        flat = pixel_values.flatten(1)
        flat = (flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True)
        return ImageClassifierOutput(logits=self.head(flat))


def test_the_deletion_auc_of_a_training_does_not_hang_on_the_names_of_the_classes(quick_trainer):
    """Catches NaN logits of an image of which nothing is left that count as class 0, right for images of that class."""
    found = []
    for shift in range(CLASSES):
        # Two of the four classes have images: how many are of class 0 depends on the shift.
        data = TinyImages(12, classes=2)
        # All channels are one, so that the corner's fill leaves an image of one colour.
        data.images = data.images[:, :1].expand(-1, CHANNELS, -1, -1)
        data.labels = [(label + shift) % CLASSES for label in data.labels]
        # Row j of the shifted head is row j - shift of the first.
        model = Standardising([(j - shift) % CLASSES for j in range(CLASSES)])
        trainer = quick_trainer(model, deletion_auc_samples=12, trainer_kwargs={"eval_dataset": data})
        found.append(trainer.evaluate()["eval_deletion_auc"])
    assert found == [found[0]] * CLASSES
