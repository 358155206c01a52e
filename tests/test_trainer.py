"""SmootTrainer does what the equations say, and leaves everything else to the Trainer."""

import json

import numpy as np
import pytest
import reference
import torch
from conftest import CLASSES, QUICK, TinyImages, build, largest_difference, parameters
from datasets import Dataset as HfDataset
from torch.utils.data import IterableDataset, Subset, WeightedRandomSampler
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, TrainerCallback, TrainingArguments

from smoot_hf import InputPipeline, MaskBudget, SmootTrainer, evaluate_faithfulness
from smoot_hf import functional as SF
from smoot_hf.masked_step import masked_step
from smoot_hf.training_log import LogWindow


class StepRecorder:
    """Keeps what `masked_step` was given and what it gave."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr("smoot_hf.trainer.masked_step", self)

    def __call__(self, model, images, labels, sample_idx, k, epoch, args, **others):
        step = masked_step(model, images, labels, sample_idx, k, epoch, args, **others)
        self.calls.append(
            {"images": images, "labels": labels, "sample_idx": sample_idx, "k": k, "epoch": epoch, "step": step}
        )
        return step


@pytest.fixture
def recorder(monkeypatch):
    return StepRecorder(monkeypatch)


# --- the step ----------------------------------------------------------------------------------------------------


def slow_step(model, images, labels, sample_idx, k, epoch, args):
    """Algorithm 2 for a model without dropout, sample by sample, through tests/reference.py."""
    ce, kl, delta, masks = [], [], [], []
    for image, label, index, budget in zip(images, labels.tolist(), sample_idx.tolist(), k.tolist(), strict=True):
        leaf = image[None].clone().requires_grad_()
        logits = model(pixel_values=leaf).logits[0]
        gradient = torch.autograd.grad(logits[label], leaf)[0][0]
        mask = reference.least_salient_mask(gradient.mean(0).tolist(), budget)
        channels = len(image)
        noise = torch.tensor(reference.counter_uniform(args.seed, epoch, index, image.numel())).reshape(image.shape)
        fill = torch.tensor(
            [reference.uniform_fill(image[c].tolist(), mask, noise[c].tolist()) for c in range(channels)]
        )
        masked = torch.where(torch.tensor(mask), fill.to(image.dtype), image)
        masked_logits = model(pixel_values=masked[None]).logits[0].tolist()
        logits = logits.tolist()
        ce.append(reference.cross_entropy(logits, label))
        kl.append(reference.kl_divergence(logits, masked_logits))
        delta.append(reference.probability_shift(logits, masked_logits, args.alpha, args.top_n))
        masks.append(mask)
    return ce, kl, delta, masks


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_a_step_equals_the_algorithm_done_slowly(name, quick_args):
    """Catches any seam between the parts: a mask of the wrong sample, a fill of another epoch, a swapped KL."""
    model = build(name).double().eval().train(name == "vit")  # the CNN without its dropout
    data = TinyImages()
    images, labels = data.images[:6].double(), torch.tensor(data.labels[:6])
    sample_idx, k = torch.tensor([5, 0, 3, 9, 1, 2]), torch.tensor([0, 13, 32, 33, 63, 64])
    args = quick_args(alpha=0.7, top_n=3)
    step = masked_step(model, images, labels, sample_idx, k, 2, args)
    ce, kl, delta, masks = slow_step(model, images, labels, sample_idx, k, 2, args)
    assert step.is_masked[:, 0].tolist() == masks
    np.testing.assert_allclose(step.ce.detach(), ce, rtol=1e-7)
    np.testing.assert_allclose(step.kl.detach(), kl, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(step.delta, delta, rtol=1e-5, atol=1e-12)


def test_the_gradients_are_those_of_the_plain_formulation(quick_args):
    """Catches gradients that leak through the saliency, the fill or the mask."""
    data, args = TinyImages(), quick_args(kl_weight=0.7)
    images, labels, sample_idx = data.images[:8], torch.tensor(data.labels[:8]), torch.arange(8)
    ours, plain = build("vit").train(), build("vit").train()
    step = masked_step(ours, images, labels, sample_idx, torch.full((8,), 32), 0, args)
    (step.ce + 0.7 * step.kl).mean().backward()

    noise = SF.counter_uniform(args.seed, 0, sample_idx, images.shape[1:])
    masked = torch.where(step.is_masked, SF.uniform_fill(images, step.is_masked, noise), images)
    log_p, log_q = (plain(pixel_values=view).logits.log_softmax(1) for view in (images, masked))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (torch.nn.functional.nll_loss(log_p, labels) + 0.7 * kl).backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_kl_gradient_masked_makes_the_clean_prediction_a_constant(quick_args):
    """Catches an option that does nothing, and one that detaches the masked prediction in its place."""
    data, sample_idx = TinyImages(), torch.arange(8)
    images, labels, args = data.images[:8], torch.tensor(data.labels[:8]), quick_args(kl_gradient="masked")
    ours, plain = build("vit").train(), build("vit").train()
    step = masked_step(ours, images, labels, sample_idx, torch.full((8,), 32), 0, args)
    (gradient,) = torch.autograd.grad(step.kl.mean(), ours.classifier.weight)

    noise = SF.counter_uniform(args.seed, 0, sample_idx, images.shape[1:])
    masked = torch.where(step.is_masked, SF.uniform_fill(images, step.is_masked, noise), images)
    log_p, log_q = (plain(pixel_values=view).logits.log_softmax(1) for view in (images, masked))
    kl = torch.nn.functional.kl_div(log_q, log_p.detach(), log_target=True, reduction="batchmean")
    (expected,) = torch.autograd.grad(kl, plain.classifier.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "override",
    [
        {"saliency_score": "log_prob"},
        {"signed_saliency": False},
        {"saliency_target": "predicted"},
        {"mask_fill": "mean"},
    ],
)
def test_every_reading_of_the_saliency_changes_the_step(override, quick_args):
    """Catches an argument that is parsed and then forgotten."""
    data = TinyImages()
    batch = data.images[:8], torch.tensor(data.labels[:8]), torch.arange(8), torch.full((8,), 32), 0
    one = masked_step(build("vit").train(), *batch, quick_args())
    other = masked_step(build("vit").train(), *batch, quick_args(**override))
    assert torch.equal(one.ce, other.ce)
    assert not torch.equal(one.kl, other.kl)


@pytest.mark.parametrize("name", ["vit", "cnn", "resnet"])
def test_masking_nothing_changes_nothing_exactly(name, quick_args):
    """Catches two dropout draws: delta would measure dropout and not the mask."""
    model = build("vit", dropout=0.3) if name == "vit" else build(name)
    data = TinyImages()
    step = masked_step(
        model.train(), data.images, torch.tensor(data.labels), torch.arange(24), torch.zeros(24).int(), 0, quick_args()
    )
    assert step.kl.tolist() == [0.0] * 24
    assert step.delta.tolist() == [0.0] * 24
    assert not step.is_masked.any()


def test_without_the_shared_draw_dropout_shows_in_delta(quick_args):
    """The test above can fail."""
    data, args = TinyImages(), quick_args(shared_dropout=False)
    batch = data.images, torch.tensor(data.labels), torch.arange(24), torch.zeros(24).int(), 0
    assert masked_step(build("cnn").train(), *batch, args).delta.abs().max() > 1e-4


def test_the_eval_pass_sees_no_dropout_and_leaves_batch_statistics_and_modes(quick_args):
    """Catches an eval pass in train mode, and a frozen module that comes back in training."""
    data = TinyImages()
    batch = data.images, torch.tensor(data.labels), torch.arange(24), torch.full((24,), 32), 0
    cnn = build("cnn").train()
    eval_cnn = build("cnn").eval()
    leaf = data.images.clone().requires_grad_()
    score = SF.class_score(eval_cnn(pixel_values=leaf).logits, batch[1])
    expected = SF.least_salient_mask(SF.input_saliency(score, leaf), batch[3])
    assert torch.equal(masked_step(cnn, *batch, quick_args(saliency_pass="eval")).is_masked, expected)

    shared, own = build("resnet").train(), build("resnet").train()
    for model in (shared, own):
        next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    modes = [m.training for m in own.modules()]
    masked_step(own, *batch, quick_args(saliency_pass="eval"))
    assert [m.training for m in own.modules()] == modes
    tracked = [b for n, b in own.named_buffers() if n.endswith("num_batches_tracked")]
    assert sorted({int(b) for b in tracked}) == [0, 2]  # the frozen one; the clean and the masked view


@pytest.mark.parametrize("override", [{}, {"saliency_pass": "eval"}, {"saliency_target": "predicted"}])
def test_nothing_in_a_step_waits_for_the_device(override, quick_args):
    """Tensors on the meta device have no values: whatever reads one back to the host raises."""
    args, sample_idx = quick_args(**override), torch.empty(8, dtype=torch.int64, device="meta")
    budget = MaskBudget(24, (8, 8), device="meta")
    images, labels = torch.empty(8, 3, 8, 8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    model = build("vit").to("meta").train()
    step = masked_step(model, images, labels, sample_idx, budget.read(sample_idx), 0, args)
    budget.update(sample_idx, step.delta, args.step_size)
    LogWindow().add(ce_loss=step.ce, kl_loss=step.kl)
    (step.ce + step.kl).mean().backward()
    with pytest.raises(RuntimeError, match="meta"):
        step.ce.sum().item()


# --- K in training -----------------------------------------------------------------------------------------------


READINGS = {
    "floor": ({"step_size": 500}, 500, {"rounding": "floor"}),
    "trunc": ({"step_size": 500, "rounding": "trunc"}, 500, {"rounding": "trunc"}),
    "percent": ({"step_size": 1000, "step_unit": "percent", "rounding": "nearest"}, 640, {"rounding": "nearest"}),
}


@pytest.mark.parametrize("reading", READINGS)
def test_k_is_updated_by_every_samples_own_delta(reading, quick_trainer, recorder):
    """Catches deltas written to other samples' K (the sampler shuffles), and a rounding or unit that is forgotten."""
    overrides, step_size, rounding = READINGS[reading]
    trainer = quick_trainer(max_steps=9, mask_ratio_min=0, mask_ratio_max=1, **overrides)
    trainer.train()
    expected = [32] * 24
    for call in recorder.calls:
        deltas = call["step"].delta.tolist()
        for row, k, delta in zip(call["sample_idx"].tolist(), call["k"].tolist(), deltas, strict=True):
            assert k == expected[row]
            expected[row] = reference.update_budget(k, delta, step_size, 0, 64, **rounding)
    assert trainer.mask_budget.k.tolist() == expected
    assert len(set(expected)) > 3
    assert [call["epoch"] for call in recorder.calls] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("mode", ["rank", "class", "label"])
def test_delta_is_of_the_mode_that_was_asked_for(mode, quick_trainer, recorder, monkeypatch):
    """Catches a mode that the step forgets."""
    modes = []
    shift = SF.probability_shift
    monkeypatch.setattr(SF, "probability_shift", lambda *a: (modes.append(a[4]), shift(*a))[1])
    quick_trainer(delta_mode=mode, max_steps=1).train()
    assert modes == [mode]


class TakesScale(torch.nn.Module):
    """A classifier whose forward takes a second input."""

    def __init__(self):
        super().__init__()
        self.inner = build("vit")
        self.config = self.inner.config

    def forward(self, pixel_values, scale, labels=None):
        return {"logits": self.inner(pixel_values=pixel_values).logits * scale[:, None]}


def test_further_inputs_reach_both_forward_passes(quick_trainer, recorder):
    """Catches a masked view that is computed without them."""

    class Scaled(TinyImages):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"scale": 0.0}

    quick_trainer(TakesScale(), Scaled(), max_steps=1).train()
    (call,) = recorder.calls
    assert call["step"].outputs["logits"].abs().max() == 0
    assert call["step"].kl.tolist() == [0.0] * 8


def test_the_index_is_the_row_of_the_unshuffled_set(quick_trainer, recorder):
    """Catches an index within the batch or within the shuffled order."""
    trainer = quick_trainer()
    trainer.train()
    for call in recorder.calls:
        assert torch.equal(trainer.train_dataset.images[call["sample_idx"]], call["images"])
    seen = torch.cat([call["sample_idx"] for call in recorder.calls[:3]])
    assert seen.sort().values.tolist() == list(range(24))


def test_sgt_keeps_k_and_standard_has_none(quick_trainer):
    """Catches a K that moves where it must not."""
    sgt = quick_trainer(method="sgt", mask_ratio=0.3)
    sgt.train()
    assert sgt.mask_budget.k.unique().tolist() == [19]
    assert quick_trainer(method="standard").mask_budget is None


def test_k_does_not_move_in_evaluation(quick_trainer):
    """Catches compute_loss masking, or moving K, under no_grad."""
    trainer = quick_trainer(step_size=500)
    before = trainer.mask_budget.k
    metrics = trainer.evaluate(TinyImages(length=9))
    trainer.predict(TinyImages(length=9))
    assert torch.equal(trainer.mask_budget.k, before)
    assert np.isfinite(metrics["eval_loss"])


def test_a_sample_drawn_twice_in_an_epoch_moves_once(quick_args, recorder):
    """Catches a weighted sampler's favourites moving several times an epoch."""

    class Weighted(SmootTrainer):
        def _get_train_sampler(self, train_dataset=None):
            assert isinstance(train_dataset or self.train_dataset, TinyImages)  # the user's own data set
            return WeightedRandomSampler([100.0] + [1.0] * 23, 24)

    args = quick_args(step_size=500, max_steps=3, mask_ratio_min=0, mask_ratio_max=1)
    trainer = Weighted(model=build("vit"), args=args, train_dataset=TinyImages())
    trainer.train()
    rows = [
        (row, d)
        for call in recorder.calls
        for row, d in zip(call["sample_idx"].tolist(), call["step"].delta.tolist(), strict=True)
    ]
    first = next(d for row, d in rows if row == 0)
    assert [row for row, _ in rows].count(0) > 3
    assert trainer.mask_budget.k[0] == reference.update_budget(32, first, 500, 0, 64)


def test_a_second_call_of_train_goes_on_with_k(quick_trainer):
    """Catches first visits of the first training that block all moves of the second."""
    trainer = quick_trainer(step_size=500, max_steps=3)
    trainer.train()
    before = trainer.mask_budget.k
    trainer.train()
    assert not torch.equal(trainer.mask_budget.k, before)
    assert len(before.unique()) > 1


def test_model_init_starts_k_afresh(quick_args):
    """Catches a hyperparameter search in which one trial inherits the K of another."""
    trainer = SmootTrainer(model_init=lambda: build("vit"), args=quick_args(step_size=500), train_dataset=TinyImages())
    trainer.train()
    first = trainer.mask_budget.k
    trainer.train()
    assert torch.equal(trainer.mask_budget.k, first)


# --- logging, checkpoints ----------------------------------------------------------------------------------------


def test_logs_are_averages_over_the_window(quick_trainer, recorder):
    """Catches the last batch's value, a sum over micro-batches, and logs that evaluation disturbs."""
    trainer = quick_trainer(
        step_size=500, gradient_accumulation_steps=2, per_device_train_batch_size=4, eval_strategy="steps",
        eval_steps=1, trainer_kwargs={"eval_dataset": TinyImages(length=8)},
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    for window, entry in enumerate(logs):
        steps = [call["step"] for call in recorder.calls[4 * window : 4 * window + 4]]
        assert entry["ce_loss"] == pytest.approx(torch.cat([s.ce for s in steps]).mean().item(), rel=1e-5)
        assert entry["kl_loss"] == pytest.approx(torch.cat([s.kl for s in steps]).mean().item(), rel=1e-4)
        assert entry["delta"] == pytest.approx(torch.cat([s.delta for s in steps]).mean().item(), rel=1e-4)
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + entry["kl_loss"], rel=1e-4)
        assert 0 < entry["k_up"] + entry["k_down"] <= 1
    assert logs[-1].items() >= trainer.mask_budget.statistics().items()
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_a_resumed_training_is_the_uninterrupted_one(name, quick_trainer, tmp_path):
    """Catches K, first visits, fill or dropout that depend on where training was interrupted (in mid-epoch)."""
    settings = {"save_strategy": "steps", "save_steps": 4, "step_size": 500, "max_steps": 8}
    whole = quick_trainer(name, **settings)
    whole.train()
    resumed = quick_trainer(name, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert torch.equal(whole.mask_budget.k, resumed.mask_budget.k)
    assert len(whole.mask_budget.k.unique()) > 1
    for (parameter, one), two in zip(parameters(whole).items(), parameters(resumed).values(), strict=True):
        assert torch.equal(one, two), parameter


@pytest.mark.parametrize("name", ["vit", "resnet", "cnn"])
def test_the_best_model_comes_back_whole(name, quick_trainer, tmp_path):
    """Catches weights that the Trainer cannot find under the names they were saved by, and keeps as they are."""
    scores = iter([1.0, 0.0])
    trainer = quick_trainer(
        name, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
        trainer_kwargs={"eval_dataset": TinyImages(8), "compute_metrics": lambda _: {"score": next(scores)}},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    best = type(trainer.model).from_pretrained(tmp_path / "run" / "checkpoint-3")
    for parameter, value in best.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[parameter]), parameter


def test_the_best_model_may_be_the_most_faithful_one(quick_trainer):
    """Catches a deletion AUC that is not among the metrics the Trainer chooses by, or of another model."""
    data = TinyImages(10)
    trainer = quick_trainer(
        save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="deletion_auc", greater_is_better=False, deletion_auc_samples=5,
        trainer_kwargs={"eval_dataset": data},
    )  # fmt: skip
    trainer.train()
    reported = [entry["eval_deletion_auc"] for entry in trainer.state.log_history if "eval_deletion_auc" in entry]
    assert len(reported) == 2
    assert trainer.state.best_metric == min(reported)
    chosen = evaluate_faithfulness(trainer.model, Subset(data, [0, 2, 4, 6, 8]), curves=())
    assert trainer.evaluate()["eval_deletion_auc"] == pytest.approx(chosen.deletion_auc)
    assert trainer.model.training is False
    assert "eval_deletion_auc" not in trainer.predict(data).metrics


def test_weights_of_another_architecture_are_refused(quick_trainer, tmp_path):
    """Catches a partial load that passes for a resumed training."""
    quick_trainer("resnet", save_strategy="steps", save_steps=3, max_steps=3).train()
    with pytest.raises(ValueError, match="are not this model's"):
        quick_trainer("vit").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_a_checkpoint_of_other_data_is_refused(quick_trainer, tmp_path):
    """Catches the K of one data set steering another."""
    quick_trainer(save_strategy="steps", save_steps=3, max_steps=3).train()
    other = quick_trainer(train_dataset=TinyImages(length=32), max_steps=8)
    with pytest.raises(ValueError, match="num_samples is 24 there and 32 here"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_a_checkpoint_without_k_starts_it_afresh_and_says_so(quick_trainer, tmp_path, monkeypatch):
    """A plain Trainer's checkpoint can be continued; catches silence about it."""
    quick_trainer(method="standard", save_strategy="steps", save_steps=3, max_steps=3).train()
    said = []
    monkeypatch.setattr("smoot_hf.trainer.logger.warning", said.append)
    trainer = quick_trainer(max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(said) == 1
    assert "K starts afresh" in said[0]
    assert trainer.state.global_step == 6


# --- a drop-in ---------------------------------------------------------------------------------------------------


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
    step = [torch.cat([call["step"].ce + call["step"].kl]).mean() for call in recorder.calls]
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

    def forward(self, pixel_values, labels=None):
        self.seen.append(pixel_values.detach().clone())
        return self.inner(pixel_values=pixel_values)


class Pixels(TinyImages):
    """The tiny images as bytes."""

    def __getitem__(self, i):
        return {"pixel_values": (self.images[i] * 40 + 128).clamp(0, 255).to(torch.uint8), "labels": self.labels[i]}


def test_the_pipeline_augments_masks_then_resizes_in_training_and_only_resizes_in_evaluation(quick_trainer, recorder):
    """Catches a mask at the model's resolution, augmentation of epoch 0 for ever, and augmented evaluation."""
    pipeline = InputPipeline(
        mean=(0.5,) * 3, std=(0.25,) * 3, size=(12, 12), crop_padding=2, horizontal_flip=True, seed=1
    )
    model, data = RecordsInput(), Pixels()
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
    trainer.evaluate(Pixels(8))
    raw = torch.stack([Pixels(8)[row]["pixel_values"] for row in range(8)])
    assert torch.equal(torch.cat(model.seen), pipeline.prepare_evaluation(raw))


def test_a_stream_through_a_pipeline_is_refused(quick_trainer):
    """Catches training on images prepared, silently, as for evaluation: augmentation needs the index as well."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Pixels()[i] for i in range(24)])

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


def test_small_steps_on_large_images_are_warned_about(quick_args, monkeypatch):
    """Ten pixels of 50,176 are nothing; catches silence about a K that cannot move."""
    said = []
    monkeypatch.setattr("smoot_hf.mask_budget.logger.warning", said.append)
    data = TinyImages(length=4, size=80)
    SmootTrainer(build("resnet"), quick_args(), train_dataset=data)
    SmootTrainer(build("resnet"), quick_args(step_unit="percent"), train_dataset=data)
    assert len(said) == 1
    assert "step_unit='percent'" in said[0]
