"""Numbers that are not finite, vanish or saturate: K stays what it was, and the ranking what it would be."""

import math

import numpy as np
import pytest
import torch
from conftest import CLASSES, QUICK, TinyImages, build, parameters
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerCallback

from smoot_hf import MaskBudget, SmootTrainer, SmootTrainingArguments
from smoot_hf import functional as SF
from smoot_hf.training.masked_step import masked_step

MOVES = {"step_size": 5000, "mask_ratio_min": 0.0, "mask_ratio_max": 1.0}


class FaultyOnce(nn.Module):
    """A tiny ViT whose logits of one image of one training batch are replaced."""

    def __init__(self, value, batch):
        super().__init__()
        self.inner, self.value, self.batch = build("vit"), value, batch
        self.config = self.inner.config
        self.passes = 0

    def forward(self, pixel_values, labels=None):
        logits = self.inner(pixel_values=pixel_values).logits
        self.passes += self.training
        if self.training and self.passes in (2 * self.batch - 1, 2 * self.batch):  # the clean and the masked view
            logits = torch.where(torch.arange(len(logits))[:, None] == 1, self.value, logits)
        return {"logits": logits}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_k_of_a_batch_whose_loss_is_not_finite_moves(value, quick_trainer, recorder):
    """Catches K moved by the batch's healthy samples, though the step that they belong to is lost; and a NaN in K."""
    trainer = quick_trainer(FaultyOnce(value, batch=2), max_steps=3, learning_rate=0.0, **MOVES)
    trainer.train()
    k, faulty = trainer.mask_budget.k, recorder.calls[1]["sample_idx"]
    assert torch.isfinite(recorder.calls[1]["step"].delta).sum() == 7
    assert k[faulty].tolist() == [32] * 8
    assert (k[recorder.calls[0]["sample_idx"]] != 32).any()
    assert (k[recorder.calls[2]["sample_idx"]] != 32).any()


class RulesOut(nn.Module):
    """A tiny ViT one of whose classes can never be: its logit is -inf."""

    def __init__(self):
        super().__init__()
        self.inner = build("vit")
        self.config = self.inner.config

    def forward(self, pixel_values, labels=None):
        logits = self.inner(pixel_values=pixel_values).logits
        return {"logits": logits.masked_fill(torch.arange(CLASSES) == 3, -math.inf)}


@pytest.mark.parametrize("score", ["logit", "log_prob"])
@pytest.mark.parametrize("kl_gradient", ["both", "masked"])
def test_a_class_that_is_ruled_out_does_no_harm(kl_gradient, score, quick_trainer, recorder):
    """Catches a loss of NaN, by which every weight and the saliency are lost, where standard training is finite."""
    data = TinyImages(classes=3)
    trainer = quick_trainer(RulesOut(), data, kl_gradient=kl_gradient, saliency_score=score, **MOVES)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in parameters(trainer).values())
    assert len(trainer.mask_budget.k.unique()) > 3
    for call in recorder.calls:
        assert torch.isfinite(call["step"].kl).all()


class ScaledTrainer(SmootTrainer):
    """With the loss scaler of fp16, on a CPU: from so high a scale that the first gradients overflow."""

    def create_optimizer(self, *args):
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-16)
        return super().create_optimizer(*args)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_k_does_not_move_where_the_scaler_skips_the_step(optim, accumulation, tmp_path, recorder):
    """Catches K moved by a step that the weights did not take. The fused optimizer tells nobody of the skip."""
    args = SmootTrainingArguments(
        output_dir=str(tmp_path), **QUICK | {"max_steps": 12, "per_device_train_batch_size": 8 // accumulation},
        gradient_accumulation_steps=accumulation, optim=optim, lr_scheduler_type="constant", max_grad_norm=0, **MOVES,
    )  # fmt: skip
    trainer = ScaledTrainer(build("vit"), args, train_dataset=TinyImages())
    states = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            states.append((parameters(trainer)["classifier.weight"], trainer.mask_budget.k))

    before = parameters(trainer)["classifier.weight"], trainer.mask_budget.k
    trainer.add_callback(Watch())
    trainer.train()
    stepped, k_moved = [], []
    for after in states:
        stepped.append(not torch.equal(before[0], after[0]))
        k_moved.append(not torch.equal(before[1], after[1]))
        before = after
    assert True in stepped
    assert False in stepped
    assert k_moved == stepped


@given(
    st.lists(st.floats(width=64) | st.sampled_from([math.inf, -math.inf, math.nan, 1e308, -1e308, 5e-324]), min_size=6,
             max_size=6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.floats(0, 1e12),
    st.sampled_from(["floor", "trunc", "nearest"]),
)  # fmt: skip
def test_k_stays_within_its_bounds_whatever_delta_is(deltas, dtype, step_size, rounding):
    """Catches a NaN cast to an integer, an overflow of int32 and a histogram that no longer counts every sample."""
    budget = MaskBudget(6, (10, 10))
    for epoch, delta in enumerate([deltas, deltas[::-1]]):
        budget.begin_epoch(epoch)
        before, given_delta = budget.k, torch.tensor(delta, dtype=torch.float64).to(dtype)
        budget.update(torch.arange(6), given_delta, step_size, rounding)
        assert budget.k.min() >= 20
        assert budget.k.max() <= 80
        is_number = torch.isfinite(given_delta)
        assert torch.equal(budget.k[~is_number], before[~is_number])
    assert budget.histogram.tolist() == np.bincount(budget.k, minlength=81)[20:].tolist()


LOGITS = st.lists(
    st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from([0.0, 88.0, 1e4, 3e38, -3e38]), min_size=CLASSES,
    max_size=CLASSES,
)  # fmt: skip


@given(LOGITS, LOGITS, st.sampled_from(["rank", "class", "label"]))
def test_delta_of_any_finite_logits_is_within_its_range(one, other, mode):
    """Catches a softmax that overflows: at 3e38, and where it is saturated to exactly 0 and 1."""
    delta = SF.probability_shift(torch.tensor([one]), torch.tensor([other]), 0.8, 5, mode, torch.tensor([1]))
    assert -1 <= delta.item() <= 1


@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0])
def test_a_softmax_saturated_to_one_still_ranks_by_the_log_probability(margin):
    """Catches 1 - p = 0 exactly (above a margin of 17): the ranking would be that of the runner-up class alone."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(36, CLASSES, generator=generator)
    target, masks = torch.zeros(8, dtype=torch.long), []
    for dtype in (torch.float64, torch.float32):
        images = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        logits = images.flatten(1) @ weight.to(dtype)
        # Without the images' share, so that each is as certain as `margin` says.
        logits = logits - logits.detach() + torch.tensor([margin, 0.0, -1.0, -2.0], dtype=dtype)
        masks.append(
            [
                SF.least_salient_mask(SF.input_saliency(score(logits, target, "log_prob"), images), torch.full((8,), 9))
                for score in (SF.class_score, SF.ranking_score)
            ]
        )
    for single in masks[1]:
        assert torch.equal(single, masks[0][0])


def test_zero_saliency_masks_the_first_positions_and_moves_k_by_a_number(quick_args):
    """Catches a NaN from a division by the largest gradient, and a mask that is not of K positions."""
    model = build("vit").train()
    with torch.no_grad():
        model.classifier.weight.zero_()
    data = TinyImages()
    batch = data.images[:8], torch.tensor(data.labels[:8]), torch.arange(8), torch.full((8,), 13), 0
    for score in ("logit", "log_prob"):
        step = masked_step(model, *batch, quick_args(saliency_score=score))
        assert step.is_masked.flatten(1)[:, :13].all()
        assert step.is_masked.sum() == 8 * 13
        assert step.delta.tolist() == [0.0] * 8


def deep_mask(dtype, gain, score):
    """The mask of a ViT of twelve layers whose last weights, and with them all gradients, are scaled by `gain`."""
    torch.manual_seed(0)
    model = build("vit").eval()
    model.vit.layers.extend(build("vit").vit.layers[0] for _ in range(10))
    with torch.no_grad():
        model.classifier.weight.mul_(gain)
    images = TinyImages().images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(pixel_values=images).logits
        assert logits.dtype == dtype
        saliency = SF.input_saliency(score(logits, torch.tensor(TinyImages().labels)), images)
    return SF.least_salient_mask(saliency, torch.full((24,), 32))


@pytest.mark.parametrize("gain", [1.0, 2.0**-12])
def test_fp16_ranks_a_deep_model_as_fp32_does_however_small_its_gradients(gain):
    """Catches gradients below 2**-24 that vanish on their way: half of the mask would be the tie-break."""
    exact = deep_mask(torch.float32, 1.0, SF.class_score)
    # A power of two scales every gradient exactly: the fp32 ranking is the same.
    assert torch.equal(deep_mask(torch.float32, gain, SF.class_score), exact)
    agreed = (deep_mask(torch.float16, gain, SF.ranking_score) == exact).float().mean()
    assert agreed > 0.98


def test_the_test_above_can_fail():
    """Without the factor the gradients do vanish."""
    exact = deep_mask(torch.float32, 1.0, SF.class_score)
    assert (deep_mask(torch.float16, 2.0**-12, SF.class_score) == exact).float().mean() < 0.98


class Becomes(TrainerCallback):
    """From the third step on the classifier's weights are of this value: NaN in a diverged run, 0 in a dead model."""

    def __init__(self, value):
        self.value = value

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step >= 3:
            with torch.no_grad():
                model.classifier.weight.fill_(self.value)


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_diverged_run_logs_a_deletion_auc_of_nan_and_goes_on(value, quick_trainer, monkeypatch):
    """Catches hours of training that an evaluation ends, and a number for a saliency that ranks nothing."""
    said = []
    monkeypatch.setattr("smoot_hf.training.trainer.logger.warning", said.append)
    trainer = quick_trainer(
        max_steps=6, eval_strategy="steps", eval_steps=2, deletion_auc_samples=4, learning_rate=1e-3,
        metric_for_best_model="deletion_auc", load_best_model_at_end=True, save_strategy="best",
        trainer_kwargs={"eval_dataset": TinyImages(8), "callbacks": [Becomes(value)]},
    )  # fmt: skip
    trainer.train()
    first, *later = [log["eval_deletion_auc"] for log in trainer.state.log_history if "eval_deletion_auc" in log]
    assert trainer.state.global_step == 6
    assert math.isfinite(first)
    assert len(later) == 2
    assert all(math.isnan(value) for value in later)
    assert trainer.state.best_metric == first
    assert len(said) == 2
    assert "deletion_auc is NaN: attribution 'gradient'" in said[0]


def test_an_evaluation_that_is_wrong_still_ends_the_run(quick_trainer):
    """The test above can fail: only a saliency that ranks nothing is NaN, not labels that are no classes."""
    data = TinyImages(8)
    trainer = quick_trainer(deletion_auc_samples=8)
    data.labels[0] = 99
    with pytest.raises(ValueError, match="99"):
        trainer._deletion_auc(trainer.get_eval_dataloader(data))
