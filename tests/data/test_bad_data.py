"""Data that cannot be trained or evaluated on: the error names column, split, row or sample."""

import math

import datasets
import numpy as np
import pytest
import torch
from bad_input import FEATURES, Case, args_of, judge, png, train_recipe, trainer_of, write_imagefolder, write_parquet
from conftest import TinyImages, build
from datasets import ClassLabel, Features, IterableDataset, Value
from torch.utils.data import Subset

from smoot_hf import SmootTrainer, evaluate_faithfulness

GOOD = [png(i) for i in range(10)]
TURNS = [0, 1] * 5


def recipe(write, message, *argv, code=2):
    """`smoot-hf train` on the data set that `write(folder)` writes."""

    def attempt(folder):
        write(folder)
        train_recipe("--dataset", "{}/data", *argv)(folder)

    return Case(attempt, code, message)


def parquet(message, *argv, images=GOOD, labels=TURNS, **others):
    return recipe(lambda folder: write_parquet(folder, images, labels, **others), message, *argv)


def imagefolder(message, images, *argv, **others):
    return recipe(lambda folder: write_imagefolder(folder, images, **others), message, *argv)


def plain(value_type):
    return Features({"image": datasets.Image(), "label": Value(value_type)})


def torn_parquet(folder):
    (folder / "data").mkdir()
    (folder / "data" / "train.parquet").write_bytes(b"PAR1 and then nothing")


def two_classes(*more):
    return [("cat" if i % 2 else "dog", image) for i, image in enumerate(GOOD)] + list(more)


IN_RECIPES = {
    "corrupt bytes": parquet("row 9 of split 'train' cannot be decoded", images=[*GOOD[:9], b"no image"]),
    "truncated image": parquet(r"row 9 .*\(image file is truncated\)", images=[*GOOD[:9], GOOD[9][:60]]),
    "corrupt first image": parquet("row 0 of split 'train' cannot be decoded", images=[b"no image", *GOOD[1:]]),
    "null image": parquet(r"row 9 of split 'train' has no image \(null\)", images=[*GOOD[:9], None]),
    "corrupt file": imagefolder(r"row 1 .*cat/10.png\) cannot be decoded", two_classes(("cat", b"no image"))),
    "file of no bytes": imagefolder(r"cat/10.png\) cannot be decoded", two_classes(("cat", b""))),
    "ragged sizes": imagefolder(
        r"one size: .*\(3, 8, 8\).* row 1 of split 'train' \(train/cat/10.png\) is \(3, 9, 8\); set image_size",
        two_classes(("cat", png(1, (9, 8)))),
    ),
    "grey among colour": imagefolder(
        r"one size: .* \(train/cat/10.png\) is \(1, 8, 8\); set convert_rgb",
        two_classes(("cat", png(1, mode="L"))),
    ),
    "no rows": parquet("cannot load .*corresponds to no data", images=[], labels=[]),
    "no test rows": parquet('cannot load .*"test" corresponds to no data', test_labels=[]),
    "one sample, nothing held out": parquet("a fifth of the 1 images", images=GOOD[:1], labels=[0], splits=["train"]),
    "one sample a class, nothing held out": imagefolder(
        "cannot be held out .*add a split 'test'", [(f"class {i}", GOOD[i]) for i in range(10)], splits=["train"]
    ),
    "one class": parquet(
        "at least 2 classes, got num_labels=1", labels=[0] * 10,
        features=Features({"image": datasets.Image(), "label": ClassLabel(names=["cat"])}),
    ),
    "one class folder": imagefolder("the one folder 'cat'; make a folder for each", [("cat", image) for image in GOOD]),
    "label -1": parquet(
        r"'train' has 1 of 10 samples without a label \(-1\), the first in row 9: .*train_split",
        labels=[*TURNS[:9], -1], test_labels=TURNS,
    ),
    "label -1 in the test split": parquet(
        r"'test' has 1 of .* without a label \(-1\), .* row 9: .*eval_split", test_labels=[*TURNS[:9], -1]
    ),
    "label of no class": parquet(
        r"'test.parquet' .* \['0', .*\] and 1 more cannot be told by name among \['cat', 'dog'\]",
        test_labels=[*TURNS[:9], 5],
        test_features=Features({"image": datasets.Image(), "label": ClassLabel(num_classes=6)}),
    ),
    "null label": parquet(r"without a label \(null\)", "--label_column", "label", labels=[*TURNS[:9], None],
                          features=plain("int64")),
    "labels are fractions": parquet(
        r"integers or strings, got \[0.5, 1.0\]", "--label_column", "label", labels=[0.5, 1.0] * 5,
        features=plain("float32"),
    ),
    "no label column": parquet("label_column must be set", features=Features({"image": datasets.Image()})),
    "no image column": parquet("image_column must be set", features=Features({"label": FEATURES["label"]})),
    "images are numbers": parquet("image_column='label' must hold images", "--image_column", "label"),
    "no train split": parquet("no split 'train', only", splits=["test"]),
    "torn Parquet file": recipe(torn_parquet, "cannot load .*Parquet magic bytes"),
    "images too small for the model": imagefolder(
        "image_size must be at least 6 pixels, got 4", [("cat" if i % 2 else "dog", png(i, (4, 4))) for i in range(10)]
    ),
    "no such data set": Case(train_recipe("--dataset", "someone/something"), 2, "--dataset takes a local directory"),
}  # fmt: skip


class Altered(TinyImages):
    """Tiny images, one of whose samples is changed by a function of the item."""

    def __init__(self, change, at=0, **settings):
        super().__init__(**settings)
        self.change, self.at = change, at

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return self.change(item) if i == self.at else item


def changed(message, change, at=0, **overrides):
    """A first sample that is wrong, which is seen when the trainer is built; or a later one, in its batch."""

    def attempt(folder):
        trainer = trainer_of(folder, data=Altered(change, at), remove_unused_columns=False, **overrides)
        assert at > 0
        trainer.train()

    return Case(attempt, ValueError, message)


def with_pixels(change):
    return lambda item: item | {"pixel_values": change(item["pixel_values"])}


def with_label(label):
    return lambda item: item | {"labels": label}


def stream():
    items = [item | {"pixel_values": item["pixel_values"].tolist()} for item in TinyImages()]
    return IterableDataset.from_generator(lambda: iter(items)).with_format("torch")


def evaluated(message, change, method="evaluate"):
    """A wrong sample in the evaluation set; the training set is right."""
    return Case(lambda folder: getattr(trainer_of(folder), method)(Altered(change, 3)), ValueError, message)


def judged(message, dataset, **options):
    """`evaluate_faithfulness` on a wrong data set."""
    return Case(lambda folder: evaluate_faithfulness(build("vit"), dataset(), **options), ValueError, message)


def nan_at_a_pixel(pixels):
    return pixels.index_fill(2, torch.tensor(3), math.nan)


def photographs():
    """As a folder of images is loaded: nothing made ready for a model."""
    stored = {"image": [{"bytes": image, "path": None} for image in GOOD], "label": TURNS}
    return datasets.Dataset.from_dict(stored, features=FEATURES)


def pixels_of(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255


def transform(batch):
    return {"pixel_values": [pixels_of(image) for image in batch["image"]], "labels": batch["label"]}


def collate(samples):
    return {
        "pixel_values": torch.stack([pixels_of(sample["image"]) for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
    }


def as_samples(row_of):
    """A torch data set of the photographs, each sample a function of the row."""
    rows = photographs()
    return [row_of(rows[i]) for i in range(len(rows))]


def beginner(message, data, collator=None, **overrides):
    """What a first script gets wrong, for all methods alike."""

    def attempt(folder):
        args = args_of(folder, **overrides)
        trainer = SmootTrainer(build("vit"), args, train_dataset=data(), data_collator=collator)
        assert args.method == "standard"  # the other methods have looked at the first sample
        trainer.train()

    return Case(attempt, ValueError, message)


REMOVED = "the {} reads 'image', which the Trainer has removed .*set remove_unused_columns=False$"
READY = (
    r"set a transform or a data collator that makes them, tensors \(C, H, W\) under 'pixel_values', and remove_unused_"
)
BEGINNERS = {
    "a transform, its column removed": (REMOVED.format("transform"), lambda: photographs().with_transform(transform)),
    "a collator, its column removed": (REMOVED.format("data collator"), photographs, collate),
    "a collator of samples, their image removed": (REMOVED.format("data collator"), lambda: as_samples(dict), collate),
    "no transform": (f"have no 'pixel_values', only ..labels..: {READY}", photographs),
    "no transform, columns kept": (
        rf"no batch of the training samples, which are dicts of 'image' \(PngImageFile\), 'label' \(int\) .*: {READY}",
        photographs, None, {"remove_unused_columns": False},
    ),
    "images that are no tensors": (
        rf"which are dicts of 'pixel_values' \(PngImageFile\).*Could not infer dtype.*: {READY}",
        lambda: as_samples(lambda row: {"pixel_values": row["image"], "label": row["label"]}),
    ),
    "pairs": (
        f"samples, which are tuple .*: {READY}", lambda: as_samples(lambda row: (pixels_of(row["image"]), row["label"]))
    ),
    "all splits": (
        r"train_dataset is a DatasetDict of \['train', 'test'\].*pass one of them, .*train_dataset=data\['train'\]",
        lambda: datasets.DatasetDict(train=photographs(), test=photographs()),
    ),
}  # fmt: skip


def both_ways(name, message, data, collator=None, overrides=None):
    """When the trainer is built, which looks at the first sample for K; in standard training, at its first batch."""
    for method in ("smoot", "standard"):
        yield f"{name}, {method}", beginner(message, data, collator, **(overrides or {}), method=method)


OUTSIDE = r"evaluation set must lie in \[0, 3\].* one is {}: leave such samples out"

IN_PYTHON = {
    "no images": changed(r"no 'pixel_values', only \['labels'\]", lambda item: {"labels": item["labels"]}),
    "flat images": changed(r"shape \(B, C, H, W\), got \(1, 192\)", with_pixels(torch.flatten)),
    "uint8 images": changed("torch.uint8 with an input_pipeline", with_pixels(lambda x: x.to(torch.uint8))),
    "images of no pixels": changed(r"pixels, got images of 0x8 in .* \[0\]: leave", with_pixels(lambda x: x[:, :0])),
    "images of no pixels, standard": changed(
        "got images of 0x8", with_pixels(lambda x: x[:, :0]), at=17, method="standard", per_device_train_batch_size=1,
        max_steps=24,
    ),
    "NaN": changed(r"NaN or infinite values, in the training samples \[0\]: leave", with_pixels(nan_at_a_pixel)),
    "NaN later": changed(r"in the training samples \[17\]", with_pixels(nan_at_a_pixel), at=17),
    "infinity later, standard": changed(
        r"training samples \[17\]", with_pixels(lambda x: x + math.inf), at=17, method="standard"
    ),
    "several sizes in a batch": changed(
        r"one size, got .*\(3, 9, 8\) \(training sample 17\)", with_pixels(lambda x: torch.zeros(3, 9, 8)), at=17
    ),
    "grey images, model of colour": Case(
        lambda folder: trainer_of(folder, data=TinyImages(channels=1)),
        ValueError, "takes images of 3 channels, 'pixel_values' have 1",
    ),
    "no labels": changed(r"no 'labels', only \['pixel_values'\]", lambda item: {"pixel_values": item["pixel_values"]}),
    "label too large": changed(r"must lie in \[0, 3\].* training sample 0 has 4.*num_labels=", with_label(4)),
    "label too large later": changed("training sample 17 has 4", with_label(4), at=17),
    "label -1": changed("training sample 0 has -1. Leave out the samples", with_label(-1)),
    "label -100 later, standard": changed("training sample 17 has -100", with_label(-100), at=17, method="standard"),
    "soft label of another sum": changed(
        r"distribution over the classes.* training sample 0 has \[0.5, 0, 0, 0\]", with_label([0.5, 0.0, 0.0, 0.0])
    ),
    "sample_idx of its own": changed("'sample_idx' is attached by the trainer", lambda item: item | {"sample_idx": 0}),
    "empty": Case(lambda folder: trainer_of(folder, data=Subset(TinyImages(), [])), ValueError, "_dataset is empty"),
    "a stream": Case(
        lambda folder: trainer_of(folder, data=stream()), ValueError, "without length and index.*streaming=False"
    ),
    "evaluation label = num_labels": evaluated(OUTSIDE.format(4), with_label(4)),
    "evaluation label -1": evaluated(OUTSIDE.format(-1), with_label(-1)),
    "evaluation label -100": evaluated(OUTSIDE.format(-100), with_label(-100)),
    "label = num_labels in predict": evaluated(OUTSIDE.format(4), with_label(4), "predict"),
    "evaluation without images": Case(
        lambda folder: trainer_of(folder, remove_unused_columns=False).evaluate([{"image": 0, "labels": 0}] * 4),
        ValueError, r"the batch has no 'pixel_values', only \['image', 'labels'\]",
    ),
    "deletion AUC of a stream": Case(
        lambda folder: trainer_of(folder, eval_dataset=stream(), deletion_auc_samples=4), ValueError,
        "deletion_auc_samples=4 takes images .* no length and index",
    ),
    "deletion AUC of a stream given later": Case(
        lambda folder: trainer_of(folder, deletion_auc_samples=4).evaluate(stream()), ValueError,
        "deletion_auc_samples=4 takes images .* no length and index",
    ),
    "deletion AUC of nothing": Case(
        lambda folder: trainer_of(folder, eval_dataset=Subset(TinyImages(), []), deletion_auc_samples=4), ValueError,
        "deletion_auc_samples=4, but the evaluation set is empty",
    ),
    "faithfulness of nothing": judged("at least one image, got an empty one", lambda: Subset(TinyImages(), [])),
    "faithfulness of a stream": judged("must have a length and an index", stream),
    "faithfulness, label = num_labels": judged("classes of the model, 0 to 3", lambda: Altered(with_label(4))),
    "faithfulness, no label": judged("must hold 'labels', got None", lambda: Altered(with_label(None))),
}  # fmt: skip

IN_FIRST_SCRIPTS = dict(pair for name, case in BEGINNERS.items() for pair in both_ways(name, *case))

CASES = {f"recipe: {name}": case for name, case in IN_RECIPES.items()} | IN_PYTHON | IN_FIRST_SCRIPTS


def test_an_error_of_the_users_own_code_stays_what_it_is(quick_args):
    """Catches advice about columns where a transform or a collator fails for a reason of its own."""

    def fails(_):
        raise KeyError("temperature")

    rows = photographs().with_transform(fails)
    with pytest.raises(KeyError, match="temperature"):
        SmootTrainer(build("vit"), quick_args(), train_dataset=rows)
    with pytest.raises(KeyError, match="temperature"):
        SmootTrainer(build("vit"), quick_args(), train_dataset=TinyImages(), data_collator=fails)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, bad_input_folder, capsys):
    """Catches a device assertion, an index error or a NaN deep inside that does not say which sample it was."""
    judge(CASES[name], bad_input_folder, capsys)
