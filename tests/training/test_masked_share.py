"""A share of the samples, or of the steps, is masked: the loss stays the same in expectation, the rest is standard."""

import itertools

import numpy as np
import pytest
import reference
import torch
from conftest import TinyImages, build, parameters
from hypothesis import given
from hypothesis import strategies as st
from test_clean_pass import SIX, flops, trained
from test_masked_step import slow_step
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from smoot_hf import SmootSettings
from smoot_hf.training.clean_pass import compiled_pass, shared_pass
from smoot_hf.training.masked_share import in_masked_share
from smoot_hf.training.masked_step import masked_step


class Smooth(nn.Module):
    """A classifier of images of any size, in float64, without random numbers."""

    def __init__(self, channels):
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.first = nn.Parameter(torch.randn(6, channels, 3, 3, generator=generator, dtype=torch.float64))
        self.last = nn.Parameter(torch.randn(4, 6, generator=generator, dtype=torch.float64))

    def forward(self, pixel_values):
        hidden = nn.functional.conv2d(pixel_values, self.first, padding=1).tanh().square().mean(dim=(2, 3))
        return ImageClassifierOutput(logits=hidden @ self.last.T * 5)


def batch(size=8, k=32):
    data = TinyImages()
    return data.images[:size], torch.tensor(data.labels[:size]), torch.arange(size), torch.full((size,), k), 0


def first_chosen(count, size=8):
    return torch.arange(size) < count


def loss_of(step, settings):
    return step.ce.mean() + settings.kl_factor * step.kl.mean()


# --- the choice ------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**63), st.integers(0, 9), st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
)  # fmt: skip
def test_the_choice_is_a_function_of_seed_epoch_and_sample(seed, epoch, rows, share):
    """Catches a choice that depends on the batch, or one drawn by the numbers of the fill."""
    chosen = in_masked_share(SmootSettings(masked_share=share, seed=seed), epoch, torch.tensor(rows))
    assert chosen.tolist() == [reference.in_masked_share(seed, epoch, row, share) for row in rows]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_as_large_as_it_says_and_another_in_every_epoch(share):
    """Catches the same samples in all epochs: the rest would never be masked. 6 standard deviations of a binomial."""
    settings, rows = SmootSettings(masked_share=share), torch.arange(10_000)
    one, other = (in_masked_share(settings, epoch, rows).double() for epoch in (0, 1))
    bound = 6 * (share * (1 - share) / len(rows)) ** 0.5
    assert abs(one.mean().item() - share) < bound
    assert abs((one * other).mean().item() - share**2) < bound
    assert in_masked_share(SmootSettings(), 0, rows) is None


# --- one step --------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 7), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6), st.floats(0.05, 0.95),
    st.integers(0, 5), st.integers(0, 10_000),
)  # fmt: skip
def test_the_loss_of_a_share_equals_the_equations(size, channels, height, width, share, epoch, seed):
    """Catches samples that come back in another order, a share without its weight, and a mean over the share alone."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, channels, height, width, generator=generator, dtype=torch.float64)
    labels, sample_idx = torch.randint(4, (size,), generator=generator), torch.randperm(50, generator=generator)[:size]
    k = torch.randint(height * width + 1, (size,), generator=generator)
    settings = SmootSettings(masked_share=share, kl_weight=0.7, seed=seed, masked_every=2)
    step = masked_step(Smooth(channels), images, labels, sample_idx, k, epoch, settings)
    is_chosen = [reference.in_masked_share(seed, epoch, row, share) for row in sample_idx.tolist()]
    ce, kl, delta, masks = slow_step(Smooth(channels), images, labels, sample_idx, k, epoch, settings)
    expected = reference.loss(ce, kl, is_chosen, 0.7, share, every=2)
    assert loss_of(step, settings).item() == pytest.approx(expected, rel=1e-5)
    nothing = [[False] * width] * height
    for place, chosen in enumerate(is_chosen):
        assert step.is_masked[place, 0].tolist() == (masks[place] if chosen else nothing)
        # The noise of the fill is float32.
        np.testing.assert_allclose(step.delta[place], delta[place] if chosen else 0.0, rtol=1e-5, atol=1e-9)


def test_the_expectation_over_all_choices_is_the_full_loss_and_its_gradient():
    """Summed over all 16 choices of 4 samples. Catches a weight of the KL or a gradient that is off."""
    images, labels, rows, k, epoch = batch(4)
    full, share = SmootSettings(kl_weight=0.7), 0.3
    settings = SmootSettings(kl_weight=0.7, masked_share=share)

    def loss_and_gradients(settings, is_chosen=None):
        model = Smooth(3)
        step = masked_step(
            model, images.double(), labels, rows, k, epoch, settings, weights=trained(model), is_chosen=is_chosen
        )
        loss = loss_of(step, settings)
        loss.backward()
        return torch.cat([loss[None].detach(), model.first.grad.flatten(), model.last.grad.flatten()])

    expectation = 0.0
    for choice in itertools.product([False, True], repeat=4):
        probability = share ** sum(choice) * (1 - share) ** (4 - sum(choice))
        expectation = expectation + probability * loss_and_gradients(settings, torch.tensor(choice))
    torch.testing.assert_close(expectation, loss_and_gradients(full), rtol=1e-12, atol=1e-12)


OVERRIDES = {
    "default": {}, "loss pass": SIX, "eval pass": {"saliency_pass": "eval"}, "cells": {"mask_cell": 3},
    "adversarial": {"mask_fill": "adversarial"}, "smoothed": {"label_smoothing_factor": 0.1},
}  # fmt: skip


def step_and_gradients(name, is_chosen, settings, dropout=0.3, **more):
    torch.manual_seed(0)
    model = build(name, **({"dropout": dropout} if name == "vit" else {})).train()
    step = masked_step(model, *batch(k=5), settings, weights=trained(model), is_chosen=is_chosen, **more)
    loss_of(step, settings).backward()
    return step, {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES)
@pytest.mark.parametrize("name", ["vit", "cnn", "resnet"])
def test_a_share_of_everybody_is_the_whole_step_to_the_last_bit(name, override):
    """Catches a share that is run in another order, or with other dropout, than the step of the paper."""
    whole, gradients, buffers = step_and_gradients(name, None, SmootSettings(**override))
    # The share is not 1, the choice is made by hand; with kl_factor as it is with 1.
    settings = SmootSettings(**override, masked_share=0.5, kl_weight=0.5)
    share, others, other_buffers = step_and_gradients(name, first_chosen(8), settings)
    for one, other in zip(whole[1:], share[1:], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.outputs.logits, share.outputs.logits)
    assert all(torch.equal(gradients[key], others[key]) for key in gradients)
    assert all(torch.equal(buffers[key], other_buffers[key]) for key in buffers)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES)
@pytest.mark.parametrize("name", ["vit", "cnn", "resnet"])
@pytest.mark.parametrize("autocast", [False, True])
def test_who_is_not_chosen_is_trained_as_in_standard_training(autocast, name, override, count):
    """With nobody, one and some chosen. Catches a weight without a gradient, as DDP does not bear, and lost samples."""
    settings = SmootSettings(**override, masked_share=0.3)
    is_chosen = first_chosen(count).flip(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        step, gradients, _ = step_and_gradients(name, is_chosen, settings, dropout=0.0, other_inputs={})
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert step.outputs.logits.shape == (8, 4)
    for value in (step.kl[~is_chosen], step.delta[~is_chosen], step.is_masked[~is_chosen].float()):
        assert value.eq(0).all()
    positions = step.is_masked[is_chosen].flatten(1).sum(1)
    assert positions.tolist() == [5] * count if "mask_cell" not in override else positions.gt(0).all()
    if name == "vit":
        torch.manual_seed(0)
        model = build("vit").train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(pixel_values=batch()[0]).logits
        labels, smoothing = batch()[1], settings.label_smoothing_factor
        ce = nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(step.ce, ce, rtol=2e-2 if autocast else 1e-5, atol=1e-6)


def test_the_chosen_have_the_same_dropout_in_both_views():
    """Catches two draws: with nothing masked, KL and delta would measure dropout."""
    for name in ("vit", "cnn"):
        model = build("vit", dropout=0.3).train() if name == "vit" else build(name).train()
        images, labels, rows, k, epoch = batch(k=0)
        step = masked_step(model, images, labels, rows, k, epoch, SmootSettings(masked_share=0.5))
        assert step.kl.tolist() == step.delta.tolist() == [0.0] * 8


def test_a_resized_share_is_masked_before_it_is_resized():
    """Catches a resizing left out of one of the passes."""
    resize = nn.Upsample(scale_factor=2, mode="bilinear")
    images, labels, rows, k, epoch = batch()
    model, small = build("vit").train(), images[:, :, :4, :4]
    step = masked_step(
        model, small, labels, rows, k.clamp(max=7), epoch, SmootSettings(masked_share=0.5), resize,
        is_chosen=first_chosen(3),
    )  # fmt: skip
    assert step.is_masked.shape == (8, 1, 4, 4)
    assert step.is_masked.flatten(1).sum(1).tolist() == [7, 7, 7, 0, 0, 0, 0, 0]
    torch.testing.assert_close(step.outputs.logits, model(pixel_values=resize(small)).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.arange(8), torch.ones(7, dtype=torch.bool)])
def test_a_choice_of_another_kind_is_refused(bad):
    """Catches positions taken for flags, which would mask every sample but the first."""
    with pytest.raises(ValueError, match=r"is_chosen must be bool \(8,\) on the CPU, one flag per sample, got"):
        masked_step(build("vit").train(), *batch(), SmootSettings(masked_share=0.5), is_chosen=bad)


# --- batch statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_clean_view_has_the_statistics_of_the_whole_batch(count):
    """Catches statistics of the share in the clean view or in the buffers, and a saliency that they change."""
    whole, _, buffers = step_and_gradients("resnet", None, SmootSettings())
    step, _, others = step_and_gradients("resnet", first_chosen(count), SmootSettings(masked_share=0.5))
    assert torch.equal(step.outputs.logits, whole.outputs.logits)
    assert torch.equal(step.ce, whole.ce)
    assert torch.equal(step.is_masked[:count], whole.is_masked[:count])
    assert len(buffers) > 3
    assert all(torch.equal(buffers[key], others[key]) for key in buffers)


def test_dropout_beside_batch_statistics_is_refused():
    """Catches a delta that measures dropout: the draw for the whole batch cannot be repeated for a share."""
    model = nn.Sequential()
    model.net, model.drop = build("resnet"), nn.Dropout(0.5)
    model.forward = lambda pixel_values: ImageClassifierOutput(logits=model.drop(model.net(pixel_values).logits))
    with pytest.raises(ValueError, match=r"masked_share=0.5 is refused for a model with both batch statistics"):
        masked_step(model.train(), *batch(), SmootSettings(masked_share=0.5))
    masked_step(model, *batch(), SmootSettings(masked_share=0.5, shared_dropout=False))


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statistics", "override", "passes"),
    # In units of F, with r: 3 + 4 r, 3 + 3 r, 3 + 5 r, and 4 + 3 r with batch statistics.
    [(False, {}, 4), (False, SIX, 3.75), (False, {"saliency_pass": "eval"}, 4.25), (True, {}, 4.75), (True, SIX, 3.75)],
)
def test_a_quarter_does_the_arithmetic_of_the_cost_model(statistics, override, passes):
    """Counted in floating-point operations. Catches a clean forward pass of the share that is computed twice."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    config = ViTConfig(image_size=8, patch_size=2, num_labels=5, **sizes, attn_implementation="eager")
    model = ViTForImageClassification(config).train()
    if statistics:
        model.unused = nn.BatchNorm1d(4)
    images, *others = batch()
    one_pass = flops(lambda: model(pixel_values=images))
    settings = SmootSettings(masked_share=0.25, **override)

    def step():
        named = {"weights": trained(model), "is_chosen": first_chosen(2)}
        loss_of(masked_step(model, images, *others, settings, **named), settings).backward()

    # The patches' own gradient, which the last backward pass could do without, is 2 % of this model.
    assert flops(step) / one_pass == pytest.approx(passes, rel=0.02)


def test_shares_of_all_sizes_are_compiled_a_few_times():
    """Catches a graph for every number of chosen samples, each of which takes seconds; the numbers stay the same."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, (images, *others) = Smooth(3), batch()
    network, clean_pass = torch.compile(model, backend="aot_eager"), compiled_pass(backend="aot_eager")
    settings = SmootSettings(masked_share=0.5)
    for count in (3, 5, 2, 4, 6):
        kl = [
            masked_step(
                one,
                images.double(),
                *others,
                settings,
                saliency_model=model,
                clean_pass=way,
                is_chosen=first_chosen(count),
            ).kl
            for one, way in ((model, shared_pass), (network, clean_pass))
        ]
        torch.testing.assert_close(*kl, rtol=1e-9, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


@pytest.mark.parametrize("override", [{}, {"saliency_pass": "eval"}, SIX])
@pytest.mark.parametrize("count", [0, 3, 8])
def test_a_share_that_is_known_on_the_host_waits_for_nothing(override, count):
    """Tensors on the meta device have no values: whatever reads one back to the host raises."""
    images, labels = torch.empty(8, 3, 8, 8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    model, settings = build("vit").to("meta").train(), SmootSettings(masked_share=0.5, **override)
    more = {"weights": trained(model), "is_chosen": first_chosen(count)}
    loss_of(masked_step(model, images, labels, labels, labels, 0, settings, **more), settings).backward()


# --- a training ------------------------------------------------------------------------------------------------------


def test_k_moves_for_the_chosen_and_logs_are_of_them(quick_trainer, recorder):
    """Catches K moved by a step that was not taken, and a KL that is diluted by samples that have none."""
    trainer = quick_trainer(masked_share=0.4, step_size=500, logging_steps=3, max_steps=6, kl_weight=0.5)
    trainer.train()
    settings, k = trainer.args.settings, torch.full((24,), 32)
    logs = [entry for entry in trainer.state.log_history if "kl_loss" in entry]
    for log, calls in zip(logs, (recorder.calls[:3], recorder.calls[3:]), strict=True):
        kl, delta, ce, up = [], [], [], 0
        for call in calls:
            chosen = in_masked_share(settings, call["epoch"], call["sample_idx"])
            kl, delta = [*kl, *call["step"].kl[chosen].tolist()], [*delta, *call["step"].delta[chosen].tolist()]
            ce += call["step"].ce.tolist()
            for row, one in zip(call["sample_idx"][chosen].tolist(), call["step"].delta[chosen].tolist(), strict=True):
                moved = reference.update_budget(k[row].item(), one, 500, 12, 51)
                up += moved > k[row].item()
                k[row] = moved
        assert log["kl_loss"] == pytest.approx(np.mean(kl), rel=1e-5)
        assert log["delta"] == pytest.approx(np.mean(delta), rel=1e-4)
        assert log["k_up"] == pytest.approx(up / len(kl), rel=1e-6)
        # The loss is a mean of means over three batches of equal size.
        expected = np.mean(ce) + 0.5 / 0.4 * np.sum(kl) / len(ce)
        assert log["loss"] == pytest.approx(expected, rel=1e-3)
    assert torch.equal(k.int(), trainer.mask_budget.k)
    assert len(k.unique()) > 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_second_step_is_masked(accumulation, quick_trainer, recorder):
    """Catches micro-batches counted for steps, and K that moves in a standard step."""
    trainer = quick_trainer(
        masked_every=2, max_steps=5, gradient_accumulation_steps=accumulation, step_size=500, logging_steps=1,
        per_device_train_batch_size=8 // accumulation,
    )  # fmt: skip
    trainer.train()
    assert len(recorder.calls) == 3 * accumulation
    assert trainer.args.settings.kl_factor == 2.0
    logged = ["kl_loss" in entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [True, False, True, False, True]


def test_steps_between_are_standard_ones(quick_trainer, recorder):
    """Catches a step between that is weighted, or draws random numbers: with one masked step, KL of no weight."""
    weights = []
    for settings in ({"masked_every": 100, "kl_weight": 0.0}, {"method": "standard"}):
        trainer = quick_trainer("vit", **settings)
        trainer.train()
        weights.append(parameters(trainer))
    assert len(recorder.calls) == 1
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_trainer_chooses_on_the_host(quick_trainer, recorder, monkeypatch):
    """Catches a training on a GPU that waits for the index of its samples in every step."""
    chosen = []
    step = recorder.__class__.__call__
    monkeypatch.setattr(
        recorder.__class__, "__call__", lambda *a, **b: (chosen.append(b["is_chosen"]), step(*a, **b))[1]
    )
    trainer = quick_trainer(masked_share=0.4, max_steps=2)
    trainer.train()
    for call, is_chosen in zip(recorder.calls, chosen, strict=True):
        assert torch.equal(is_chosen, in_masked_share(trainer.args.settings, 0, call["sample_idx"]))


def test_a_cuda_graph_for_every_share_is_refused(quick_trainer, monkeypatch):
    """Catches a training that records a graph for every number of chosen samples until the memory is full."""
    monkeypatch.setattr("smoot_hf.training.checks.runs_cuda_graphs", lambda _: True)
    with pytest.raises(ValueError, match=r"masked_share=0.5 is refused with torch_compile_mode="):
        quick_trainer(masked_share=0.5)
    quick_trainer(masked_share=0.5, method="standard")
