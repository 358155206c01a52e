"""What must hold on a GPU, beside what the other tests hold on a CPU; skipped where there is none."""

import math

import pytest
import torch
from conftest import CHANNELS, CLASSES, MODELS, SIZE, TinyImages, build, largest_difference, parameters

from smoot_hf import (
    InputPipeline,
    MaskBudget,
    SmootSettings,
    evaluate_faithfulness,
    evaluate_localisation,
)
from smoot_hf import functional as SF
from smoot_hf.data import PlantedImages
from smoot_hf.training.masked_step import masked_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WAYS = {
    "standard": {"method": "standard"},
    "sgt": {"method": "sgt"},
    "smoot": {},
    "masked": {"kl_gradient": "masked", "saliency_score": "log_prob"},
    "eval pass": {"saliency_pass": "eval"},
    "independent dropout": {"shared_dropout": False},
    "random mask": {"mask_positions": "random"},
    "cells": {"mask_cell": 2},
    "recommended": {"method": "sgt", "mask_positions": "most_salient", "mask_fill": "adversarial"},
    "mean": {"mask_fill": "mean"},
    "other image": {"mask_fill": "other_image"},
    "signed": {"signed_saliency": True},
}


@pytest.fixture
def exact(monkeypatch):
    """Convolutions in full float32, by algorithms that add in a fixed order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def awkward_saliency(size):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, math.inf, -math.inf, math.nan, -math.nan, 2.0])
    return values[torch.randint(len(values), (64, *size), generator=torch.Generator().manual_seed(0))]


def random_saliency(size):
    return torch.randn(64, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", ["least_salient", "most_salient", "alternating"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("saliency", [awkward_saliency, random_saliency])
@pytest.mark.parametrize("size", [(4, 5), (7, 9), (28, 28), (80, 80)], ids=str)
def test_the_mask_is_that_of_the_cpu_in_every_position(size, saliency, dtype, positions):
    saliency, k = saliency(size).to(dtype), torch.arange(64) * math.prod(size) // 63
    here = SF.masked_positions(saliency, k, positions, epoch=3)
    there = SF.masked_positions(saliency.cuda(), k.cuda(), positions, epoch=3)
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("shape", [(1,), (3, 32, 32), (1, 28, 28)])
def test_the_noise_is_that_of_the_cpu_in_every_bit(shape):
    rows = torch.tensor([0, 1, 7, 59_999, 2**31, 2**40])
    here, there = (SF.counter_uniform(5, 11, rows.to(device), shape) for device in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("rounding", ["trunc", "floor", "nearest"])
def test_k_is_that_of_the_cpu_in_every_entry(rounding):
    settings = SmootSettings(step_size=7.0, rounding=rounding)
    budgets = {device: MaskBudget.for_training(settings, 50, (28, 28), device=device) for device in ("cpu", "cuda")}
    for epoch in range(4):
        order, delta = torch.randperm(50), torch.randn(50) * 10
        delta[order[0]] = math.nan
        for device, budget in budgets.items():
            budget.begin_epoch(epoch)
            for rows in order.to(device).split(8):
                budget.update(rows, delta.to(device)[rows], 7.0, rounding)
    rows = torch.arange(50)
    assert torch.equal(budgets["cpu"].read(rows), budgets["cuda"].read(rows.cuda()).cpu())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "standard"])
def test_no_part_of_the_step_waits_for_the_device(name, way):
    settings, size = SmootSettings(**WAYS[way]), (SIZE, SIZE)
    model = build(name).cuda().train()
    images = torch.randn(8, CHANNELS, SIZE, SIZE, device="cuda")
    labels, rows = torch.randint(CLASSES, (8,), device="cuda"), torch.arange(8, device="cuda")
    budget = MaskBudget.for_training(settings, 8, size, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())

    def step(epoch):
        budget.begin_epoch(epoch)
        found = masked_step(
            model, images, labels, rows, budget.read(rows), epoch, settings, weights=list(model.parameters())
        )
        (found.ce + found.kl).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.update(rows, found.delta, settings.step_in_positions(size), settings.rounding)

    step(0)  # handles and plans are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_that_of_the_cpu(name, exact):
    settings = SmootSettings()
    images, labels, rows = torch.randn(8, CHANNELS, SIZE, SIZE).double(), torch.arange(8) % CLASSES, torch.arange(8)
    found = {}
    for device in ("cpu", "cuda"):
        model = build(name).double().to(device).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # drawn by the device
        batch = (tensor.to(device) for tensor in (images, labels, rows, torch.full((8,), 30)))
        step = masked_step(model, *batch, 0, settings)
        (step.ce + step.kl).mean().backward()
        found[device] = step, {key: weight.grad.cpu() for key, weight in model.named_parameters()}
    (here, gradients), (there, gradients_there) = found["cpu"], found["cuda"]
    assert torch.equal(here.is_masked, there.is_masked.cpu())
    torch.testing.assert_close(there.delta.cpu(), here.delta, rtol=1e-9, atol=1e-9)
    assert largest_difference(gradients_there, gradients) < 1e-9


def on_gpu(**overrides):
    return {"use_cpu": False, "dataloader_pin_memory": True} | overrides


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bf16", "fp16"])
def test_training_runs_and_learns(way, precision, trained):
    trainer = trained("cnn", **on_gpu(**WAYS[way], **precision, max_steps=30))
    assert next(trainer.model.parameters()).is_cuda
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_a_short_training_is_that_of_the_cpu(trained, exact):
    there = trained("vit", **on_gpu(optim="sgd", learning_rate=1e-3))
    here = trained("vit", optim="sgd", learning_rate=1e-3)
    assert torch.equal(here.mask_budget.read(torch.arange(24)), there.mask_budget.read(torch.arange(24).cuda()).cpu())
    on_cpu = {key: value.cpu() for key, value in parameters(there).items()}
    assert largest_difference(on_cpu, parameters(here)) < 1e-3


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bf16", "fp16"])
def test_a_resumed_training_is_the_uninterrupted_one(name, precision, quick_trainer, trained, tmp_path, exact):
    common = on_gpu(**precision, max_steps=6, save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "whole"))
    whole = trained(name, **common)
    resumed = quick_trainer(name, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    rows = torch.arange(24, device="cuda")
    assert torch.equal(resumed.mask_budget.read(rows), whole.mask_budget.read(rows))
    assert all(torch.equal(value, parameters(whole)[key]) for key, value in parameters(resumed).items())


def test_a_checkpoint_of_the_gpu_goes_on_on_the_cpu(trained, quick_trainer, tmp_path):
    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "run")}
    trained("cnn", **on_gpu(**common))
    resumed = quick_trainer("cnn", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("way", ["standard", "smoot", "masked"])
def test_a_compiled_training_is_the_eager_one(mode, way, trained, exact):
    common = on_gpu(**WAYS[way], optim="sgd", learning_rate=1e-3)
    eager = trained("vit", **common)
    compiled = trained("vit", **common, torch_compile=True, torch_compile_mode=mode)
    assert largest_difference(parameters(compiled), parameters(eager)) < 1e-2
    if way != "standard":
        rows = torch.arange(24, device="cuda")
        apart = (compiled.mask_budget.read(rows) - eager.mask_budget.read(rows)).abs()
        assert apart.max() <= 1


def test_the_evaluations_are_those_of_the_cpu(exact):
    model, data = build("cnn").eval(), TinyImages(64)
    found = {}
    for device in ("cpu", "cuda"):
        found[device] = evaluate_faithfulness(model.to(device), data)
    assert found["cuda"].deletion_auc == pytest.approx(found["cpu"].deletion_auc, abs=0.05)
    assert found["cuda"].gap == pytest.approx(found["cpu"].gap, abs=0.05)


def test_localisation_is_that_of_the_cpu(exact):
    pixels = torch.randint(256, (64, CHANNELS, SIZE, SIZE), dtype=torch.uint8)
    evidence = torch.zeros(64, SIZE, SIZE, dtype=torch.bool)
    evidence[:, : SIZE // 2] = True
    model = build("cnn").eval()
    labels = model(pixel_values=InputPipeline((0.5,) * 3, (0.2,) * 3).normalize(pixels)).logits.argmax(1)
    data, found = PlantedImages(pixels, labels, evidence), {}
    for device in ("cpu", "cuda"):
        found[device] = evaluate_localisation(
            model.to(device), data, input_pipeline=InputPipeline((0.5,) * 3, (0.2,) * 3)
        )
    assert found["cuda"].outside[0.1].value == pytest.approx(found["cpu"].outside[0.1].value, abs=1.0)
    assert found["cuda"].roc_auc.value == pytest.approx(found["cpu"].roc_auc.value, abs=0.5)
