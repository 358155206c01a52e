"""The number of images of every class, as the training command prints it."""

import numpy as np
import pytest

from smoot_hf.data.class_counts import describe_class_counts, imbalance


def test_a_line_for_each_class():
    """Fault: classes without an image in a split are left out, or counts stand at the wrong name."""
    labels = {"train": np.array([0, 0, 2, 1, 0]), "test": np.array([1, 0])}
    assert describe_class_counts(["ant", "honey bee", "wasp"], labels).splitlines() == [
        "  ant             3 train       1 test",
        "  honey bee       1 train       1 test",
        "  wasp            1 train       0 test",
    ]


def test_many_classes_take_a_line_for_each_split():
    """Fault: a thousand lines before the training."""
    names = [f"class {number}" for number in range(30)]
    labels = {"train": np.concatenate([np.arange(30), np.arange(1, 30), [7]]), "test": np.arange(30)}
    assert describe_class_counts(names, labels).splitlines() == [
        "  train 30 classes of 1 (class 0) to 3 (class 7) images",
        "  test  30 classes of 1 (class 0) to 1 (class 0) images",
    ]


@pytest.mark.parametrize(("counts", "is_told"), [((10, 1), False), ((11, 1), True), ((40, 4), False), ((5, 0), True)])
def test_more_than_ten_times_the_images_are_told(counts, is_told):
    """Fault: a warning at exactly ten times, or none where a class has no image at all."""
    labels = np.repeat([0, 1], counts)
    told = imbalance(["ant", "bee"], labels)
    assert (told is not None) == is_told
    if told:
        assert f"2 classes of {counts[1]} (bee) to {counts[0]} (ant) images" in told


def test_an_image_counts_for_each_of_its_labels():
    """Fault: labels flattened, so that every image without a label counts for the first class."""
    labels = np.array([[1, 1], [0, 1], [0, 0]], dtype=np.float32)
    assert describe_class_counts(["a", "b"], {"train": labels}) == "  a       1 train\n  b       2 train"
    assert imbalance(["a", "b"], labels) is None
    assert "0 (a) to 2 (b)" in imbalance(["a", "b"], labels[1:].repeat(2, axis=0))
