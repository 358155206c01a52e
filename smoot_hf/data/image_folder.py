"""A folder of image files: which splits and classes its folders say, and its images as an HF data set."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

logger = logging.getLogger(__name__)

_SUFFIXES = {*ImageFolder.EXTENSIONS, ".avif"}
# Where such files lie, the labels stand in them, or the images are packed: HF Datasets reads these folders.
_DATA_SUFFIXES = {".parquet", ".arrow", ".zip", ".tar", ".gz", ".tgz"}
# How people call the folders of a split, in capitals or not, and with "set" behind it or not.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
# Written by file managers, or text about the images.
_NO_IMAGES = {"thumbs.db", "desktop.ini", ".txt", ".md", ".csv", ".json", ".pdf", ".html"}
_NAMED_AT_MOST = 3


class _Split(NamedTuple):
    """A split's folder, and its images by their paths below it, in order."""

    folder: Path
    images: list[PurePosixPath]

    def classes(self) -> set[str]:
        """Names of its class folders."""
        return {name for image in self.images if (name := _class_of(image)) is not None}


def load_image_folder(folder: Path, train_split: str) -> tuple[DatasetDict, list[str]] | None:
    """The images of a folder that has a folder for each class, or for each split and, in it, for each class.

    The class is the first folder below that of the split, as in torchvision's `ImageFolder`. A folder that holds only
    one other folder stands for that. Hidden files and those whose suffix is of no image are left out.

    Args:
        folder: an existing folder.
        train_split: whose folders are the classes.

    Returns:
        The splits ("train", "validation", "test") with the columns "image" (path of the file) and "label", rows in the
        order of the paths; and the names of the splits that are left out, since none of their images lies in the
        folder of a training class. `None` where HF Datasets is to read the folder: it holds no images, or data files.

    Raises:
        ValueError: no class, one class, images beside the class folders, a class that the training split has not, or
            two folders for one split; naming folder and files.
    """
    files = sorted(_files(folder), key=str)
    images = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not images or any(_is_data(folder, file) for file in files):
        return None
    _warn_of_others(folder, [file for file in files if file.suffix.lower() not in _SUFFIXES])
    splits = _by_split(*_innermost(folder, images))
    if train_split not in splits:
        raise ValueError(f"{folder} has no split {train_split!r}, only {list(splits)}: set train_split")
    _check_training(splits[train_split])
    classes = splits[train_split].classes()
    unlabelled = [name for name, split in splits.items() if split.classes().isdisjoint(classes)]
    labelled = {name: split for name, split in splits.items() if name not in unlabelled}
    for name, split in labelled.items():
        _check_classes(name, split, classes)
    return DatasetDict({name: _rows_of(name, split, sorted(classes)) for name, split in labelled.items()}), unlabelled


def _files(folder: Path) -> Iterator[PurePosixPath]:
    """Paths below the folder of all files that are not hidden."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            if not name.startswith("."):
                yield PurePosixPath(Path(place, name).relative_to(folder).as_posix())


def _is_data(folder: Path, file: PurePosixPath) -> bool:
    if file.name == "README.md":
        # Its head may say which files belong to which split.
        return (folder / file).read_text(encoding="utf-8", errors="replace").startswith("---")
    return file.suffix.lower() in _DATA_SUFFIXES or file.name in ImageFolder.METADATA_FILENAMES


def _warn_of_others(folder: Path, others: list[PurePosixPath]) -> None:
    """Name the files that could be meant as images, such as those of a phone (.heic)."""
    others = [file for file in others if not {file.name.lower(), file.suffix.lower()} & _NO_IMAGES]
    if others:
        logger.warning("%s: left out, since they are no image files that Pillow reads: %s", folder, _first(others))


def _first(files: list[PurePosixPath]) -> str:
    """The first few names and how many there are."""
    named = ", ".join(map(str, files[:_NAMED_AT_MOST]))
    return named if len(files) <= _NAMED_AT_MOST else f"{named} and {len(files) - _NAMED_AT_MOST} more"


def _innermost(root: Path, images: list[PurePosixPath]) -> tuple[Path, list[PurePosixPath]]:
    """The folder that holds several ones, or those of splits: archives are often unpacked into a folder of a folder."""
    while (
        len({file.parts[0] for file in images}) == 1
        and all(len(file.parts) > 2 for file in images)
        and _split_of(images[0].parts[0]) is None
    ):
        root, images = root / images[0].parts[0], [PurePosixPath(*file.parts[1:]) for file in images]
    return root, images


def _split_of(name: str) -> str | None:
    """The split that a folder's name stands for."""
    bare = re.sub(r"[-_ ]?(set|images|data)$", "", name.lower())
    return next((split for split, names in _SPLIT_NAMES.items() if bare in names), None)


def _by_split(root: Path, images: list[PurePosixPath]) -> dict[str, _Split]:
    """The splits that folders are called after; where none is, all images are "train"."""
    folders = sorted({file.parts[0] for file in images if len(file.parts) > 1})
    split_of = {name: split for name in folders if (split := _split_of(name)) is not None}
    if not split_of:
        return {"train": _Split(root, images)}
    twice = next((split for split, count in Counter(split_of.values()).items() if count > 1), None)
    if twice is not None:
        both = [name for name, split in split_of.items() if split == twice]
        raise ValueError(f"{root} has several folders for the split {twice!r}, {both}: keep one of them")
    others = [file for file in images if file.parts[0] not in split_of]
    if others and "train" not in split_of.values():
        raise ValueError(
            f"{root} has {list(split_of)} beside other folders, but no folder 'train': move the class folders of the "
            "training images into one; or, if that is a class, call it otherwise"
        )
    if others:
        logger.warning("%s: left out, since they lie in no folder of a split: %s", root, _first(others))
    below = {name: [PurePosixPath(*file.parts[1:]) for file in images if file.parts[0] == name] for name in split_of}
    return {split: _Split(root / name, below[name]) for name, split in split_of.items()}


def _class_of(image: PurePosixPath) -> str | None:
    """The class folder of an image, by its path below the split; `None` if it lies in none."""
    return image.parts[0] if len(image.parts) > 1 else None


def _check_training(split: _Split) -> None:
    classes = split.classes()
    if len(classes) < 2:
        found = f"all images are in the one folder {classes.pop()!r}" if classes else "no image is in a folder"
        raise ValueError(f"{split.folder}: {found}; make a folder for each class, two or more, with its images")


def _check_classes(name: str, split: _Split, known: set[str]) -> None:
    """Every image lies in the folder of a training class."""
    loose = [image for image in split.images if _class_of(image) is None]
    if loose:
        raise ValueError(
            f"{len(loose)} images lie in {split.folder}, beside the folders of the classes: {_first(loose)}; move each "
            "into the folder of its class"
        )
    unknown = [image for image in split.images if _class_of(image) not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} images of split {name!r} in {split.folder} are of a class without training images, "
            f"{_class_of(unknown[0])!r}: remove its folder, or add training images (classes: {sorted(known)[:10]})"
        )


def _rows_of(name: str, split: _Split, classes: list[str]) -> Dataset:
    """Rows on disk, in the cache of HF Datasets; anew where a file has another time or size than before."""
    files = [split.folder.absolute() / image for image in split.images]
    stamps = [(status.st_mtime_ns, status.st_size) for status in map(os.stat, files)]
    number = {name: index for index, name in enumerate(classes)}
    labels = [number[image.parts[0]] for image in split.images]
    # Tuples: lists would be taken for shards.
    arguments = {"paths": tuple(map(str, files)), "labels": tuple(labels), "stamps": tuple(stamps)}
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=classes)})
    return Dataset.from_generator(_rows, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(name))


def _rows(
    paths: tuple[str, ...], labels: tuple[int, ...], stamps: tuple[tuple[int, int], ...]
) -> Iterator[dict[str, Any]]:
    """The rows of a split; `stamps` is there for the name of the cache alone, which is made of all arguments."""
    for path, label in zip(paths, labels, strict=True):
        yield {"image": path, "label": label}
