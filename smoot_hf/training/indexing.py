"""The layer of a Trainer that says which rows of the training set a batch holds, past any collator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..data.input_pipeline import InputPipeline
from ..evaluation.ranked_batches import has_index
from ..models.classifier import vision_config
from ..models.logits import is_multi_label
from .arguments import SmootTrainingArguments
from .publishing import PublishingTrainer
from .sample_index import SAMPLE_IDX, IndexedCollator, IndexedDataset
from .sample_stream import StreamCollator, with_length

logger = logging.get_logger(__name__)


class IndexingTrainer(PublishingTrainer):
    """The layer of the index: training batches hold `sample_idx`, and are checked where they are made, on the CPU.

    Args:
        model: as in `Trainer`.
        args: of the training.
        *others: further arguments of `Trainer`, by position.
        input_pipeline: that the images go through, `None` where the data set prepares them.
        **more: further arguments of `Trainer`, by name.
    """

    args: SmootTrainingArguments
    data_collator: Any
    label_names: list[str]
    # The training set without the columns that the model does not take: other columns, the same rows.
    _kept_columns: Any = None

    def __init__(
        self,
        model: nn.Module | None,
        args: SmootTrainingArguments,
        *others: Any,
        input_pipeline: InputPipeline | None = None,
        **more: Any,
    ) -> None:
        self.input_pipeline = input_pipeline
        count = args.num_train_samples
        # The third and the fourth argument of a Trainer are the collator and the training set.
        if count is not None and len(others) > 1:
            others = (others[0], with_length(others[1], count), *others[2:])
        elif count is not None and "train_dataset" in more:
            more["train_dataset"] = with_length(more["train_dataset"], count)
        super().__init__(model, args, *others, **more)

    def indexed_parts(self, dataset: Any, description: str) -> tuple[Any, Any]:
        """The training set and its collator with `sample_idx`, unused columns removed as the Trainer would."""
        count = self.args.num_train_samples
        if not has_index(dataset) and count is not None:
            collator = self._get_collator_with_removed_columns(self.data_collator, description=description)
            _, indexed = self._with_index(dataset, collator, dataset)
            return with_length(dataset, count), StreamCollator(indexed, count)
        if SAMPLE_IDX in (getattr(dataset, "column_names", None) or ()):
            logger.warning_once(
                f"the column {SAMPLE_IDX!r} of train_dataset is not used: K belongs to the row's place in the data set"
            )
        if isinstance(dataset, datasets.Dataset):
            kept, collator = self._remove_unused_columns(dataset, description=description), self.data_collator
        else:
            kept = dataset
            collator = self._get_collator_with_removed_columns(self.data_collator, description=description)
        return self._with_index(kept, collator, dataset)

    def _with_index(self, kept: Any, collator: Any, original: Any) -> tuple[IndexedDataset, IndexedCollator]:
        """A data set and the collator of its samples, with `sample_idx`; `original` is it with all its columns."""
        removed = set(getattr(original, "column_names", None) or ()) - set(getattr(kept, "column_names", None) or ())
        config = getattr(self.model, "config", None)
        num_labels = getattr(config, "num_labels", None)
        num_channels = getattr(vision_config(config), "num_channels", None)
        uint8 = self.input_pipeline is not None
        # accelerate takes the batches of a stream apart, and could do that with tensors alone.
        keeps_rows = self.args.masked_share < 1 and has_index(original)
        multi_label = is_multi_label(self.model)
        indexed = IndexedCollator(
            collator, self.label_names[0], num_labels, multi_label, num_channels, uint8, removed, keeps_rows
        )
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
        if not is_training or not (has_index(dataset) or self.args.num_train_samples):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        indexed, collator = self.indexed_parts(dataset, description)
        sampler_of_original = None if sampler_fn is None else lambda _: sampler_fn(dataset)
        with self._replaced(collator):
            return super()._get_dataloader(
                indexed, description, batch_size, sampler_of_original, is_training, dataloader_key
            )

    @contextmanager
    def _replaced(self, collator: IndexedCollator | StreamCollator) -> Iterator[None]:
        """Let the Trainer build its loader with `collator` as it is: the columns have been removed before."""
        own, removes_columns = self.data_collator, self.args.remove_unused_columns
        self.data_collator, self.args.remove_unused_columns = collator, False
        try:
            yield
        finally:
            self.data_collator, self.args.remove_unused_columns = own, removes_columns

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._attach_index(kwargs.get("train_dataloader"))
        super()._run_epoch(*args, **kwargs)
