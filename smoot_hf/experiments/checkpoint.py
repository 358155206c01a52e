"""Trained checkpoints, loaded for evaluation: model, input pipeline and K, and whether a data set fits them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..data import InputPipeline
from ..data.decoded_images import DecodedImages
from ..errors import first_line
from ..fingerprint import fingerprints_differ
from ..models.class_names import match_numbering
from ..models.logits import is_multi_label, refuse_multi_label
from ..training import MaskBudget
from ..training.checkpoint_folder import newest_whole_checkpoint
from ..training.mask_budget_file import MASK_BUDGET_NAME
from .flags import METHODS, RecipeArguments
from .run import RECORD_NAME, RunRecord
from .training_run import is_from_scratch, load_images


class Checkpoint(NamedTuple):
    """A model in evaluation mode and what brings uint8 images to its input."""

    model: Any
    pipeline: InputPipeline


def load_checkpoint(
    name: str, test: DecodedImages, device: torch.device | str, takes_several_labels: bool = False
) -> Checkpoint:
    """As `read_checkpoint`, and check that it classifies the images of `test`; its classes are numbered as theirs.

    Args:
        name: as in `read_checkpoint`.
        test: the images that it shall be evaluated on.
        device: where the model goes.
        takes_several_labels: whether the caller can do with several labels for an image.

    Raises:
        ValueError: the model belongs to other data, or has several labels for an image where the caller or the images
            have one.
        OSError: no such checkpoint.
    """
    model, pipeline = read_checkpoint(name, device)
    if not takes_several_labels:
        refuse_multi_label(model, f"{name}: this command shows and measures")
    if is_multi_label(model) != test.is_multi_label:
        model_has, images_have = ("several", "one") if is_multi_label(model) else ("one", "several")
        raise ValueError(f"{name} is a model of {model_has} label(s) an image, and the images have {images_have}")
    _check_fit(name, model, pipeline, test)
    return Checkpoint(model, replace(pipeline, is_resized=test.is_resized))


def read_checkpoint(name: str, device: torch.device | str) -> Checkpoint:
    """Load a folder or Hub id.

    Args:
        name: Hub id; folder of a saved model; or folder of a run, whose last checkpoint is taken where the run itself
            has saved no model yet.
        device: where the model goes.

    Raises:
        ValueError: its image processor does what the pipeline cannot; or the folder is that of a run that has saved
            nothing yet, whatever an earlier one has left there.
        OSError: no such checkpoint.
    """
    model = _loaded(AutoModelForImageClassification, saved_model(name)).eval().to(device)
    return Checkpoint(model, read_pipeline(name))


def read_pipeline(name: str) -> InputPipeline:
    """The input pipeline of a folder or Hub id alone; as `read_checkpoint`."""
    return InputPipeline.from_image_processor(_loaded(AutoImageProcessor, saved_model(name)))


def _loaded(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot load the checkpoint {name!r}: {first_line(error)}") from error


def saved_model(name: str) -> str:
    """A Hub id or the folder of a saved model; of a run that has saved no model yet, its last checkpoint."""
    folder = Path(name)
    is_unfinished = (folder / RECORD_NAME).is_file() and not RunRecord.load(folder).is_finished
    if not folder.is_dir() or ((folder / "config.json").is_file() and not is_unfinished):
        return name
    found = newest_whole_checkpoint(name)
    if found is None and is_unfinished:
        raise ValueError(f"{name} is the folder of a run that has saved nothing yet: let it reach a first checkpoint")
    return found or name


def recorded_images(run: Path, split: str, dataset: str | None = None) -> DecodedImages:
    """The "train" or "test" images of a run, or of one of its checkpoints, by the run's own record.

    Args:
        run: its folder.
        split: which images.
        dataset: where they are now, if not where the record says.

    Raises:
        ValueError: neither a record nor `dataset` says which images.
    """
    folder = next((folder for folder in (run, run.parent) if (folder / RECORD_NAME).is_file()), None)
    settings = (RunRecord.load(folder).settings or {}) if folder is not None else {}
    dataset = dataset or settings.get("dataset")
    if dataset is None:
        raise ValueError(f"{run} has no {RECORD_NAME} that says what it was trained on: give --dataset")
    recorded = RecipeArguments(**{name: settings[name] for name in vars(RecipeArguments()) if name in settings})
    # Of the training images one says the size of all; the others are decoded only where they are asked for.
    sizes = {"train": 1 if split == "test" else recorded.max_train_samples}
    pipeline = None if is_from_scratch(recorded) else read_pipeline(str(run))
    return load_images(recorded, dataset, sizes, pipeline)[split]


def _check_fit(name: str, model: Any, pipeline: InputPipeline, test: DecodedImages) -> None:
    """Number the classes as the data do; refuse other classes, channels or sizes, which would give wrong numbers."""
    match_numbering(model, test.label_names, name)
    channels, *native = test.image_shape
    if channels != len(pipeline.mean):
        raise ValueError(f"{name} takes {len(pipeline.mean)} channels, the images have {channels}: see --convert_rgb")
    # The paper's CNN and models from scratch were saved with the size of their training images.
    size = pipeline.crop_size or pipeline.size
    if model.config.model_type == "smoot_cnn" and isinstance(size, tuple) and list(size) != native:
        raise ValueError(f"{name} was trained on another data set: images of {size[0]}x{size[1]}, not "
                         f"{native[0]}x{native[1]}")  # fmt: skip


def load_budget(folder: Path, train: DecodedImages) -> MaskBudget:
    """K of every training image, from a checkpoint or from the last checkpoint of a run.

    Args:
        folder: of a checkpoint or a run.
        train: the images that it must have been trained on.

    Raises:
        ValueError: there is no K, or that of other images.
    """
    last = newest_whole_checkpoint(folder) if folder.is_dir() else None
    places = [folder, *([Path(last)] if last else [])]
    path = next((place / MASK_BUDGET_NAME for place in places if (place / MASK_BUDGET_NAME).is_file()), None)
    if path is None:
        raise ValueError(
            f"{folder} holds no checkpoint with {MASK_BUDGET_NAME}: train it by `smoot-hf train` with --method smoot "
            "or sgt, without --save_only_model"
        )
    budget = MaskBudget.load(path)
    is_other = fingerprints_differ(budget.dataset_fingerprint, train.fingerprint)
    if is_other or budget.num_samples != len(train) or budget.image_size != tuple(train.image_shape[1:]):
        height, width = budget.image_size
        raise ValueError(f"{folder} was trained on {budget.num_samples} other images, of {height}x{width} pixels")
    return budget


def named_checkpoints(paths: Sequence[str]) -> dict[str, str]:
    """Checkpoints by the method that trained them, or by the folder's name where that would not tell them apart.

    Methods are those of `METHODS`, whatever a run's record says: the record is checked when it is read.

    Raises:
        ValueError: two of one name, or a comparison without runs.
    """
    folders = [folder for path in paths for folder in _runs_of(path)]
    methods = [_method(folder) for folder in folders]
    names = [
        method if method is not None and methods.count(method) == 1 else _own_name(folder)
        for folder, method in zip(folders, methods, strict=True)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two of the checkpoints are called {twice!r}: rename a folder")
    return dict(zip(names, folders, strict=True))


def _runs_of(path: str) -> list[str]:
    """A checkpoint as it is; of a comparison the methods' runs of the lowest seed."""
    runs = Path(path) / "runs"
    if not runs.is_dir() or (Path(path) / "config.json").is_file():
        return [path]
    found = [(RunRecord.load(folder), folder) for folder in sorted(runs.iterdir()) if (folder / RECORD_NAME).is_file()]
    finished = [(record, folder) for record, folder in found if record.is_finished]
    if not finished:
        raise ValueError(f"{path} holds no finished run: run smoot-hf compare")
    first = min(record.seed for record, _ in finished)
    chosen = {record.method: str(folder) for record, folder in finished if record.seed == first}
    return [chosen[method] for method in METHODS if method in chosen]


def _own_name(path: str) -> str:
    """Of a folder, also where it is given as "." or "..", or the last part of a Hub id."""
    return (Path(path).resolve() if Path(path).is_dir() else Path(path)).name


def _method(folder: str) -> str | None:
    is_run = (Path(folder) / RECORD_NAME).is_file()
    return RunRecord.load(Path(folder)).method if is_run else None
