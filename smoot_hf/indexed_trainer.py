"""A Trainer whose training batches say which samples they hold, and which knows the number of its epoch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from .models import vision_config
from .sample_index import IndexedCollator, IndexedDataset, has_index


class IndexedTrainer(Trainer):
    """Attaches `sample_idx` to the training batches of any map-style data set, past the user's own collator.

    The collator, the sampler and the columns that the Trainer removes are those of a plain `Trainer`; a stream without
    index is passed through.
    """

    data_collator: Any
    label_names: list[str]
    # Set where the model's input is uint8 and made ready on the device.
    input_pipeline: Any = None
    _epoch: int | None = None
    # The training set without the columns that the model does not take: other columns, the same rows.
    _kept_columns: Any = None

    def indexed_parts(self, dataset: Any, description: str) -> tuple[IndexedDataset, IndexedCollator]:
        """The training set and its collator with `sample_idx`, unused columns removed as the Trainer would."""
        if isinstance(dataset, datasets.Dataset):
            kept, collator = self._remove_unused_columns(dataset, description=description), self.data_collator
        else:
            kept = dataset
            collator = self._get_collator_with_removed_columns(self.data_collator, description=description)
        return self._with_index(kept, collator, dataset)

    def _with_index(self, kept: Any, collator: Any, original: Any) -> tuple[IndexedDataset, IndexedCollator]:
        """A data set and the collator of its samples, with `sample_idx`; `original` is it with all its columns."""
        removed = set(getattr(original, "column_names", [])) - set(getattr(kept, "column_names", []))
        config = getattr(self.model, "config", None)
        num_labels = getattr(config, "num_labels", None)
        num_channels = getattr(vision_config(config), "num_channels", None)
        uint8 = self.input_pipeline is not None
        indexed = IndexedCollator(collator, self.label_names[0], num_labels, num_channels, uint8, removed)
        return IndexedDataset(kept, removed), indexed

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        kept = super()._remove_unused_columns(dataset, description)
        if dataset is self.train_dataset:
            self._kept_columns = kept
        return kept

    def _attach_index(self, loader: Any) -> None:
        """Let a loader say which rows its batches hold that a `get_train_dataloader` of the user's own has made.

        One over other rows than the training set's, or without batches, is left as it is: there is no index to attach.
        """
        dataset = getattr(loader, "dataset", None)
        is_training_set = dataset is self.train_dataset or (dataset is not None and dataset is self._kept_columns)
        if not isinstance(loader, DataLoader) or not is_training_set or not has_index(dataset):
            return
        if loader.batch_sampler is None:
            return
        loader = getattr(loader, "base_dataloader", loader)  # below what accelerate makes of it
        indexed, collator = self._with_index(dataset, loader.collate_fn, self.train_dataset)
        # Past the attribute's guard, which is there because a sampler knows its data set: this one has the same rows.
        vars(loader)["dataset"] = indexed
        loader.collate_fn = collator

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        if not is_training or not has_index(dataset):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        indexed, collator = self.indexed_parts(dataset, description)
        sampler_of_original = None if sampler_fn is None else lambda _: sampler_fn(dataset)
        with self._replaced(collator):
            return super()._get_dataloader(
                indexed, description, batch_size, sampler_of_original, is_training, dataloader_key
            )

    @contextmanager
    def _replaced(self, collator: IndexedCollator) -> Iterator[None]:
        """Let the Trainer build its loader with `collator` as it is: the columns have been removed before."""
        own, removes_columns = self.data_collator, self.args.remove_unused_columns
        self.data_collator, self.args.remove_unused_columns = collator, False
        try:
            yield
        finally:
            self.data_collator, self.args.remove_unused_columns = own, removes_columns

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        # The Trainer counts what stands under "labels" alone.
        name = self.label_names[0]
        named = [{"labels": batch[name]} for batch in batch_samples if name in batch]
        return super()._get_num_items_in_batch(named, device)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        self._attach_index(kwargs.get("train_dataloader"))
        # The Trainer's state holds a fraction that an epoch cut short leaves behind; this is the number itself.
        self._epoch = epoch
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def epoch_number(self) -> int:
        """Number of the epoch under way, from 0.

        Raises:
            RuntimeError: the installed transformers runs its epochs in another way.
        """
        if self.is_in_train and self._epoch is None:
            raise RuntimeError("this version of transformers does not tell SmootTrainer its epochs: K would never move")
        return self._epoch or 0
