"""SmootTrainer leaves everything else to the Trainer."""

import re

import numpy as np
import pytest
import reference
import torch
from conftest import CLASSES, QUICK, PixelImages, TinyImages, build, largest_difference, parameters
from datasets import Dataset as HfDataset
from torch.utils.data import IterableDataset
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, TrainerCallback, TrainingArguments

from smoot_hf import InputPipeline, SmootTrainer


def hf_dataset(length=24):
    data = TinyImages(length)
    features = {"image": [i.tolist() for i in data.images], "labels": data.labels, "note": ["x"] * length}
    return HfDataset.from_dict(features)


def as_tensors(batch):
    return {"pixel_values": [torch.tensor(i) for i in batch["image"]], "labels": batch["labels"]}


def collate_two_keys(examples):
    """As image classification scripts do: whatever else an example holds is dropped."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_hf_dataset_with_transform_own_collator_metrics_and_callback(quick_args, recorder, workers):
    """Catches an index that the user's collator drops, and a metric that sees sample_idx or masked logits."""
    seen = []

    class Callback(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    trainer = SmootTrainer(
        model=build("vit"),
        args=quick_args(remove_unused_columns=False, dataloader_num_workers=workers, step_size=500),
        train_dataset=hf_dataset().with_transform(as_tensors),
        eval_dataset=hf_dataset(10).with_transform(as_tensors),
        data_collator=collate_two_keys,
        compute_metrics=lambda p: {"shape": list(p.predictions.shape), "labels": p.label_ids.tolist()},
        callbacks=[Callback()],
    )
    trainer.train()
    images = TinyImages().images
    for call in recorder.calls:
        assert torch.equal(images[call["sample_idx"]], call["images"])
    metrics = trainer.evaluate()
    assert metrics["eval_shape"] == [10, CLASSES]
    assert metrics["eval_labels"] == TinyImages(10).labels
    assert any({"kl_loss", "k_median", "delta"} <= keys for keys in seen)
    assert trainer.data_collator is collate_two_keys
    assert trainer.args.remove_unused_columns is False


def test_unused_columns_are_removed_as_the_trainer_would(quick_args):
    """Catches strings that reach the default collator's tensors."""
    data = hf_dataset().map(lambda e: {"pixel_values": e["image"]}, remove_columns="image").with_format("torch")
    trainer = SmootTrainer(model=build("vit"), args=quick_args(), train_dataset=data)
    trainer.train()
    assert trainer.mask_budget.num_samples == 24


def test_plain_training_arguments_will_do(tmp_path):
    """The two-line change of a script: import and class name, nothing else."""
    args = TrainingArguments(output_dir=str(tmp_path), **QUICK)
    trainer = SmootTrainer(build("vit"), args, train_dataset=TinyImages())
    trainer.train()
    assert trainer.args.method == "smoot"


def test_class_weights_through_compute_loss_func(quick_trainer, recorder):
    """Catches a KL term that a user's loss function replaces, and scaling by the wrong count."""
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def weighted(outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight, reduction="sum")
        return loss / num_items_in_batch

    trainer = quick_trainer(max_steps=1, logging_steps=1, trainer_kwargs={"compute_loss_func": weighted})
    trainer.train()
    (call,) = recorder.calls
    expected = weighted(call["step"].outputs, call["labels"], 8) + call["step"].kl.mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_under_another_name(quick_args, recorder):
    """Catches a key that is taken for granted."""

    class Targets(TinyImages):
        def __getitem__(self, i):
            return {"pixel_values": self.images[i], "targets": self.labels[i]}

    args = quick_args(label_names=["targets"], gradient_accumulation_steps=2, logging_steps=6)
    trainer = SmootTrainer(build("vit"), args, train_dataset=Targets(32), eval_dataset=Targets(8))
    trainer.train()
    step = [(call["step"].ce + call["step"].kl).mean() for call in recorder.calls]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.stack(step).mean().item(), rel=1e-4)
    assert "eval_loss" in trainer.evaluate()


def test_label_smoothing_is_of_the_cross_entropy(quick_trainer, recorder):
    """Catches a flag that the own loss path forgets."""
    trainer = quick_trainer(max_steps=1, logging_steps=1, label_smoothing_factor=0.2)
    trainer.train()
    (call,) = recorder.calls
    logits = call["step"].outputs.logits.tolist()
    ce = [reference.cross_entropy(row, label, 0.2) for row, label in zip(logits, call["labels"].tolist(), strict=True)]
    assert trainer.state.log_history[0]["ce_loss"] == pytest.approx(np.mean(ce), rel=1e-5)


@pytest.mark.parametrize("method", ["standard", "sgt", "smoot"])
def test_bf16_follows_the_full_precision_run(trained, method):
    """Catches a backward pass inside autocast and a loss in eight bits."""
    full, half = (trained(method=method, learning_rate=1e-3, bf16=bf16) for bf16 in (False, True))
    for one, other in zip(full.state.log_history, half.state.log_history, strict=True):
        assert other.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=0.01)


@pytest.mark.parametrize("method", ["standard", "sgt", "smoot"])
def test_activation_checkpointing_changes_nothing(trained, quick_args, method):
    """Catches saved activations that the saliency consumed, and dropout drawn anew."""
    name = "activation_checkpointing" if hasattr(quick_args(), "activation_checkpointing") else "gradient_checkpointing"
    runs = [trained(build("vit", dropout=0.2), method=method, step_size=500, **{name: on}) for on in (False, True)]
    assert largest_difference(*map(parameters, runs)) == 0
    if method != "standard":
        assert torch.equal(runs[0].mask_budget.k, runs[1].mask_budget.k)


class RecordsInput(torch.nn.Module):
    """A classifier that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.inner = build("cnn", image_size=12)
        self.config, self.seen = self.inner.config, []

    def forward(self, pixel_values):
        self.seen.append(pixel_values.detach().clone())
        return self.inner(pixel_values=pixel_values)


def test_the_pipeline_augments_masks_then_resizes_in_training_and_only_resizes_in_evaluation(quick_trainer, recorder):
    """Catches a mask at the model's resolution, augmentation of epoch 0 for ever, and augmented evaluation."""
    pipeline = InputPipeline(
        mean=(0.5,) * 3, std=(0.25,) * 3, size=(12, 12), crop_padding=2, horizontal_flip=True, seed=1
    )
    model, data = RecordsInput(), PixelImages()
    trainer = quick_trainer(model, data, trainer_kwargs={"input_pipeline": pipeline})
    assert trainer.mask_budget.image_size == (8, 8)
    trainer.train()
    assert [call["epoch"] for call in recorder.calls] == [0, 0, 0, 1, 1, 1]
    for call, (clean, masked) in zip(recorder.calls, zip(model.seen[::2], model.seen[1::2], strict=True), strict=True):
        raw = torch.stack([data[int(row)]["pixel_values"] for row in call["sample_idx"]])
        images = pipeline.prepare_training(raw, call["sample_idx"], call["epoch"])
        assert torch.equal(call["images"], images)
        assert torch.equal(clean, pipeline.resize(images))
        assert masked.shape[-2:] == (12, 12)
        assert not torch.equal(clean, masked)
    model.seen.clear()
    trainer.evaluate(PixelImages(8))
    raw = torch.stack([PixelImages(8)[row]["pixel_values"] for row in range(8)])
    assert torch.equal(torch.cat(model.seen), pipeline.prepare_evaluation(raw))


def test_a_stream_through_a_pipeline_is_refused(quick_trainer):
    """Catches training on images prepared, silently, as for evaluation: augmentation needs the index as well."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([PixelImages()[i] for i in range(24)])

    pipeline = InputPipeline(mean=(0.5,) * 3, std=(0.25,) * 3)
    trainer = quick_trainer(train_dataset=Stream(), method="standard", trainer_kwargs={"input_pipeline": pipeline})
    with pytest.raises(ValueError, match="no 'sample_idx', by which K and augmentation are kept"):
        trainer.train()


def test_every_trial_of_a_search_starts_with_its_own_k(quick_args):
    """Catches the mask ratio of one trial at work in the next, and a trial's value that nobody checks."""

    ratios = iter([0.25, 0.75, 5.0])

    class Searched(SmootTrainer):
        def _hp_search_setup(self, trial):  # the stock one sets the arguments of the trial, here, within train()
            self.args.mask_ratio = next(ratios)

    trainer = Searched(model_init=lambda: build("vit"), args=quick_args(method="sgt"), train_dataset=TinyImages())
    for pixels in (16, 48):
        trainer.train()
        assert trainer.mask_budget.k.unique().tolist() == [pixels]
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\], got 5"):
        trainer.train()


def test_a_model_that_takes_no_labels_is_trained_by_its_logits(quick_args):
    """DeiT with its teacher's head: catches a refusal for want of a `labels` argument, which our loss does not need."""
    config = DeiTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=CLASSES,
    )  # fmt: skip
    trainer = SmootTrainer(
        DeiTForImageClassificationWithTeacher(config),
        quick_args(),
        train_dataset=TinyImages(),
        eval_dataset=TinyImages(8),
    )
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])


STILL = {
    "ten pixels of 6,400": {"step_unit": "pixels"},
    "a step that truncation makes 0": {"step_unit": "pixels", "step_size": 0.9, "rounding": "trunc", "mask_cell": 8},
    "a step that is rounded to 0": {"step_unit": "pixels", "step_size": 0.4, "rounding": "nearest", "mask_cell": 8},
    "a share too small": {"step_size": 0.01},
}
MOVING = {
    "by default": {},
    "in percent": {"step_unit": "percent", "step_size": 1.0},
    "ten pixels for seven epochs": {"step_unit": "pixels", "num_train_epochs": 7, "max_steps": -1},
    "floor takes a whole cell": {"step_unit": "pixels", "step_size": 0.1, "rounding": "floor", "mask_cell": 16},
    # These are not meant to move.
    "sgt": {"step_unit": "pixels", "method": "sgt"},
    "no step": {"step_size": 0.0},
    "standard": {"step_unit": "pixels", "method": "standard"},
}


@pytest.mark.parametrize("name", STILL | MOVING)
def test_a_k_that_cannot_move_is_warned_about_once(name, quick_args, monkeypatch):
    """Catches silence about ten pixels of a photograph, a warning at every epoch, and one where all is well."""
    said = []
    monkeypatch.setattr("smoot_hf.training.checks.logger.warning", said.append)
    args = quick_args(**{"max_steps": 2, "per_device_train_batch_size": 4} | (STILL | MOVING)[name])
    SmootTrainer(build("resnet"), args, train_dataset=TinyImages(length=4, size=80)).train()
    assert len(said) == (name in STILL)
    if name in STILL:
        assert said[0].startswith(f"K will hardly move: step_size={args.step_size} with step_unit={args.step_unit!r}")


class OwnLoss(torch.nn.Module):
    """A wrapper, as people have them, whose forward computes a loss of the logits and labels."""

    def __init__(self, loss):
        super().__init__()
        self.inner, self.loss = build("vit", dropout=0.2), loss
        self.config = self.inner.config

    def forward(self, pixel_values, labels=None):
        logits = self.inner(pixel_values=pixel_values).logits
        return {"loss": None if labels is None else self.loss(logits, labels), "logits": logits}


def focal(logits, labels):
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-ce).exp()) ** 2 * ce).mean()


def fails(logits, labels):
    raise RuntimeError("needs boxes\nas well")


def own_loss_function(labels, logits, *_, **__):
    return focal(logits, labels)


def vit_with_own_loss_function():
    model = build("vit", dropout=0.2)
    model.loss_function = own_loss_function
    return model


OWN_LOSSES = {
    "another": (lambda: OwnLoss(focal), r"OwnLoss computes a loss of its own.*, 0\.\d+ on the first batch, where the "),
    "one that fails": (lambda: OwnLoss(fails), r"OwnLoss fails where it is given 'labels' \(needs boxes\)"),
    "a loss_function that was set": (
        vit_with_own_loss_function,
        "ViTForImageClassification computes a loss of its own",
    ),
    "cross-entropy": (lambda: OwnLoss(torch.nn.functional.cross_entropy), None),
    "none": (lambda: OwnLoss(lambda *_: None), None),
    "that of transformers": (lambda: build("vit", dropout=0.2), None),
}


@pytest.mark.parametrize("method", ["standard", "smoot"])
@pytest.mark.parametrize("name", OWN_LOSSES)
def test_a_loss_that_the_model_computes_itself_is_warned_of_once(name, method, quick_trainer, monkeypatch):
    """Catches a model trained on plain cross-entropy without a word, and a look at its loss that leaves a trace."""
    said = []
    monkeypatch.setattr("smoot_hf.training.checks.logger.warning", said.append)
    model, message = OWN_LOSSES[name]
    trainer = quick_trainer(model(), method=method)
    trainer.train()
    trainer.train()
    assert len(said) == (message is not None)
    assert message is None or re.search(message + ".*That loss is not used.*pass it as compute_loss_func", said[0])

    def as_losses_go(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    said.clear()
    other = quick_trainer(model(), method=method, trainer_kwargs={"compute_loss_func": as_losses_go})
    other.train()
    other.train()
    assert said == []
    # The user's loss takes the gradients in two passes rather than one: rounded in another order.
    assert largest_difference(parameters(trainer), parameters(other)) < 1e-5
