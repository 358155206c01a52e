"""Folders of image files: which of their folders are splits and which are classes, or why nobody can tell."""

import os

import datasets
import pytest
from bad_input import png

from smoot_hf.data.dataset import load_image_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written beside the user's own data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, *places, count=5):
    """So many images in every place."""
    for number, place in enumerate(places):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / place / f"{i}.png").write_bytes(png(100 * number + i))
    return str(folder)


def both(*folders):
    return [f"{folder}/{name}" for folder in folders for name in ("cat", "dog")]


def folders_of(split, root):
    return {os.path.relpath(os.path.dirname(row["path"]), root) for row in split.cast_column("image", RAW)["image"]}


RAW = datasets.Image(decode=False)

TRAIN_AND_TEST = {
    "as in the documentation": ("train", "test", "test"),
    "capitals": ("Train", "TEST", "test"),
    "other words": ("training", "testing", "test"),
    "with set": ("training_set", "test-set", "test"),
    "val": ("train", "Val", "validation"),
    "valid": ("train", "valid", "validation"),
    "validation": ("train", "Validation", "validation"),
    "dev": ("train", "dev", "validation"),
}


@pytest.mark.parametrize("kind", TRAIN_AND_TEST)
def test_split_folders_are_found_by_the_names_that_people_give_them(kind, tmp_path, caplog):
    """Fault: the images of Test/ are trained on, since only lower case is known; or a fifth is held out of all."""
    train, held_out, split = TRAIN_AND_TEST[kind]
    folder = write(tmp_path / "set", *both(train, held_out))
    splits = load_image_dataset(folder)
    assert folders_of(splits["train"], folder) == set(both(train))
    assert folders_of(splits["test"], folder) == set(both(held_out))
    assert len(load_image_dataset(folder, eval_split=split)["test"]) == 10
    assert not caplog.records


@pytest.mark.parametrize("inside", ["", "photos", "photos/of/animals"])
def test_three_splits_in_a_folder_of_folders(inside, tmp_path, caplog):
    """Fault: the names of the archive's own folders become classes, validation images that are counted as test images,
    or left out without a word.
    """
    folder = write(tmp_path / "set" / inside, *both("train", "val", "test"))
    splits = load_image_dataset(str(tmp_path / "set"))
    assert folders_of(splits["test"], folder) == set(both("test"))
    assert "the images of 'validation' are not used, neither in training nor in evaluation" in caplog.text
    caplog.clear()
    asked = load_image_dataset(str(tmp_path / "set"), eval_split="validation")
    assert folders_of(asked["test"], folder) == set(both("val"))
    assert not caplog.records


def test_names_of_files_and_of_classes_do_not_make_splits(tmp_path, caplog):
    """Fault: dog/test_3.png is a test image, and a class called "train station" the training split."""
    folder = tmp_path / "set"
    for name, file in {"train station": "val_{}.png", "test tube": "train_{}.png", "dog": "test_{}.png"}.items():
        (folder / name).mkdir(parents=True)
        for i in range(5):
            (folder / name / file.format(i)).write_bytes(png(i))
    splits = load_image_dataset(str(folder))
    assert splits["train"].features["labels"].names == ["dog", "test tube", "train station"]
    assert (len(splits["train"]), len(splits["test"])) == (12, 3)
    assert "a fifth of 'train' is held out as 'test'" in caplog.text


def test_folders_below_a_class_belong_to_it(tmp_path):
    """Fault: photographs sorted by year or camera end in classes of that name, or in none."""
    folder = write(tmp_path / "set", "cat", "cat/2023", "cat/2024/may", "dog")
    splits = load_image_dataset(folder)
    assert splits["train"].features["labels"].names == ["cat", "dog"]
    assert len(splits["train"]) + len(splits["test"]) == 20


def test_hidden_files_are_left_out_and_others_named(tmp_path, caplog):
    """Fault: the copies that macOS puts beside every file are taken for images; photographs of a phone go unnoticed."""
    folder = write(tmp_path / "set", "cat", "dog", "__MACOSX/cat", ".cache/dog")
    for name in ("._0.png", "Thumbs.db", "notes.txt", "IMG_1.HEIC"):
        (tmp_path / "set" / "cat" / name).write_bytes(b"?")
    splits = load_image_dataset(folder)
    assert len(splits["train"]) + len(splits["test"]) == 10
    assert (
        caplog.records[0]
        .getMessage()
        .endswith("left out, since they are no image files that Pillow reads: cat/IMG_1.HEIC")
    )


REFUSED = {
    "no images": ([".hidden"], "cannot load the data set .*a folder for each class with image files"),
    "no class": ([""], "set: no image is in a folder; make a folder for each class, two or more"),
    "no class in train": (["train", "test"], "set/train: no image is in a folder; make a folder for each class"),
    "one class": (["cat"], "set: all images are in the one folder 'cat'; make a folder for each class"),
    "one training class": (["train/cat", *both("test")], "set/train: all images are in the one folder 'cat'"),
    "images beside the classes": (
        ["", "cat", "dog"],
        "5 images lie in .*set, beside .*: 0.png, 1.png, 2.png and 2 more",
    ),
    "test images beside the classes": ([*both("train", "test"), "test"], "5 images lie in .*set/test, beside"),
    "a class of the test images alone": (
        [*both("train", "test"), "test/eel"],
        r"5 images of split 'test' in .*set/test are of a class without training images, 'eel'.*\['cat', 'dog'\]",
    ),
    "test beside classes": (["cat", "dog", "Test"], r"set has \['Test'\] beside other folders, but no folder 'train'"),
    "two for one split": (both("train", "val", "valid"), r"folders for the split 'validation', \['val', 'valid'\]"),
    "no training images": (both("val", "test"), r"no split 'train', only \['test', 'validation'\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_that_cannot_be_meant_is_one_sentence(kind, tmp_path):
    """Fault: advice about columns, which a folder of images has not; or classes that the model never saw."""
    places, message = REFUSED[kind]
    folder = write(tmp_path / "set", *places)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_image_dataset(folder)
    assert "\n" not in str(error.value)


def test_other_folders_beside_the_splits_are_named(tmp_path, caplog):
    """Fault: images that nobody trains on, without a word."""
    folder = write(tmp_path / "set", *both("train", "test"), "unsorted")
    splits = load_image_dataset(folder)
    assert (len(splits["train"]), len(splits["test"])) == (10, 10)
    assert "left out, since they lie in no folder of a split: unsorted/0.png, unsorted/1.png" in caplog.text


@pytest.mark.parametrize("what", ["time", "size"])
def test_a_changed_file_is_read_again(what, tmp_path):
    """Fault: yesterday's rows out of the cache, after a file was replaced by one of the same time or the same size."""
    folder = write(tmp_path / "set", *both("train", "test"))
    first = load_image_dataset(folder)["train"].cache_files
    assert load_image_dataset(folder)["train"].cache_files == first
    file = tmp_path / "set" / "train" / "cat" / "0.png"
    before = file.stat()
    if what == "size":
        file.write_bytes(png(7, (20, 20)))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load_image_dataset(folder)["train"].cache_files != first


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # HF Datasets leaves the file open
def test_what_hf_datasets_reads_is_left_to_it(tmp_path):
    """Fault: labels that stand in a metadata file are replaced by the names of folders."""
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    names = [f"{i}.png" for i in range(10)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(png(i))
    lines = [f"{name},{'cat' if i % 2 else 'dog'}" for i, name in enumerate(names)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *lines]))
    splits = load_image_dataset(str(tmp_path / "set"), label_column="kind")
    assert splits["train"].features["labels"].names == ["cat", "dog"]
