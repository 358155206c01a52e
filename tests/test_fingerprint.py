"""What identifies a data set is its content, and nothing else."""

import io
import math
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, List, Value, concatenate_datasets, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, random_split

from smoot_hf import fingerprint
from smoot_hf.fingerprint import dataset_fingerprint, fingerprints_differ, is_identified


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


@pytest.mark.parametrize(
    "values", [list(range(99)), [1, 0, *range(2, 100)], [*range(99), 7], [*range(50), 51, 50, *range(52, 100)]]
)
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


ROWS = 2100
FEATURES = {
    "int": (Value("int64"), list(range(ROWS))),
    "bool": (Value("bool"), [row % 2 == 0 for row in range(ROWS)]),
    "float with none": (Value("float32"), [None if row % 7 == 0 else row / 3 for row in range(ROWS)]),
    "string": (Value("string"), ["x" * (row % 5) + str(row) for row in range(ROWS)]),
    "list": (List(Value("int32")), [[row] * (row % 4) for row in range(ROWS)]),
    "pixels": (Array3D((3, 2, 2), "uint8"), [np.full((3, 2, 2), row % 251, np.uint8) for row in range(ROWS)]),
    "class": (ClassLabel(names=["a", "b"]), [row % 2 for row in range(ROWS)]),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_content_is_what_counts_however_its_rows_are_stored(kind, tmp_path):
    """Catches a hash of slices, pieces or padding, and a row of any type that is not looked at."""
    feature, values = FEATURES[kind]

    def data(values):
        return Dataset.from_dict({"x": values}, features=Features({"x": feature}))

    whole = data(values)
    expected = dataset_fingerprint(whole)
    pieces = [whole.select(range(at, min(at + 333, ROWS))) for at in range(0, ROWS, 333)]
    assert dataset_fingerprint(concatenate_datasets(pieces)) == expected
    longer = concatenate_datasets([data(values[5:6] * 3), whole])
    assert dataset_fingerprint(longer.select(range(3, ROWS + 3))) == expected
    assert dataset_fingerprint(longer.select(list(range(3, ROWS + 3)))) == expected
    backwards = data(values[::-1])
    assert dataset_fingerprint(backwards.select(range(ROWS - 1, -1, -1))) == expected
    whole.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert dataset_fingerprint(datasets.load_from_disk(str(tmp_path / "saved"))) == expected
    for row in (1, 1001, ROWS - 2):
        swapped = [*values[:row], values[row + 1], values[row], *values[row + 2 :]]
        assert dataset_fingerprint(data(swapped)) != expected, row


def photograph(seed, size=64):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_an_image_is_its_bytes_whether_they_lie_in_the_row_or_in_a_file(tmp_path):
    """Catches one changed photograph among rows that no sample of them looks at, at either end of its file."""
    images = [photograph(row) for row in range(200)]
    assert len(images[0]) > 12_000
    features = Features({"image": datasets.Image()})

    def embedded(images):
        rows = [image if image is None else {"bytes": image, "path": None} for image in images]
        return Dataset.from_dict({"image": rows}, features=features)

    expected = dataset_fingerprint(embedded(images))
    paths = [tmp_path / f"{row}.png" for row in range(200)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    files = Dataset.from_dict({"image": [str(path) for path in paths]}, features=features)
    assert dataset_fingerprint(files) == expected
    for other in (b"!" + images[7][1:], images[7][:-1] + b"!", images[7] + b"!", None):
        assert dataset_fingerprint(embedded([*images[:7], other, *images[8:]])) != expected
    paths[7].write_bytes(photograph(1000))
    assert dataset_fingerprint(files) != expected


def test_parts_count_in_their_order():
    """Catches K of a ConcatDataset on the rows of another order, and an inner Subset that is not looked at."""
    one, two = numbers(list(range(10))), numbers(list(range(10, 20)))
    concat = dataset_fingerprint(ConcatDataset([one, two]))
    assert concat == dataset_fingerprint(ConcatDataset([one.with_format("torch"), two]))
    others = [
        ConcatDataset([two, one]),
        ConcatDataset([one, two, two]),
        ConcatDataset([ConcatDataset([one, two]), two]),
        Subset(ConcatDataset([two, one]), range(20)),
        Subset(ConcatDataset([one, two]), range(20)),
        Subset(Subset(ConcatDataset([one, two]), [1, 0]), [0, 1]),
        Subset(Subset(ConcatDataset([one, two]), [0, 1]), [1, 0]),
    ]
    found = [dataset_fingerprint(data) for data in others]
    assert len({concat, *found}) == len(others) + 1
    assert all(is_identified(fingerprint) for fingerprint in found)


def test_what_has_no_identity_is_said_to_have_none():
    """Catches a fingerprint of lengths and indices alone that passes for one of the content."""
    known, unknown = numbers(list(range(4))), list(range(4))
    for data in (unknown, Subset(unknown, [1]), ConcatDataset([known, unknown]), Subset(ConcatDataset([unknown]), [0])):
        assert not is_identified(dataset_fingerprint(data))
    assert dataset_fingerprint(ConcatDataset([known, unknown])) != dataset_fingerprint(ConcatDataset([unknown, known]))
    assert is_identified("a string of one's own?")


def test_a_fingerprint_of_the_first_version_says_nothing_of_a_later_one():
    """Catches the K and the runs of version 0.1.0 refused for data that have not changed."""
    later = dataset_fingerprint(numbers([1]))
    first = "ce3710938497d1c1"
    assert not fingerprints_differ(first, later)
    assert not fingerprints_differ(later, first)
    assert not fingerprints_differ(None, later)
    assert fingerprints_differ(first, first[::-1])
    assert fingerprints_differ(later, dataset_fingerprint(numbers([2])))
    assert fingerprints_differ("my own", later)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([np.uint8, np.int16, np.float32]),
    start=st.integers(0, 3),
)
def test_pixels_read_without_a_copy_are_the_bytes_of_the_format(lengths, shape, dtype, start):
    """Catches another fingerprint for the same images, under which every saved K would be refused."""

    def rows(count):
        values = pa.array(np.arange(count * math.prod(shape)).astype(dtype))
        for length in reversed(shape):
            values = pa.FixedSizeListArray.from_arrays(values, length)
        return values

    column = pa.chunked_array([rows(count) for count in lengths]).slice(start)
    if len(column):
        parts = fingerprint._fixed_size_bytes(column)
        assert b"".join(part.tobytes() for part in parts) == bytes(fingerprint._body(fingerprint._stored(column)))


def test_lists_with_gaps_are_not_read_as_pixels():
    """Catches a null that counts as whatever lies in its place."""
    column = pa.array([[1, 2], None, [3, None]], type=pa.list_(pa.int64(), 2))
    assert fingerprint._fixed_size_bytes(pa.chunked_array([column])) is None
    assert fingerprint._fixed_size_bytes(pa.chunked_array([column[2:]])) is None
