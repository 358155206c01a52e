"""A training set that is read as a stream: its rows bring the index that K is kept by."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..evaluation.ranked_batches import has_index
from .sample_index import SAMPLE_IDX, IndexedCollator, IndexedFeatures

HOW_TO_INDEX = (
    "write the number of each row into the data; or, if the loader has no workers, count the rows before anything is "
    f"shuffled: stream.map(lambda row, index: {{**row, {SAMPLE_IDX!r}: index}}, with_indices=True)"
)


class IndexedStream(IterableDataset):
    """A stream whose rows hold `sample_idx`, with the length that is known of it.

    With a length, a training counts its epochs and finds its place again as with any other data set. All else that is
    asked of it, its columns for example, is asked of the stream.

    Args:
        stream: anything that can be iterated once for every epoch and once more for its first row. What it has of
            `set_epoch`, it is told.
        num_samples: N, the number of its rows.
    """

    def __init__(self, stream: Any, num_samples: int) -> None:
        self.stream = stream
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # asked for before there is one, when a worker unpickles
            raise AttributeError(name)
        return getattr(self.stream, name)

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream, where it listens, which epoch begins: one that shuffles draws a new order."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def first(self) -> list[Any]:
        """The first row alone, as what a loader fetches.

        Raises:
            ValueError: there is none.
        """
        for row in self.stream:
            return [row]
        raise ValueError(
            "train_dataset is a stream without rows: it is empty, or an iterator that has been read. It must give its "
            "rows anew each time that it is iterated"
        )


def with_length(dataset: Any, num_samples: int) -> Any:
    """A stream with its length, `IndexedStream`; a data set that has rows by number, or none, as it is."""
    if dataset is None or isinstance(dataset, IndexedStream) or has_index(dataset):
        return dataset
    return IndexedStream(dataset, num_samples)


class StreamCollator:
    """Takes `sample_idx` out of the rows of a stream, checks it, and hands both to a collator of indexed features.

    Args:
        collator: of what is left of the rows.
        num_samples: N; an index must lie in [0, N).
    """

    def __init__(self, collator: IndexedCollator, num_samples: int) -> None:
        self.collator = collator
        self.num_samples = num_samples

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Collate the rows of a batch.

        Raises:
            ValueError: a row without an index, or one that is no integer in [0, N); what `IndexedCollator` raises.
        """
        indices = [self._index_of(row) for row in rows]
        features = [{name: value for name, value in row.items() if name != SAMPLE_IDX} for row in rows]
        return self.collator(IndexedFeatures(indices, features))

    def _index_of(self, row: Any) -> int:
        if not isinstance(row, Mapping) or SAMPLE_IDX not in row:
            found = f"has only {sorted(map(str, row))}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
            raise ValueError(
                f"a K per sample needs {SAMPLE_IDX!r} in every row of a stream, and a row of train_dataset {found}: "
                f"{HOW_TO_INDEX}"
            )
        index = row[SAMPLE_IDX]
        if isinstance(index, torch.Tensor) and index.ndim == 0 and not index.is_floating_point():
            index = index.item()
        # A boolean is an integer to Python, and numpy's integers are none.
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise ValueError(
                f"{SAMPLE_IDX!r} must be an integer, got {index!r} ({type(index).__name__}) in a row of the stream: "
                f"{HOW_TO_INDEX}"
            )
        if not 0 <= int(index) < self.num_samples:
            raise ValueError(
                f"{SAMPLE_IDX!r} must lie in [0, {self.num_samples - 1}], since num_train_samples={self.num_samples}, "
                f"but a row of the stream has {int(index)}: number the rows from 0, or correct num_train_samples"
            )
        return int(index)
