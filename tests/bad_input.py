"""A bad input and the error that it must give; how such inputs are made, and how each is judged.

The cases stand in the tables of tests/*/test_bad_*.py; `pytest tests/*/test_bad_*.py -k test_bad_input` counts them.
"""

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
from conftest import QUICK, TinyImages, build
from datasets import ClassLabel, Dataset, Features
from PIL import Image

from smoot_hf import SmootTrainer, SmootTrainingArguments
from smoot_hf.experiments import train

# A new training is to begin where a checkpoint of another lies, which must survive.
KEPT = QUICK | {"overwrite_output_dir": True}
# Written when a training begins.
ABOUT_THE_RUN = ("run.json", "run_identity.json")
ROOT = Path(__file__).parent.parent
FEATURES = Features({"image": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])})


class Case(NamedTuple):
    """`attempt(folder)`, with a folder to work in, ends in `kind`: an error's class, or a recipe's exit code."""

    attempt: Callable
    kind: type | int
    message: str


def judge(case, folder, capsys):
    """One line that matches; nothing that was saved in folder/run is changed or gone."""
    saved = contents(folder / "run")
    capsys.readouterr()
    if isinstance(case.kind, int):
        with pytest.raises(SystemExit) as stop:
            case.attempt(folder)
        assert stop.value.code == case.kind
        # Progress bars and warnings go before it.
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert ": error: " in line
    else:
        with pytest.raises(case.kind) as caught:
            case.attempt(folder)
        line = str(caught.value)
    assert "\n" not in line.strip()
    assert len(line) < 700
    assert re.search(case.message, line), line
    assert contents(folder / "run").items() >= saved.items()


def contents(folder):
    """Hash of every file of a model, a checkpoint or K below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ABOUT_THE_RUN]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def train_recipe(*argv):
    """An attempt to train by the command on a few images; "{}" in an argument is the folder."""

    def attempt(folder):
        quick = ["--use_cpu", "--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
        # The folder holds the checkpoint that must survive.
        quick += ["--overwrite_output_dir", "true"]
        defaults = {"dataset": "digits", "max_train_samples": 16, "max_eval_samples": 8}
        train.main(defaults, argv=[*quick, "--output_dir", str(folder / "run"), *(a.format(folder) for a in argv)])

    return attempt


def args_of(folder, **overrides):
    return SmootTrainingArguments(**KEPT | {"output_dir": str(folder / "run"), "max_steps": 3} | overrides)


def trainer_of(folder, model="vit", data=None, eval_dataset=None, trainer=SmootTrainer, **overrides):
    """A `SmootTrainer` on tiny images."""
    model = build(model) if isinstance(model, str) else model
    data = TinyImages() if data is None else data
    return trainer(model, args_of(folder, **overrides), train_dataset=data, eval_dataset=eval_dataset)


def png(seed, size=(8, 8), mode="RGB"):
    """The bytes of a PNG of noise."""
    shape = (*size, 3) if mode == "RGB" else size
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def write_parquet(
    folder, images, labels, test_labels=None, features=FEATURES, test_features=None, splits=("train", "test")
):
    """A data set of Parquet files at folder/data; images are bytes or `None`."""
    (folder / "data").mkdir()
    stored = [image if image is None else {"bytes": image, "path": None} for image in images]
    for split in splits:
        chosen = test_labels if split == "test" and test_labels is not None else labels
        kinds = test_features if split == "test" and test_features is not None else features
        columns = {"image": stored[: len(chosen)], "label": chosen}
        kept = {name: column for name, column in columns.items() if name in kinds}
        Dataset.from_dict(kept, features=kinds).to_parquet(str(folder / "data" / f"{split}.parquet"))


def write_imagefolder(folder, images, splits=("train", "test")):
    """A data set of image files at folder/data; `images` are pairs of a class and bytes."""
    for split in splits:
        for i, (name, image) in enumerate(images):
            place = folder / "data" / split / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").write_bytes(image)
