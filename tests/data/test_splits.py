"""Which splits of a data set are trained and evaluated on, and from which folders they come."""

import datasets
import pytest
from bad_input import png
from datasets import ClassLabel, Dataset, Features, Value

from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.data.decoded_images import DecodedImages, decode_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written beside the user's own data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_folder(folder, *places, count=5):
    """An imagefolder: so many images in every place."""
    for number, place in enumerate(places):
        (folder / place).mkdir(parents=True)
        for i in range(count):
            (folder / place / f"{i}.png").write_bytes(png(100 * number + i))
    return str(folder)


def write_splits(folder, label_type=None, **splits):
    """A Parquet file per split, of the labels given; a split of `None` has no column of labels."""
    folder.mkdir()
    for name, labels in splits.items():
        features = {"image": datasets.Image(), "label": label_type or ClassLabel(names=["cat", "dog"])}
        columns = {"image": [{"bytes": png(i), "path": None} for i in range(len(labels or "xx"))], "label": labels}
        if labels is None:
            del features["label"], columns["label"]
        Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / f"{name}.parquet")
    return str(folder)


LABELLED = ("train/cat", "train/dog", "validation/cat", "validation/dog")


@pytest.mark.parametrize("place", ["test", "test/unknown"])
def test_a_test_folder_without_classes_is_passed_over(place, tmp_path, caplog):
    """Fault: labels are dropped from all splits, and the error asks for class folders that are there."""
    path = write_folder(tmp_path / "set", *LABELLED, place)
    splits = load_image_dataset(path)
    assert splits["train"].features["labels"].names == ["cat", "dog"]
    assert sorted(splits["test"]["labels"]) == [0] * 5 + [1] * 5
    assert "without labels, which are passed over: ['test']" in caplog.text
    with pytest.raises(
        ValueError, match=r"no split 'test', only \['train', 'validation'\], .*without labels \['test'\]"
    ):
        load_image_dataset(path, eval_split="test")


def test_a_fifth_is_held_out_where_no_other_split_has_labels(tmp_path, caplog):
    """Fault: the usual download of a competition, train/ with classes and test/ without, cannot be trained on."""
    splits = load_image_dataset(write_folder(tmp_path / "set", "train/cat", "train/dog", "test"))
    assert (len(splits["train"]), len(splits["test"])) == (8, 2)
    assert sorted(splits["test"]["labels"]) == [0, 1]
    assert "['test']" in caplog.text


@pytest.mark.parametrize(
    ("missing", "label_type"),
    [([-1, -1], None), ([None, None], None), (None, None), ([-1, -1], Value("int32")), ([None, None], Value("string"))],
)
def test_a_split_without_labels_is_passed_over(missing, label_type, tmp_path, caplog):
    """Fault: the test split of many sets of the Hub, -1 throughout, ends the run; or -1 becomes a class."""
    labels = ["cat", "dog"] if label_type == Value("string") else [0, 1]
    path = write_splits(tmp_path / "set", label_type, train=labels * 2, validation=labels, test=missing)
    splits = load_image_dataset(path, label_column="label")
    assert splits["test"]["labels"][:] == [0, 1]
    assert len(splits["train"].features["labels"].names) == 2
    assert "['test']" in caplog.text
    with pytest.raises(ValueError, match=r"split 'test' has 2 of 2 samples without a label .* row 0: .* by eval_split"):
        load_image_dataset(path, label_column="label", eval_split="test")


@pytest.mark.parametrize("label_type", [None, Value("int64")])
@pytest.mark.parametrize(("split", "argument"), [("train", "train_split"), ("test", "eval_split")])
def test_single_samples_without_a_label_are_refused_by_row(split, argument, label_type, tmp_path):
    """Fault: -1 numbered as a class of its own, or an error that does not say where."""
    splits = {"train": [0, 1, 0, 1], "test": [0, 1, 1, 0]}
    splits[split][2] = -1
    path = write_splits(tmp_path / "set", label_type, **splits)
    named = rf"split '{split}' has 1 of 4 samples without a label \(-1\), the first in row 2: .* by {argument}"
    with pytest.raises(ValueError, match=named):
        load_image_dataset(path, label_column="label")


def test_two_classes_may_be_called_minus_one_and_one(tmp_path):
    """Fault: half of the samples of a data set that numbers its two classes -1 and 1 are called unlabelled."""
    path = write_splits(tmp_path / "set", Value("int64"), train=[-1, 1, -1, 1], test=[1, -1])
    splits = load_image_dataset(path, label_column="label")
    assert splits["train"].features["labels"].names == ["-1", "1"]
    assert splits["test"]["labels"][:] == [1, 0]


def test_splits_are_chosen_by_name(tmp_path):
    """Fault: evaluation on "test" where "validation" was asked for, or training on the wrong images."""
    path = write_splits(tmp_path / "set", train=[0, 1, 0, 1], validation=[1, 1, 0], test=[0, 1])
    lengths = {None: 2, "test": 2, "validation": 3, "train": 4}
    for name, length in lengths.items():
        assert len(load_image_dataset(path, eval_split=name)["test"]) == length
    assert len(load_image_dataset(path, train_split="validation")["train"]) == 3
    for argument in ("train_split", "eval_split"):
        with pytest.raises(ValueError, match=rf"no split 'dev', only \['train', .*'test'\]: set {argument}"):
            load_image_dataset(path, **{argument: "dev"})


@pytest.mark.parametrize("name", ["set [1]", "[ab]", "who?", "all *", "cats {and} dogs"])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_path_is_not_a_pattern(kind, name, tmp_path):
    """Fault: "doesn't contain any data files: mend or replace its files", of a second download's "set [1]"."""
    path = tmp_path / name
    if kind == "folder":
        write_folder(path, *LABELLED)
        # Its neighbour matches the name as a pattern.
        write_folder(tmp_path / "a", "train/eel", "train/emu")
    else:
        write_splits(path, train=[0, 1, 0, 1], validation=[1, 0])
    decoded = decode_images(load_image_dataset(str(path)))
    assert DecodedImages(decoded["train"]).label_names == ["cat", "dog"]
    assert len(decoded["train"]) == {"folder": 10, "parquet": 4}[kind]
    assert len(decoded["test"]) == {"folder": 10, "parquet": 2}[kind]
