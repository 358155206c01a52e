"""An image classification data set: loading its splits, finding its columns, numbering its classes."""

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets.data_files import DataFilesDict, get_data_patterns
from huggingface_hub import constants
from PIL import Image

from ..errors import first_line
from ..models.class_names import numbers_by_name
from .image_folder import load_image_folder

logger = logging.getLogger(__name__)

IMAGE, PIXELS, LABELS, EVIDENCE = "image", "pixel_values", "labels", "evidence"


def find_column(features: Features, feature_type: type, given: str | None, argument: str) -> str:
    """The one column of a feature type, or the given one.

    Raises:
        ValueError: none, several, or one of another type; the message lists the candidates.
    """
    if given is not None:
        if given not in features:
            raise ValueError(f"{argument}={given!r} is not a column of the data set, only {list(features)}")
        # Labels may be plain numbers or text, images not.
        if feature_type is datasets.Image and not isinstance(features[given], datasets.Image):
            raise ValueError(f"{argument}={given!r} must hold images, but is of type {features[given]}")
        return given
    candidates = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    if len(candidates) == 1:
        return candidates[0]
    found = f"several columns could be meant, {candidates}" if candidates else f"no column of {dict(features)} fits"
    hint = ". An imagefolder has a folder for each class, two or more" if feature_type is ClassLabel else ""
    raise ValueError(f"{argument} must be set: {found} (type {feature_type.__name__}){hint}")


def as_class_labels(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Number the labels of a plain column of integers or strings, in the same way in every split.

    Raises:
        ValueError: labels that are neither integers nor strings.
    """
    if all(isinstance(split.features[LABELS], ClassLabel) for split in splits.values()):
        return splits
    values = sorted({value for split in splits.values() for value in split.unique(LABELS)} - {None})
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"label_column must hold class labels, integers or strings, got {values[:5]}")
    number = {value: index for index, value in enumerate(values)}
    feature = ClassLabel(names=[str(value) for value in values])
    return {
        name: with_labels(split, np.array([number.get(value, -1) for value in split[LABELS]]), feature)
        for name, split in splits.items()
    }


def has_labels(split: Dataset) -> bool:
    """Whether any sample of a split has a label; an empty split is not called unlabelled."""
    return len(split) == 0 or len(unlabelled_rows(split)) < len(split)


def check_labels(split: Dataset, name: str, argument: str) -> None:
    """Refuse samples without a label.

    Raises:
        ValueError: there are some; naming the split, the first row, and the argument that chooses another split.
    """
    rows = unlabelled_rows(split)
    if len(rows):
        value = "null" if split[int(rows[0])][LABELS] is None else -1
        raise ValueError(
            f"split {name!r} has {len(rows)} of {len(split)} samples without a label ({value}), the first in row "
            f"{rows[0]}: leave them out, or name another split by {argument}"
        )


def unlabelled_rows(split: Dataset) -> np.ndarray:
    """Rows whose label is null or, among numbers, -1; unless -1 and 1 are all there is, which some call two classes."""
    labels = _stored_labels(split)
    is_missing = labels.is_null()
    if pa.types.is_integer(labels.type) and set(labels.unique().to_pylist()) != {-1, 1}:
        is_missing = pc.or_(is_missing, pc.equal(labels, -1).fill_null(False))
    return np.flatnonzero(is_missing.to_numpy())


def number_as(split: Dataset, feature: ClassLabel, name: str) -> Dataset:
    """The split `name` with the class labels of another, by their names.

    Raises:
        ValueError: it has a class that `feature` has not, with the names of both.
    """
    own = split.features[LABELS]
    if own == feature:
        return split
    return with_labels(split, renumbered(label_numbers(split), own.names, feature.names, f"split {name!r}"), feature)


def label_numbers(split: Dataset) -> np.ndarray:
    """int64 (n,): class labels as stored; -1 where there is none."""
    return _stored_labels(split).fill_null(-1).to_numpy().astype(np.int64)


def renumbered(numbers: np.ndarray, own: Sequence[str], names: Sequence[str], what: str) -> np.ndarray:
    """int64 (n,): numbers of the classes `own` become those of the same names in `names`; -1 stays.

    Raises:
        ValueError: by name they cannot be told.
    """
    if numbers.max(initial=-1) >= len(own):
        raise ValueError(f"{what} has samples of class {numbers.max()}, but only {len(own)} classes")
    try:
        table = np.array(numbers_by_name(own, names))
    except ValueError as error:
        raise ValueError(
            f"the data set numbers its classes in several ways, and {what} cannot be brought into line: its {error}; "
            "give all files and splits the same class names"
        ) from error
    return np.where(numbers < 0, -1, table[numbers])


def with_labels(split: Dataset, numbers: np.ndarray, feature: ClassLabel) -> Dataset:
    """The split with other labels, int64 (n,)."""
    return split.remove_columns(LABELS).add_column(LABELS, numbers.tolist(), feature=feature)


def _stored_labels(split: Dataset) -> pa.ChunkedArray:
    return split.select_columns([LABELS]).with_format("arrow")[:][LABELS]


class StoredSplits(NamedTuple):
    """What `load_splits` found.

    Attributes:
        splits: those that have labels, as far as files alone tell.
        files: of every split the Parquet or Arrow files that it was read from, in this order; empty for other files.
        unlabelled: names of the splits that were left out, since they have no labels.
    """

    splits: DatasetDict
    files: dict[str, list[str]]
    unlabelled: list[str]


def load_splits(name_or_path: str, train_split: str) -> StoredSplits:
    """Load a data set of the Hub or of a local directory, whatever characters its path has.

    Args:
        name_or_path: Hub id, local directory, or "digits".
        train_split: whose folders are the classes of an imagefolder. A split with folders or files of other names
            alone has no labels.

    Raises:
        OSError: the data are neither in a local directory nor to be had from the Hub, or its files cannot be read.
        ImportError: "digits" without scikit-learn.
    """
    if name_or_path == "digits":
        return StoredSplits(_digits(), {}, [])
    folder = Path(name_or_path).expanduser()
    found = load_image_folder(folder, train_split) if folder.is_dir() else None
    if found is not None:
        return StoredSplits(found[0], {}, found[1])
    try:
        builder = datasets.load_dataset_builder(name_or_path, data_files=_files_where_globs_fail(name_or_path))
        unlabelled = _splits_without_class_folders(builder, train_split)
        if unlabelled:
            kept = {name: files for name, files in builder.config.data_files.items() if str(name) not in unlabelled}
            builder = datasets.load_dataset_builder(name_or_path, data_files=kept)
        builder.download_and_prepare()
        return StoredSplits(builder.as_dataset(), _files_with_schema(builder), unlabelled)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        remedy = "--dataset takes a local directory as well"
        if os.path.exists(name_or_path):
            remedy = "mend or replace its files: Parquet, or a folder for each class with image files that Pillow reads"
        raise OSError(f"cannot load the data set {name_or_path!r} ({first_line(error)}): {remedy}") from error


def number_as_features(split: Dataset, files: Sequence[str], label_column: str) -> Dataset:
    """Let every row of the column "labels" mean the class that its own file says.

    HF Datasets takes the class names of the first file for all, and leaves the numbers of the others as they are.

    Args:
        split: its features say how classes are numbered.
        files: that it was read from, Parquet or Arrow, in this order.
        label_column: what "labels" is called in the files.

    Raises:
        ValueError: a file has a class that the features have not, with the names of both.
    """
    feature = split.features[LABELS]
    names = [(file, *_names_and_rows(file, label_column)) for file in files]
    if all(own in (None, feature.names) for _, own, _ in names):
        return split
    if sum(rows for _, _, rows in names) != len(split):
        others = next(own for _, own, _ in names if own not in (None, feature.names))
        raise ValueError(
            f"the files of the data set number their classes differently, {feature.names[:5]} and {others[:5]}, and "
            "rows cannot be told apart by file: give all files the same class names"
        )
    numbers, start = label_numbers(split), 0
    for file, own, rows in names:
        if own is not None:
            part = slice(start, start + rows)
            numbers[part] = renumbered(numbers[part], own, feature.names, f"file {os.path.basename(file)!r}")
        start += rows
    return with_labels(split, numbers, feature)


def _files_where_globs_fail(name_or_path: str) -> DataFilesDict | None:
    """The files of a local directory in whose path HF Datasets would take characters for a pattern, as in "set [1]"."""
    if not (glob.has_magic(name_or_path) and os.path.isdir(os.path.expanduser(name_or_path))):
        return None
    folder = glob.escape(Path(name_or_path).expanduser().resolve().as_posix())
    return DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)


def _splits_without_class_folders(builder: Any, train_split: str) -> list[str]:
    """Splits of an imagefolder that have no class in common with the training split."""
    files = {str(name): list(found) for name, found in (builder.config.data_files or {}).items()}
    # Elsewhere labels stand beside the images.
    if builder.name != "imagefolder" or train_split not in files or _has_metadata_or_archives(files):
        return []
    classes = {name: {Path(file).parent.name for file in found} for name, found in files.items()}
    return [name for name, own in classes.items() if own.isdisjoint(classes[train_split])]


def _has_metadata_or_archives(files: dict[str, list[str]]) -> bool:
    named = [Path(file) for found in files.values() for file in found]
    return any(file.stem == "metadata" or file.suffix.lower() == ".zip" for file in named)


def _files_with_schema(builder: Any) -> dict[str, list[str]]:
    """Of every split the Parquet or Arrow files on this machine that it was read from."""
    if builder.name == "cache":
        # Read without network: the Hub's client has the files that the cache was made from, by the same commit.
        snapshots = list(Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{builder.hash}"))
        if len(snapshots) != 1:
            return {}
        builder = datasets.load_dataset_builder(str(snapshots[0]))
    if builder.name not in ("parquet", "arrow"):
        return {}
    manager = datasets.DownloadManager()
    return {
        str(name): [file if os.path.isfile(file) else manager.download(file) for file in files]
        for name, files in (builder.config.data_files or {}).items()
    }


def _names_and_rows(file: str, column: str) -> tuple[list[str] | None, int]:
    """Class names of a column by a file's own schema, `None` where it has none; and the file's number of rows."""
    try:
        with pq.ParquetFile(file) as parquet:
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    except pa.ArrowInvalid:
        with pa.memory_map(file) as source:
            try:
                stored = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                stored = pa.ipc.open_file(source).read_all()
            schema, rows = stored.schema, stored.num_rows
    feature = Features.from_arrow_schema(schema).get(column)
    return (list(feature.names) if isinstance(feature, ClassLabel) else None), rows


def _digits() -> DatasetDict:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set 'digits' needs scikit-learn: pip install 'smoot-hf[recipes]'") from error
    bunch = load_digits()
    # Sixteen grey levels and zero, spread over the whole range of a byte.
    images = [Image.fromarray(image) for image in (bunch.images * (255 / 16)).round().astype(np.uint8)]
    features = Features({IMAGE: datasets.Image(), LABELS: ClassLabel(names=[str(digit) for digit in range(10)])})
    digits = Dataset.from_dict({IMAGE: images, LABELS: bunch.target.tolist()}, features=features)
    return digits.train_test_split(test_size=0.2, seed=0, stratify_by_column=LABELS)


# Where the held-out images are, in this order; the first that is there and has labels becomes "test".
_HELD_OUT = ("test", "validation", "valid", "val")


def load_image_dataset(
    name_or_path: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> DatasetDict:
    """Load an image classification data set with the splits "train" and "test" and the columns "image" and "labels".

    Classes have the same number in every split, by their names: those of the first training file's `ClassLabel`, or,
    of plain integers or strings, all that any split has, sorted.

    Args:
        name_or_path: Hub id; local directory of Parquet files, or of image files in a folder for each class, with a
            folder for each split around them or without (see `load_image_folder`); or "digits", scikit-learn's
            handwritten digits (1,797 images of 8x8 pixels), which need no network.
        image_column: where several columns hold images.
        label_column: where several columns hold class labels, or none is marked as such.
        train_split: which split becomes "train".
        eval_split: which split becomes "test". By default the first of "test", "validation", "valid" and "val" that
            has labels; without any, a fifth of the training images is held out: always the same ones, each class in
            proportion. A split without labels (no class folders, -1 or null throughout) is passed over with a warning,
            and so are labelled ones that no argument names, such as "validation" beside "test".

    Raises:
        ValueError: a column or a split is missing, ambiguous or of the wrong type; samples have no label; files or
            splits have different classes; a folder of images has no class, one class, or images beside its class
            folders. The message lists the candidates, or names split and row.
        OSError: the data are neither in a local directory nor to be had from the Hub.
        ImportError: "digits" without scikit-learn.
    """
    stored = load_splits(name_or_path, train_split)
    for argument, name in {"train_split": train_split, "eval_split": eval_split}.items():
        if name is not None and name not in stored.splits:
            without = f", and without labels {stored.unlabelled}" if stored.unlabelled else ""
            found = f"only {list(stored.splits)}{without}"
            raise ValueError(f"data set {name_or_path!r} has no split {name!r}, {found}: set {argument}")
    features = stored.splits[train_split].features
    image_column = find_column(features, datasets.Image, image_column, "image_column")
    label_column = find_column(features, ClassLabel, label_column, "label_column")
    new = {image_column: IMAGE, label_column: LABELS}
    splits = {name: split.select_columns(list(new)).rename_columns(new) for name, split in stored.splits.items()}
    if eval_split is None:
        eval_split = _find_held_out(splits, stored.unlabelled, name_or_path)
        _warn_of_unused(splits, {train_split, eval_split}, name_or_path)
    roles = {"train": train_split} | ({"test": eval_split} if eval_split else {})
    for name, argument in zip(roles.values(), ("train_split", "eval_split"), strict=False):
        check_labels(splits[name], name, argument)
    # Plain labels are numbered over every split that is labelled, whichever are chosen.
    splits = as_class_labels({name: split for name, split in splits.items() if not len(unlabelled_rows(split))})
    numbered = {
        role: number_as_features(splits[name], stored.files.get(name, []), label_column) for role, name in roles.items()
    }
    return DatasetDict(numbered) if eval_split else _hold_out_a_fifth(numbered["train"], name_or_path)


def _find_held_out(splits: dict[str, Dataset], unlabelled: list[str], name_or_path: str) -> str | None:
    """The first held-out split with labels; those that have none are passed over with a warning."""
    unlabelled = [*unlabelled, *(name for name in _HELD_OUT if name in splits and not has_labels(splits[name]))]
    found = next((name for name in _HELD_OUT if name in splits and name not in unlabelled), None)
    passed_over = [name for name in _HELD_OUT if name in unlabelled]
    if passed_over:
        logger.warning("data set %r has splits without labels, which are passed over: %s", name_or_path, passed_over)
    return found


def _warn_of_unused(splits: dict[str, Dataset], used: set[str | None], name_or_path: str) -> None:
    """Name the labelled splits that are neither trained nor evaluated on."""
    unused = [name for name, split in splits.items() if name not in used and has_labels(split)]
    if unused:
        logger.warning(
            "data set %r: the images of %s are not used, neither in training nor in evaluation; eval_split "
            "(--eval_split) names the split to evaluate on",
            name_or_path,
            " and ".join(map(repr, unused)),
        )


def _hold_out_a_fifth(train: Dataset, name_or_path: str) -> DatasetDict:
    logger.warning("data set %r has no held-out split: a fifth of 'train' is held out as 'test'", name_or_path)
    try:
        return train.train_test_split(test_size=0.2, seed=0, stratify_by_column=LABELS)
    except ValueError as error:
        raise ValueError(
            f"a fifth of the {len(train)} images of {name_or_path!r} cannot be held out ({error}): add a split 'test', "
            "or more images of each class"
        ) from error
