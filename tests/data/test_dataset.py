"""Loading by feature type, decoding once, and batches that are the images."""

import pickle
import sys

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from torch.utils.data import DataLoader

from smoot_hf.data import decoded_images as data
from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.data.decoded_images import DecodedImages, decode_images

TWO_CLASSES = {"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written beside the user's own data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pillow_images(count, mode="RGB", size=(5, 4), seed=0):
    """Noise, as Pillow images of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(one).convert(mode) for one in pixels]


def as_dataset(images, names=("cat", "dog"), labels=None):
    features = Features({"image": datasets.Image(), "labels": ClassLabel(names=list(names))})
    labels = [i % len(names) for i in range(len(images))] if labels is None else labels
    return Dataset.from_dict({"image": images, "labels": labels}, features=features)


def decoded(count=10, **settings):
    split = as_dataset(pillow_images(count, **settings))
    return DecodedImages(decode_images(DatasetDict(train=split))["train"])


def write_parquet(folder, features, columns, splits=("train", "test")):
    """A local data set in the layout of the Hub."""
    folder.mkdir()
    for split in splits:
        Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_columns_are_found_by_type(tmp_path):
    """Fault: only the names `image` and `label` are known, or class names are lost, or other columns stay."""
    labels = ClassLabel(names=["cat", "dog"])
    path = write_parquet(
        tmp_path / "set",
        {"id": Value("int64"), "img": datasets.Image(), "kind": labels},
        {"id": [5, 6], "img": pillow_images(2), "kind": [1, 0]},
    )
    splits = load_image_dataset(path)
    assert set(splits) == {"train", "test"}
    assert splits["test"].features["labels"] == labels
    assert splits["train"].column_names == ["image", "labels"]
    assert splits["train"]["labels"][:] == [1, 0]


def test_ambiguous_columns_are_listed(tmp_path):
    """Fault: training on the coarse labels of CIFAR-100 because they come first."""
    path = write_parquet(
        tmp_path / "set",
        {
            "img": datasets.Image(),
            "fine_label": ClassLabel(names=["oak", "elm"]),
            "coarse_label": ClassLabel(names=["tree"]),
        },
        {"img": pillow_images(2), "fine_label": [1, 0], "coarse_label": [0, 0]},
    )
    with pytest.raises(ValueError, match=r"label_column must be set.*'fine_label', 'coarse_label'"):
        load_image_dataset(path)
    with pytest.raises(ValueError, match=r"label_column='fine' is not a column .*'fine_label'"):
        load_image_dataset(path, label_column="fine")
    splits = load_image_dataset(path, label_column="fine_label")
    assert splits["train"].features["labels"].names == ["oak", "elm"]


def test_missing_images_are_refused(tmp_path):
    """Fault: a KeyError."""
    path = write_parquet(tmp_path / "set", {"kind": ClassLabel(names=["a", "b"])}, {"kind": [0, 1]})
    with pytest.raises(ValueError, match="image_column must be set: no column"):
        load_image_dataset(path)


def test_plain_labels_have_the_same_number_in_every_split(tmp_path):
    """Fault: strings numbered split by split, so that "dog" is 1 in training and 0 in the test."""
    folder = tmp_path / "set"
    folder.mkdir()
    features = Features({"image": datasets.Image(), "kind": Value("string")})
    for split, kinds in {"train": ["cat", "dog", "cat"], "test": ["dog", "dog", "dog"]}.items():
        columns = {"image": pillow_images(3), "kind": kinds}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    splits = load_image_dataset(str(folder), label_column="kind")
    assert splits["train"].features["labels"].names == ["cat", "dog"]
    assert splits["train"]["labels"][:] == [0, 1, 0]
    assert splits["test"]["labels"][:] == [1, 1, 1]


def test_validation_stands_in_for_a_test_split(tmp_path):
    """Fault: a held-out split that is there is not found, and training images are held out in its place."""
    columns = {"image": pillow_images(3), "label": [0, 1, 0]}
    splits = load_image_dataset(write_parquet(tmp_path / "set", TWO_CLASSES, columns, splits=("train", "validation")))
    assert (len(splits["train"]), len(splits["test"])) == (3, 3)


def test_imagefolder_without_test_split_holds_out_a_fifth(tmp_path):
    """Fault: evaluation on training images, on other images in every run, or without a class."""
    for name in ("cat", "dog"):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for i, image in enumerate(pillow_images(10, seed=len(name))):
            image.save(folder / f"{i}.png")
    splits = load_image_dataset(str(tmp_path / "set"))
    again = load_image_dataset(str(tmp_path / "set"))
    assert (len(splits["train"]), len(splits["test"])) == (16, 4)
    assert sorted(splits["test"]["labels"]) == [0, 0, 1, 1]
    assert [im.tobytes() for im in splits["test"]["image"]] == [im.tobytes() for im in again["test"]["image"]]


def test_digits_need_no_network():
    """Fault: 16 grey levels left in the darkest sixteenth of a byte, or a split that favours a class."""
    splits = load_image_dataset("digits")
    images = DecodedImages(decode_images(splits)["train"])
    assert (len(splits["train"]), len(splits["test"])) == (1437, 360)
    assert images.image_shape == (1, 8, 8)
    assert int(images[0]["pixel_values"].max()) == 255
    assert np.bincount(splits["test"]["labels"]).min() >= 34
    assert images.label_names == [str(digit) for digit in range(10)]


def test_digits_without_scikit_learn(monkeypatch):
    """Fault: an ImportError that does not name the extra."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"smoot-hf\[recipes\]"):
        load_image_dataset("digits")


@pytest.mark.parametrize("name", ["someone/something", "./not-there"])
def test_unreachable_data_are_one_line(name):
    """Fault: a page of traceback that does not say what to do without network."""
    with pytest.raises(OSError, match="--dataset takes a local directory") as error:
        load_image_dataset(name)
    assert "\n" not in str(error.value)


def test_data_without_training_split_are_refused(tmp_path):
    """Fault: training on the test images."""
    columns = {"image": pillow_images(2), "label": [0, 1]}
    path = write_parquet(tmp_path / "set", TWO_CLASSES, columns, splits=("test",))
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        load_image_dataset(path)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("RGBA", 3), ("CMYK", 3)])
def test_modes_become_one_or_three_channels(mode, channels):
    """Fault: palette numbers taken for grey values, a fourth channel, width and height exchanged."""
    images = pillow_images(3, mode)
    got = DecodedImages(decode_images(DatasetDict(train=as_dataset(images)))["train"]).__getitems__([0, 1, 2])
    assert got["pixel_values"].shape == (3, channels, 4, 5)
    for image, pixels in zip(images, got["pixel_values"], strict=True):
        # CMYK and RGBA are stored as JPEG and PNG: what counts is what HF Datasets reads back.
        stored = as_dataset([image])[0]["image"].convert("L" if channels == 1 else "RGB")
        expected = np.asarray(stored).reshape(4, 5, channels).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels.numpy(), expected)


def test_grey_images_as_rgb():
    """Fault: one channel, which a pretrained model refuses."""
    images = pillow_images(2, "L")
    rgb = DecodedImages(decode_images(DatasetDict(train=as_dataset(images)), convert_rgb=True)["train"])
    assert rgb.image_shape == (3, 4, 5)
    assert torch.equal(rgb[1]["pixel_values"][0], rgb[1]["pixel_values"][2])


def test_sixteen_bits_are_refused():
    """Fault: cut to 8 bits, white everywhere."""
    image = Image.fromarray(np.full((4, 5), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode_images(DatasetDict(train=as_dataset([image])))


def test_second_decoding_reads_the_cache(tmp_path, monkeypatch):
    """Fault: every run decodes anew, or keeps the pixels in memory."""
    path = write_parquet(tmp_path / "set", TWO_CLASSES, {"image": pillow_images(4), "label": [0, 1, 0, 1]})
    first = decode_images(load_image_dataset(path))["train"]
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.arrow")}
    second = decode_images(load_image_dataset(path))["train"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.arrow")} == written
    assert second.cache_files == first.cache_files != []


@pytest.mark.parametrize("chunk_bytes", [1, 200, 2**20])
def test_batches_are_the_images(chunk_bytes, monkeypatch):
    """Fault: rows exchanged where a batch takes from several pieces of the cache; 1 = one image a piece."""
    monkeypatch.setattr(data, "_CHUNK_BYTES", chunk_bytes)
    images = decoded(10)
    assert len(images._pieces) == {1: 10, 200: 4, 2**20: 1}[chunk_bytes]
    expected = np.stack([np.asarray(image).transpose(2, 0, 1) for image in pillow_images(10)])
    rows = [7, 0, 7, 9, -1, 3]
    batch = images.__getitems__(rows)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].dtype == torch.int64
    np.testing.assert_array_equal(batch["pixel_values"].numpy(), expected[rows])
    assert batch["labels"].tolist() == [1, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(images[4]["pixel_values"].numpy(), expected[4])
    assert (images[4]["labels"], len(images)) == (0, 10)
    assert images.__getitems__([])["pixel_values"].shape == (0, 3, 4, 5)


def test_selected_rows_are_the_data_set():
    """Fault: the stored rows in place of those that were selected or sliced."""
    whole = decoded(10)
    for selection in ([6, 2, 9], range(3, 8)):
        part = DecodedImages(whole.dataset.select(selection))
        assert len(part) == len(selection)
        expected = whole.__getitems__(list(selection))
        got = part.__getitems__(range(len(selection)))
        assert torch.equal(got["pixel_values"], expected["pixel_values"])
        assert torch.equal(got["labels"], expected["labels"])


@pytest.mark.parametrize("index", [10, -11])
def test_rows_outside_are_refused(index):
    """Fault: another image in place of an error."""
    with pytest.raises(IndexError, match="outside a data set of 10"):
        decoded(10)[index]


def test_a_batch_can_be_written_to():
    """Fault: a view of the read-only cache, which torch warns of and augmentation in place would break."""
    images = decoded(4)
    images.__getitems__([0, 1])["pixel_values"].zero_()
    assert int(images[0]["pixel_values"].max()) > 0


def test_loader_gives_whole_batches():
    """Fault: the default collator takes the batch for a list of samples; workers cannot receive the data set."""
    images = decoded(10)
    for workers in (0, 2):
        loader = DataLoader(images, batch_size=4, collate_fn=DecodedImages.collate, num_workers=workers)
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
        got = torch.cat([batch["pixel_values"] for batch in batches])
        assert torch.equal(got, images.__getitems__(range(10))["pixel_values"])


def test_collate_stacks_samples():
    """Fault: a loader without `__getitems__` (a Subset of a Subset) gets no batch."""
    images = decoded(4)
    stacked = DecodedImages.collate([images[i] for i in range(4)])
    whole = images.__getitems__(range(4))
    assert {key: value.dtype for key, value in stacked.items()} == {key: value.dtype for key, value in whole.items()}
    assert all(torch.equal(stacked[key], whole[key]) for key in whole)


def test_pickled_without_the_pixels(tmp_path, monkeypatch):
    """Fault: every worker receives a copy of all pixels."""
    columns = {"image": pillow_images(50, size=(40, 40)), "label": [0, 1] * 25}
    images = DecodedImages(
        decode_images(load_image_dataset(write_parquet(tmp_path / "set", TWO_CLASSES, columns)))["train"]
    )
    sent = pickle.dumps(images)
    received = pickle.loads(sent)
    assert len(sent) < 50 * 40 * 40
    assert torch.equal(received[49]["pixel_values"], images[49]["pixel_values"])
    assert received.fingerprint == images.fingerprint != None  # noqa: E711 - a chain


def test_channel_statistics_are_those_of_the_pixels(monkeypatch):
    """Fault: a mean of means of unequal pieces, the sample's deviation, channels mixed."""
    monkeypatch.setattr(data, "_CHUNK_BYTES", 200)
    images = decoded(10)
    pixels = images.__getitems__(range(10))["pixel_values"].double() / 255
    mean, std = images.channel_statistics()
    np.testing.assert_allclose(mean, pixels.mean(dim=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(dim=(0, 2, 3), correction=0), rtol=1e-12)


def test_data_that_cannot_be_trained_on_are_refused():
    """Fault: class -1 in the loss (test splits on the Hub often have it); images that are still encoded."""
    split = as_dataset(pillow_images(2), labels=[0, -1])
    with pytest.raises(ValueError, match="without a label"):
        DecodedImages(decode_images(DatasetDict(test=split, train=split))["test"])
    with pytest.raises(ValueError, match=r"columns .* of decode_images"):
        DecodedImages(split)
