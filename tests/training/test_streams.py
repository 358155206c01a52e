"""A stream whose rows bring their index trains as the same rows in a data set with a length would."""

import datasets
import numpy as np
import pytest
import torch
from conftest import QUICK, PixelImages, TinyImages, build, parameters
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainerCallback

from smoot_hf import InputPipeline, SmootTrainer, SmootTrainingArguments

COUNT = 24
MOVING = {"step_size": 3000, "num_train_epochs": 2, "max_steps": -1}


def rows(images=None):
    """The tiny images as rows with their index."""
    images = TinyImages() if images is None else images
    return [images[i] | {"sample_idx": i} for i in range(len(images))]


class Stream(IterableDataset):
    """Rows one after the other, as often as they are asked for."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def counted(stream):
    """The stream, numbered as it is read, as the error for rows without a number advises."""
    return stream.map(lambda row, index: {**row, "sample_idx": index}, with_indices=True)


def hub_stream(shards=1, numbers=True):
    """A stream of the datasets library; the number of each row is in its data, or counted as it is read."""
    columns = {
        "pixel_values": [row["pixel_values"].numpy() for row in rows()],
        "labels": [row["labels"] for row in rows()],
        "sample_idx": list(range(COUNT)) if numbers else [0] * COUNT,
    }
    data = datasets.Dataset.from_dict(columns)
    stream = data.to_iterable_dataset(num_shards=shards)
    return (stream if numbers else counted(stream)).with_format("torch")


class Replay(Sampler):
    """An order that was recorded, a list for each epoch."""

    def __init__(self, epochs):
        self.epochs = iter(epochs)

    def __len__(self):
        return COUNT

    def __iter__(self):
        return iter(next(self.epochs))


class Replaying(SmootTrainer):
    """Trains in a recorded order."""

    order = ()

    def _get_train_sampler(self, train_dataset=None):
        return Replay(self.order)


class SeesOrder(TrainerCallback):
    """Records the samples of every epoch, and K at the end of every step."""

    def __init__(self):
        self.trainer, self.epochs, self.k = None, [], []

    def watch(self, trainer):
        self.trainer, move = trainer, trainer._budget_moves.move

        def moves(sample_idx, delta):
            self.epochs[-1].extend(sample_idx.tolist())
            move(sample_idx, delta)

        trainer._budget_moves.move = moves
        trainer.add_callback(self)
        return trainer

    def on_epoch_begin(self, *_, **__):
        self.epochs.append([])

    def on_step_end(self, *_, **__):
        self.k.append(self.trainer.mask_budget.k)


def trained_on(stream, tmp_path, name, resume=None, **overrides):
    args = SmootTrainingArguments(**QUICK | MOVING | {"output_dir": str(tmp_path / name)} | overrides)
    seen = SeesOrder()
    trainer = seen.watch(SmootTrainer(build("vit"), args, train_dataset=stream))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.mark.parametrize(
    "make",
    [lambda: Stream(rows()), hub_stream, lambda: hub_stream(numbers=False)],
    ids=["torch", "datasets", "datasets, counted"],
)
def test_k_and_weights_are_those_of_the_same_rows_with_a_length(make, tmp_path):
    """Catches K kept by the place in the batch, the index removed with other columns, and epochs that do not count."""
    stream, seen = trained_on(make(), tmp_path, "stream", num_train_samples=COUNT)
    assert stream.state.global_step == 6
    assert [sorted(epoch) for epoch in seen.epochs] == [list(range(COUNT))] * 2
    args = SmootTrainingArguments(**QUICK | MOVING | {"output_dir": str(tmp_path / "map")})
    Replaying.order = seen.epochs
    other = SeesOrder()
    trainer = other.watch(Replaying(build("vit"), args, train_dataset=TinyImages()))
    trainer.train()
    assert other.epochs == seen.epochs
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen.k, other.k, strict=True))
    assert len(seen.k[-1].unique()) > 4
    assert all(torch.equal(value, parameters(trainer)[name]) for name, value in parameters(stream).items())


def test_a_shuffled_stream_with_workers_keeps_k_by_its_index(tmp_path):
    """Catches K kept by the order of arrival, and an order that is the same in every epoch."""
    stream = hub_stream(shards=4).shuffle(seed=3, buffer_size=8)
    # Each of the two workers makes whole batches of its twelve rows.
    settings = {"per_device_train_batch_size": 4, "dataloader_num_workers": 2}
    _, seen = trained_on(stream, tmp_path, "shuffled", num_train_samples=COUNT, **settings)
    assert [sorted(epoch) for epoch in seen.epochs] == [list(range(COUNT))] * 2
    assert seen.epochs[0] != seen.epochs[1]
    Replaying.order = seen.epochs
    other = SeesOrder()
    args = SmootTrainingArguments(**QUICK | MOVING | {"output_dir": str(tmp_path / "map")} | settings)
    other.watch(Replaying(build("vit"), args, train_dataset=TinyImages())).train()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen.k, other.k, strict=True))


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_in_mid_stream_equals_uninterrupted(step, tmp_path):
    """Catches a stream that starts again from its first row, and K of samples that have moved moving again."""
    settings = {"num_train_samples": COUNT, "save_strategy": "steps", "save_steps": step}
    stream = hub_stream().shuffle(seed=3, buffer_size=8)
    whole, seen = trained_on(stream, tmp_path, "run", **settings)
    checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
    rest, later = trained_on(stream, tmp_path, "run", resume=checkpoint, **settings)
    assert torch.equal(rest.mask_budget.k, whole.mask_budget.k)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(later.k, seen.k[step:], strict=True))
    assert all(torch.equal(value, parameters(whole)[name]) for name, value in parameters(rest).items())


def test_a_share_of_a_stream_is_that_of_the_same_rows_with_a_length(quick_trainer, trained):
    """Catches rows of the share that accelerate cannot take apart, and a choice by the place in the stream."""
    settings = {"masked_share": 0.5, "num_train_epochs": 2, "max_steps": -1, "train_sampling_strategy": "sequential"}
    one = trained(train_dataset=Stream(rows()), num_train_samples=COUNT, **settings)
    other = trained(train_dataset=TinyImages(), **settings)
    assert torch.equal(one.mask_budget.k, other.mask_budget.k)
    assert all(torch.equal(value, parameters(other)[name]) for name, value in parameters(one).items())


def test_a_stream_goes_through_a_pipeline(quick_trainer):
    """Catches augmentation without the index, and uint8 that the checks refuse."""
    pipeline = InputPipeline(mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=1)
    trainer = quick_trainer(
        train_dataset=Stream(rows(PixelImages())), num_train_samples=COUNT, trainer_kwargs={"input_pipeline": pipeline}
    )
    trainer.train()
    assert trainer.state.global_step == 6


def changed(at=5, **values):
    """The rows, one of which has other values; `None`: not the key at all."""
    made = rows()
    made[at] = {name: value for name, value in (made[at] | values).items() if value is not None}
    return Stream(made)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (
            changed(sample_idx=None),
            r"needs 'sample_idx' in every row.* has only \['labels', 'pixel_values'\]: write the number",
        ),
        (changed(sample_idx=-1), r"must lie in \[0, 23\], since num_train_samples=24, but a row of the stream has -1"),
        (changed(sample_idx=24), r"must lie in \[0, 23\].* has 24: number the rows from 0"),
        (changed(sample_idx=1.0), r"must be an integer, got 1.0 \(float\)"),
        (changed(sample_idx=True), r"must be an integer, got True \(bool\)"),
        (changed(sample_idx="5"), r"must be an integer, got '5' \(str\)"),
        (changed(labels=9), r"'labels' must lie in \[0, 3\].*training sample 5 has 9"),
        (changed(pixel_values=torch.full((3, 8, 8), torch.nan)), r"NaN or infinite.*training samples \[5\]"),
        (Stream([(0, 1)]), "a row of train_dataset is a tuple"),
    ],
)
def test_bad_rows_are_one_clear_error(stream, message, quick_trainer):
    """Catches a negative index that aliases another image's K, and the checks of a batch passed by."""
    with pytest.raises(ValueError, match=message):
        quick_trainer(train_dataset=stream, num_train_samples=COUNT, max_steps=3).train()


def test_a_stream_that_cannot_be_read_again_is_one_clear_error(quick_trainer):
    with pytest.raises(ValueError, match="a stream without rows: it is empty, or an iterator that has been read"):
        quick_trainer(train_dataset=Stream([]), num_train_samples=COUNT)


def test_without_a_number_or_an_index_the_error_says_how_to_add_them(quick_trainer):
    with pytest.raises(ValueError, match=r"Set num_train_samples= the number of its rows.*with_indices=True"):
        quick_trainer(train_dataset=Stream(rows()))
    with pytest.raises(ValueError, match="num_train_samples=23 is for streams, and train_dataset has 24 samples"):
        quick_trainer(num_train_samples=23)


@pytest.mark.parametrize("index", [torch.tensor(5), np.int64(5), 5])
def test_any_integer_is_an_index(index, quick_trainer):
    quick_trainer(train_dataset=changed(sample_idx=index), num_train_samples=COUNT).train()


def test_a_repeated_index_is_told(quick_trainer, caplog):
    """Catches two images that share one K without a word, as where each shard counts from 0."""
    repeated = Stream([row | {"sample_idx": row["sample_idx"] % 12} for row in rows()])
    with caplog.at_level("WARNING"):
        quick_trainer(train_dataset=repeated, num_train_samples=COUNT, max_steps=3).train()
    assert "has brought 12 different sample_idx in this epoch, not num_train_samples=24" in caplog.text
    caplog.clear()
    quick_trainer(train_dataset=Stream(rows()), num_train_samples=COUNT, max_steps=3).train()
    assert "different sample_idx" not in caplog.text


def test_rows_that_each_worker_counts_for_itself_are_told(tmp_path, caplog):
    """Catches `with_indices` beside several workers, each of which begins with 0."""
    stream = hub_stream(shards=2, numbers=False)
    with caplog.at_level("WARNING"):
        settings = {"per_device_train_batch_size": 4, "dataloader_num_workers": 2}
        trained_on(stream, tmp_path, "run", num_train_samples=COUNT, **settings)
    assert "has brought 12 different sample_idx" in caplog.text


def test_a_column_of_that_name_is_told_to_be_unused_where_rows_have_a_place(quick_trainer, caplog):
    """Catches a K by place where the user has brought an index."""
    data = datasets.Dataset.from_list([{**row, "pixel_values": row["pixel_values"].tolist()} for row in rows()])
    with caplog.at_level("WARNING"):
        quick_trainer(train_dataset=data.with_format("torch"))
    assert "the column 'sample_idx' of train_dataset is not used" in caplog.text
