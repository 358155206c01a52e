"""The splits of a data set as they are stored: which files hold them, which have labels, by which class names."""

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets.data_files import DataFilesDict, get_data_patterns
from huggingface_hub import constants
from PIL import Image

from .data_columns import IMAGE, LABELS, label_numbers, renumbered, with_labels

logger = logging.getLogger(__name__)


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
    try:
        builder = datasets.load_dataset_builder(name_or_path, data_files=_files_where_globs_fail(name_or_path))
        unlabelled = _splits_without_class_folders(builder, train_split)
        if unlabelled:
            kept = {name: files for name, files in builder.config.data_files.items() if str(name) not in unlabelled}
            builder = datasets.load_dataset_builder(name_or_path, data_files=kept)
        builder.download_and_prepare()
        return StoredSplits(builder.as_dataset(), _files_with_schema(builder), unlabelled)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        is_here = os.path.exists(name_or_path)
        remedy = "mend or replace its files" if is_here else "--dataset takes a local directory as well"
        raise OSError(f"cannot load the data set {name_or_path!r} ({reason}): {remedy}") from error


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
