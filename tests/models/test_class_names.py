"""Two numberings of the same classes meet by name: a checkpoint's head, files, splits, and the data of a run."""

import logging

import architectures
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import build
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import HfApi
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.data.decoded_images import DecodedImages, decode_images
from smoot_hf.models.class_names import class_names, match_numbering, numbers_by_name
from smoot_hf.models.classifier import load_model

THEIRS, OURS = ["ant", "bee", "cat", "dog"], ["dog", "ant", "cat", "bee"]
# One head, two heads, a norm behind it, a decoder, one of timm, ours.
HEADS = ["vit", "resnet", "deit/WithTeacher", "levit/WithTeacher", "perceiver", "swin", "efficientnet", "timm_wrapper"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written beside the user's own data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def named(model, names=THEIRS):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    return model.eval()


@torch.no_grad()
def logits_by_name(model, names, side):
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    logits = model.eval()(**{model.main_input_name: images}).logits
    return {name: logits[:, number] for number, name in enumerate(names)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len({tuple(logits.tolist()) for logits in one.values()}) == len(one)


@pytest.mark.parametrize("case", [c for c in architectures.cases() if c.name in HEADS], ids=lambda case: case.name)
def test_every_head_is_renumbered_by_name(case):
    """Fault: one of two heads left as it was, a bias or a norm without its class, or a layer that is no head."""
    torch.manual_seed(0)
    model = named(case.build())
    before = logits_by_name(model, THEIRS, case.side)
    match_numbering(model, OURS, "a checkpoint")
    assert class_names(model.config) == OURS
    assert model.config.label2id == {name: number for number, name in enumerate(OURS)}
    assert_same(logits_by_name(model, OURS, case.side), before)


def test_a_layer_as_wide_as_there_are_classes_is_no_head():
    """Fault: a head guessed by its width, where hidden layers have as many features."""
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4
    )
    config.num_labels = 4
    model = named(ViTForImageClassification(config))
    before = logits_by_name(model, THEIRS, 8)
    match_numbering(model, OURS, "a checkpoint")
    assert_same(logits_by_name(model, OURS, 8), before)


@pytest.mark.parametrize("name", ["vit", "resnet", "cnn", "timm"])
def test_a_checkpoint_of_the_same_classes_in_another_order_is_loaded_by_name(name, tmp_path):
    """Fault: training that starts with the rows of the head under the wrong names, an accuracy far below chance."""
    trained = named(build(name))
    trained.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), labels=OURS, image_size=(8, 8), num_channels=3)
    assert class_names(loaded.config) == OURS
    assert_same(logits_by_name(loaded, OURS, 8), logits_by_name(trained, THEIRS, 8))


@pytest.mark.parametrize(
    ("theirs", "warning"),
    [(THEIRS, None), ([f"LABEL_{i}" for i in range(4)], None), (["a", "b", "c", "ant"], "by number")],
)
def test_other_rows_stay_where_they_are(theirs, warning, tmp_path, caplog):
    """Fault: rows permuted where no name says how; other classes taken over without a word."""
    trained = named(build("vit"), theirs)
    trained.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    loaded = load_model(str(tmp_path), labels=THEIRS, image_size=(8, 8), num_channels=3)
    assert_same(logits_by_name(loaded, THEIRS, 8), logits_by_name(trained, THEIRS, 8))
    warned = [record.getMessage() for record in caplog.records if "smoot_hf" in record.name]
    assert len(warned) == (warning is not None)
    assert all(warning in message for message in warned)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (["ant", "bee", "cat"], "3 classes, not 4"),
        (["eel", "ant", "bee", "cat"], r"another order .*\['eel', 'ant', 'bee', 'cat'\] there, \['ant', 'bee', 'cat'"),
        (["bee", "ant", "bee", "dog"], "another order"),
    ],
)
def test_classes_that_cannot_be_told_by_name_are_not_evaluated(theirs, message):
    """Fault: a number for a checkpoint of other data, or for classes that are half of them exchanged."""
    model = named(build("vit", id2label=dict(enumerate(theirs))), theirs)
    with pytest.raises(ValueError, match=message):
        match_numbering(model, THEIRS, "a checkpoint")


@pytest.mark.parametrize("names", [["a", "a"], ["a", "c"]])
def test_names_that_are_missing_or_twice_are_refused(names):
    """Fault: the last of two classes of one name taken for both."""
    with pytest.raises(ValueError, match=r"cannot be told by name among \['a', 'b'\]"):
        numbers_by_name(names, ["a", "b"])


def test_evaluation_does_not_depend_on_how_the_data_number_their_classes(tmp_path):
    """Fault: the recipes refuse, or measure as other classes, data whose folders are sorted otherwise."""
    from smoot_hf.experiments import checkpoint as checkpoints

    named(build("vit")).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    results = []
    for names in (THEIRS, OURS):
        split = numbered_split([THEIRS[i % 4] for i in range(12)], names)
        test = DecodedImages(decode_images(DatasetDict(train=split))["train"])
        model, pipeline = checkpoints.load_checkpoint(str(tmp_path / "model"), test, "cpu")
        images = pipeline.prepare_evaluation(test.__getitems__(range(12))["pixel_values"])
        logits = model(images).logits
        results.append([logits[row, number].item() for row, number in enumerate(test.labels)])
    assert results[0] == results[1]


def pictures(count):
    return [Image.fromarray(np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)) for i in range(count)]


def numbered_split(kinds, names):
    """A split whose class labels are numbered by `names`; "?" is a sample without a label."""
    features = Features({"image": datasets.Image(), "labels": ClassLabel(names=names)})
    numbers = [names.index(kind) if kind in names else -1 for kind in kinds]
    return Dataset.from_dict({"image": pictures(len(kinds)), "labels": numbers}, features=features)


def write_files(folder, files, suffix="parquet"):
    """Files of `kinds` and `names` each, as `class_encode_column` of every one by itself leaves them."""
    folder.mkdir()
    for file, (kinds, names) in files.items():
        split = numbered_split(kinds, names).rename_column("labels", "kind")
        path = str(folder / f"{file}.{suffix}")
        if suffix == "parquet":
            split.to_parquet(path)
        else:
            with datasets.arrow_writer.ArrowWriter(path=path, features=split.features) as writer:
                writer.write_table(split.data.table)
                writer.finalize()
    return str(folder)


def kinds_of(split):
    return [split.features["labels"].names[number] for number in split["labels"]]


FILES = {
    "another order in the test split": {
        "train": (["ant", "bee", "cat"], ["ant", "bee", "cat"]),
        "test": (["cat", "bee", "ant", "ant"], ["cat", "ant", "bee"]),
    },
    "a class missing from the test split": {
        "train": (["ant", "bee", "cat"], ["ant", "bee", "cat"]),
        "test": (["cat", "ant", "cat"], ["ant", "cat"]),
    },
    "another order within a split": {
        "train-00000-of-00002": (["ant", "bee"], ["ant", "bee"]),
        "train-00001-of-00002": (["ant", "ant", "bee"], ["bee", "ant"]),
        "test-00000-of-00001": (["bee", "ant"], ["bee", "ant"]),
    },
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("files", FILES)
def test_files_that_number_their_classes_differently_keep_their_meaning(files, suffix, tmp_path):
    """Fault: the first file's names taken for all, so that test labels are read as other classes."""
    path = write_files(tmp_path / "set", FILES[files], suffix)
    splits = load_image_dataset(path)
    for name in ("train", "test"):
        meant = [kind for file, (kinds, _) in sorted(FILES[files].items()) if file.startswith(name) for kind in kinds]
        assert kinds_of(splits[name]) == meant
    assert splits["train"].features == splits["test"].features


def test_a_class_that_the_first_file_does_not_know_is_refused(tmp_path):
    """Fault: a class read as another, or an index out of range far away."""
    files = {"train": (["ant", "bee"], ["ant", "bee"]), "test": (["eel", "ant"], ["ant", "eel"])}
    with pytest.raises(ValueError, match=r"test\.parquet.*\['ant', 'eel'\] .* among \['ant', 'bee'\]; give all"):
        load_image_dataset(write_files(tmp_path / "set", files))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_files_of_the_hub_keep_their_meaning_with_and_without_network(hub, tmp_path, monkeypatch):
    """Fault: a check that local files alone have; or that is gone once the data come from the cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    files = FILES["another order in the test split"]
    name = "tester/insects"
    HfApi().create_repo(name, repo_type="dataset")
    HfApi().upload_folder(folder_path=write_files(tmp_path / "set", files), repo_id=name, repo_type="dataset")
    assert kinds_of(load_image_dataset(name)["test"]) == files["test"][0]
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert kinds_of(load_image_dataset(name)["test"]) == files["test"][0]


def test_splits_that_number_their_classes_differently_are_decoded_by_name():
    """Fault: a `DatasetDict` put together in memory, of which the training split's names are taken for all."""
    splits = DatasetDict(train=numbered_split(["ant", "bee"], ["ant", "bee"]), test=numbered_split(["bee"], ["bee"]))
    decoded = decode_images(splits)
    assert kinds_of(decoded["test"]) == ["bee"]
    assert DecodedImages(decoded["test"]).label_names == ["ant", "bee"]
    splits["test"] = numbered_split(["eel"], ["eel"])
    with pytest.raises(ValueError, match=r"split 'test' .*\['eel'\] .* among \['ant', 'bee'\]"):
        decode_images(splits)


@pytest.mark.parametrize("value_type", ["string", "int64"])
def test_plain_labels_are_numbered_alike_whichever_split_is_chosen(value_type, tmp_path):
    """Fault: numbers that depend on which held-out split a run was evaluated on."""
    kinds = {"train": ["1", "3"], "test": ["3", "1"], "validation": ["3", "2"]}
    folder = tmp_path / "set"
    folder.mkdir()
    for split, found in kinds.items():
        labels = found if value_type == "string" else [int(kind) for kind in found]
        features = Features({"image": datasets.Image(), "kind": Value(value_type)})
        Dataset.from_dict({"image": pictures(2), "kind": labels}, features=features).to_parquet(
            folder / f"{split}.parquet"
        )
    for split in ("test", "validation"):
        splits = load_image_dataset(str(folder), label_column="kind", eval_split=split)
        assert kinds_of(splits["train"]) == kinds["train"]
        assert kinds_of(splits["test"]) == kinds[split]
        assert splits["train"].features["labels"].names == ["1", "2", "3"]


def test_a_label_of_no_class_is_refused(tmp_path):
    """Fault: a class beyond the names of its own file, read as none or as the last."""
    numbers = numbered_split(["ant", "bee"], ["ant", "bee"]).rename_column("labels", "label")
    (tmp_path / "set").mkdir()
    numbers.to_parquet(tmp_path / "set" / "train.parquet")
    table = numbered_split(["bee", "ant", "eel"], ["bee", "ant", "eel"]).rename_column("labels", "label").data.table
    schema = numbered_split(["bee"], ["bee", "ant"]).rename_column("labels", "label").features.arrow_schema
    pq.write_table(table.cast(table.schema.with_metadata(schema.metadata)), tmp_path / "set" / "test.parquet")
    with pytest.raises(ValueError, match=r"'test\.parquet' has samples of class 2, but only 2 classes"):
        load_image_dataset(str(tmp_path / "set"))
