"""What people hand to an evaluation: data sets of every kind are read, and what is none gets a line that helps."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, TinyImages, build
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

from smoot_hf import evaluate_faithfulness
from smoot_hf.evaluation.image_classes import find_image_classes
from smoot_hf.evaluation.ranked_batches import check_dataset, has_index
from smoot_hf.evaluation.sanity_check import randomized_weights_correlation

DATA = TinyImages(8)
LABELS = torch.tensor(DATA.labels)


def measured(data, **options):
    return evaluate_faithfulness(build("vit"), data, steps=3, curves=("random",), **options)


def same(data, **options):
    """Whether a data set gives what the tiny images give, in every measurement."""
    found, expected = measured(data, **options), measured(DATA)
    return torch.equal(found.deletion_curve, expected.deletion_curve) and found.accuracy == expected.accuracy


PAIRS = [(DATA.images[i], DATA.labels[i]) for i in range(8)]


@pytest.mark.parametrize(
    "data",
    [PAIRS, [list(pair) for pair in PAIRS], TensorDataset(DATA.images, LABELS), Subset(PAIRS, range(8))],
    ids=["tuples", "lists", "TensorDataset", "Subset"],
)
def test_pairs_of_image_and_label_are_read(data):
    """Catches data sets in the form of torchvision's that are refused, or read by key."""
    assert same(data)
    assert find_image_classes(build("vit"), data, steps=3).sample_idx.tolist() == list(range(8))
    assert randomized_weights_correlation(build("vit"), data).n == 8


def test_a_data_set_of_torchvision_is_read():
    """Catches what the pairs above have in common with no data set that anybody has."""
    data = FakeData(size=6, image_size=(3, 8, 8), num_classes=CLASSES, transform=ToTensor())
    rows = [{"pixel_values": data[i][0], "labels": int(data[i][1])} for i in range(6)]
    assert torch.equal(measured(data).deletion_curve, measured(rows).deletion_curve)


@pytest.mark.parametrize("kind", [int, np.int16, np.int32, np.uint8, torch.tensor, lambda x: torch.tensor(x).int()])
def test_labels_of_any_integer_type_are_the_same_labels(kind):
    """Catches labels that training takes and evaluation does not."""
    assert same([{"pixel_values": DATA.images[i], "label": kind(DATA.labels[i])} for i in range(8)])


def test_boolean_labels_are_two_classes():
    """Catches booleans that are refused, or index as a mask."""
    numbered = [{"pixel_values": DATA.images[i], "labels": i % 2} for i in range(8)]
    flagged = [{**row, "labels": bool(row["labels"])} for row in numbered]
    assert measured(flagged).accuracy == measured(numbered).accuracy


def test_labels_of_another_name():
    """Catches a `label_name` that is ignored, also where another column is called "labels"."""
    rows = [{"pixel_values": DATA.images[i], "fine": DATA.labels[i], "labels": 0} for i in range(8)]
    assert same(rows, label_name="fine")
    assert same(PAIRS, label_name="fine")
    with pytest.raises(ValueError, match=r"must hold 'pixel_values' and 'coarse', got \['fine', 'labels', 'pixel"):
        measured(rows, label_name="coarse")


class Stream(IterableDataset):
    """It has a length, as some streams have."""

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(DATA)


class BatchesOnly:
    """Rows that are fetched several at a time, and in no other way."""

    def __len__(self):
        return 8

    def __getitems__(self, indices):
        return [DATA[i] for i in indices]


@pytest.mark.parametrize(
    ("data", "expected"),
    [(PAIRS, True), (DATA, True), (BatchesOnly(), True), (Stream(), False), (iter(PAIRS), False), (set(), False)],
    ids=lambda value: type(value).__name__,
)
def test_training_and_evaluation_mean_the_same_by_a_data_set_with_an_index(data, expected):
    """Catches a data set that an evaluation takes and `has_index`, which training asks, does not, or the reverse."""
    assert has_index(data) == expected
    if expected:
        check_dataset(data)
    else:
        with pytest.raises(ValueError, match="must have a length and an index"):
            check_dataset(data)


def labelled(*labels):
    return [{"pixel_values": DATA.images[i], "labels": label} for i, label in enumerate(labels)]


SPLITS = DatasetDict({name: Dataset.from_dict({"labels": [0]}) for name in ("train", "test")})
PICTURES = FakeData(size=2, image_size=(3, 8, 8), num_classes=CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": DataLoader(DATA)}, "got a DataLoader: pass its `dataset`"),
        ({"data": SPLITS}, r"one data set, got a DatasetDict of 2, \['train', 'test'\]: pass one of them"),
        ({"data": {"test": DATA}}, r"one data set, got a dict of 1, \['test'\]"),
        ({"data": Stream()}, "must have a length and an index, got a Stream: load it with streaming=False"),
        ({"data": iter(PAIRS)}, "must have a length and an index, got a list_iterator"),
        ({"data": labelled("cat", "dog")}, "class indices, integers from 0, got 'cat': number the labels"),
        ({"data": labelled(1.0, 2.5)}, r"class indices, integers from 0, got torch\.float32"),
        ({"data": labelled(np.float64(1))}, r"class indices, integers from 0, got torch\.float64"),
        ({"data": labelled(None)}, "must hold 'labels', got None in some"),
        ({"data": PICTURES}, "must be tensors or arrays, got Image: let the data set's transform make them"),
        ({"data": [(*pair, 0) for pair in PAIRS]}, "or .image, label. pairs, got a tuple of 3: pass a data_collator"),
        ({"data": list(DATA.images)}, "or .image, label. pairs, got a Tensor: pass a data_collator"),
        ({"data_collator": list}, "data_collator must return a dict of pixel_values and labels, got list"),
        (
            {"data_collator": lambda rows: {"pixel_values": DATA.images[:7], "labels": LABELS[:7]}},
            "each of 8 rows must become an image of the batch, got 7",
        ),
        (
            {"data_collator": lambda rows: {"images": DATA.images, "labels": LABELS}},
            r"the data collator's batches must hold 'pixel_values' and 'labels' \(or 'label'\), got \['images', 'lab",
        ),
        ({"batch_size": 2.5}, r"batch_size must be a whole number, got 2\.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_is_no_data_set_of_images_gets_a_line(arguments, message):
    """Catches an error from deep inside, and float labels that are cut to integers without a word."""
    with pytest.raises(ValueError, match=message):
        measured(**{"data": DATA, **arguments})


@pytest.mark.parametrize("steps", [2.5, 10.0, "10"])
def test_steps_are_a_whole_number(steps):
    """Catches torch's or Python's words for a number of steps that is none."""
    with pytest.raises(ValueError, match=f"steps must be a whole number, got {steps!r}"):
        evaluate_faithfulness(build("vit"), DATA, steps=steps)
