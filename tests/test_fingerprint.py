"""What identifies a data set is its content, and nothing else."""

import shutil

import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from torch.utils.data import Subset, random_split

from smoot_hf.fingerprint import dataset_fingerprint


def numbers(values):
    return Dataset.from_dict({"x": values, "labels": [0] * len(values)})


def test_equal_content_has_an_equal_fingerprint_under_any_transform():
    """Catches HF Datasets' own fingerprint, which changes with every transform."""
    data = numbers(list(range(100)))
    expected = dataset_fingerprint(data)
    assert dataset_fingerprint(numbers(list(range(100)))) == expected
    assert dataset_fingerprint(data.with_transform(lambda batch: {"y": batch["x"]})) == expected
    assert dataset_fingerprint(data.with_format("torch")) == expected
    assert dataset_fingerprint(data.select(range(100))) == expected


@pytest.mark.parametrize("values", [list(range(99)), [1, 0, *range(2, 100)], [*range(99), 7]])
def test_other_content_has_another(values):
    """Catches a fingerprint of the length or the columns alone."""
    assert dataset_fingerprint(numbers(values)) != dataset_fingerprint(numbers(list(range(100))))


def test_an_imagefolder_is_its_images_wherever_it_lies(tmp_path):
    """Catches a hash of the path: a copy is the same data, overwritten images are not."""
    for number in range(4):
        folder = tmp_path / "one" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 40 * number).save(folder / f"{number}.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def load(name):
        cache = str(tmp_path / f"cache{name}")
        return load_dataset("imagefolder", data_dir=str(tmp_path / name), split="train", cache_dir=cache)

    first = dataset_fingerprint(load("one"))
    assert dataset_fingerprint(load("two")) == first
    Image.new("L", (4, 4), 255).save(tmp_path / "two" / "0" / "0.png")
    assert dataset_fingerprint(load("two")) != first


def test_a_data_set_may_say_its_own():
    """Catches the address of a method taken for an identity."""

    class Own:
        fingerprint = "abc"

    class Method:
        def fingerprint(self):
            return "abc"

    assert dataset_fingerprint(Own()) == "abc"
    assert dataset_fingerprint(Method()) is None
    assert dataset_fingerprint([1, 2]) is None


@pytest.mark.parametrize("data", [list(range(10)), numbers(list(range(10)))], ids=["list", "HF Dataset"])
def test_a_split_that_is_drawn_anew_is_another_data_set(data):
    """Catches the K of one random_split at work on the samples of another, of the same length."""
    first, again, other = (
        dataset_fingerprint(random_split(data, [6, 4], torch.Generator().manual_seed(seed))[0]) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert dataset_fingerprint(Subset(data, [2, 1])) != dataset_fingerprint(Subset(data, [1, 2]))
    assert dataset_fingerprint(Subset(data, range(2))) == dataset_fingerprint(Subset(data, torch.tensor([0, 1])))


def test_a_split_of_other_data_is_another():
    """Catches indices alone."""
    one, two = (dataset_fingerprint(Subset(numbers(list(range(n, n + 10))), [1, 2])) for n in (0, 1))
    assert one != two
