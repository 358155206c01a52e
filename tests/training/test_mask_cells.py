"""Masks of whole cells: equal to a slow loop, K counted in cells from the settings to the checkpoint."""

import pytest
import reference
import torch
from conftest import TinyImages, build, largest_difference, parameters
from hypothesis import given
from hypothesis import strategies as st
from plain_training import PlainTraining

from smoot_hf import MaskBudget, SmootSettings, SmootTrainer, evaluate_faithfulness
from smoot_hf import functional as SF
from smoot_hf.training.masked_step import mask_images

# Of 8x8 pixels: nine cells, those of the last row and column narrower.
CELLS = {"mask_cell": 3, "step_size": 2000, "step_unit": "pixels", "mask_ratio_min": 0.0, "mask_ratio_max": 1.0}


@st.composite
def batches(draw):
    """Images and gradients (B, C, H, W) of whole numbers, whose sums are exact; the K of each; a cell that fits."""
    height, width, channels = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    cell, batch = draw(st.integers(1, min(height, width))), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (batch, channels, height, width)
    images, gradient = (torch.randint(-9, 10, shape, generator=generator).double() for _ in range(2))
    rows, columns = SF.cell_grid((height, width), cell)
    return images, gradient * channels, torch.randint(rows * columns + 1, (batch,), generator=generator), cell


@given(batches(), st.sampled_from(["least_salient", "most_salient", "random"]), st.booleans())
def test_masked_images_equal_the_slow_loop(drawn, positions, signed):
    """Catches half a cell masked, K that counts pixels, one noise for a whole cell, and its range from what is gone."""
    images, gradient, k, cell = drawn
    batch, channels, height, width = images.shape
    settings, rows = (
        SmootSettings(mask_cell=cell, mask_positions=positions, signed_saliency=signed),
        torch.arange(batch),
    )
    masked, is_masked = mask_images(images, gradient, rows, k, 0, settings)
    noise = SF.counter_uniform(settings.seed, 0, rows, images.shape[1:]).double()
    for b in range(batch):
        maps = gradient[b] if signed else gradient[b].abs()
        sums = reference.cell_sum(maps.mean(0).tolist(), cell)
        if positions == "most_salient":
            sums = [[-value for value in row] for row in sums]
        expected = reference.spread_cells(reference.least_salient_mask(sums, int(k[b])), cell, height, width)
        if positions == "random":
            assert SF.cell_sum(is_masked[b], cell).bool().sum() == k[b]
            expected = is_masked[b, 0].tolist()
        assert is_masked[b, 0].tolist() == expected
        for c in range(channels):
            fill = torch.tensor(reference.uniform_fill(images[b, c].tolist(), expected, noise[b, c].tolist()))
            wanted = torch.where(is_masked[b, 0], fill.double(), images[b, c])
            torch.testing.assert_close(masked[b, c], wanted, rtol=1e-6, atol=1e-6)


def test_every_cell_is_as_likely_at_random():
    """Catches noise summed over cells, by which the narrow ones at the edge would always be masked first."""
    images, rows = torch.zeros(4000, 1, 5, 5), torch.arange(4000)
    settings = SmootSettings(mask_cell=2, mask_positions="random")
    _, is_masked = mask_images(images, images, rows, torch.full((4000,), 3), 0, settings)
    share = SF.cell_sum(is_masked[:, 0], 2).bool().double().mean(0)
    # Nine cells, three of them masked: the standard deviation of a share is 0.0075.
    assert (share - 1 / 3).abs().max() < 0.03


# --- training ----------------------------------------------------------------------------------------------------


def test_a_training_with_cells_is_that_of_the_equations(quick_trainer, recorder):
    """Catches a K in pixels anywhere between the settings and the loss: the oracle counts nine cells."""
    trainer = quick_trainer(
        **CELLS, rounding="nearest", optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=0.05
    )
    assert trainer.mask_budget.k.unique().tolist() == [4]
    trainer.train()
    model = build("vit")
    plain = PlainTraining(model, TinyImages(), trainer.args).follow(recorder.calls)
    assert trainer.mask_budget.k.tolist() == plain.k
    assert len(set(plain.k)) > 3
    # The slow loop sums and takes means in another order.
    assert largest_difference(parameters(trainer), dict(model.named_parameters())) < 1e-4
    for call in recorder.calls:
        cells = SF.cell_sum(call["step"].is_masked[:, 0], 3)
        # A masked cell is masked whole: nine pixels, six at one edge, four in the corner.
        assert set(cells.flatten().tolist()) <= {0, 4, 6, 9}
        assert cells.bool().sum((1, 2)).tolist() == call["k"].tolist()


def test_cells_of_one_pixel_are_what_training_was_without_them(trained, monkeypatch):
    """Catches a default that changes a single bit: the same training with the cells taken out of the step."""
    ours = trained(step_size=500)
    monkeypatch.setattr(SF, "cell_sum", lambda values, cell: values)
    monkeypatch.setattr(SF, "spread_cells", lambda values, cell, image_size: values)
    without = trained(step_size=500)
    assert largest_difference(parameters(ours), parameters(without)) == 0
    assert torch.equal(ours.mask_budget.k, without.mask_budget.k)


def test_a_constant_k_of_cells_is_sgt(trained):
    """Catches a K that drifts without a step, and cells in one of the methods alone."""
    runs = [trained(**CELLS | change) for change in ({"method": "sgt"}, {"step_size": 0.0})]
    assert largest_difference(*map(parameters, runs)) == 0
    assert largest_difference(parameters(runs[0]), parameters(trained(method="sgt"))) > 1e-4


def test_a_resumed_training_with_cells_is_the_uninterrupted_one(quick_trainer, tmp_path):
    """Catches K of cells that is read back as K of pixels."""
    settings = CELLS | {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole, resumed = quick_trainer(**settings), quick_trainer(**settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert largest_difference(parameters(whole), parameters(resumed)) == 0
    assert torch.equal(whole.mask_budget.k, resumed.mask_budget.k)
    assert len(whole.mask_budget.k.unique()) > 1
    for cell in (1, 4):
        with pytest.raises(ValueError, match=f"mask_cell is 3 there and {cell} here"):
            quick_trainer(**settings | {"mask_cell": cell}).train(resume_from_checkpoint=str(checkpoint))


def test_a_cell_larger_than_the_image_is_refused_when_the_trainer_is_built(quick_trainer):
    """Catches one cell for the whole image: K could be nothing or all."""
    with pytest.raises(ValueError, match=r"mask_cell must be between 1 and 8, .* 8x8 pixels, got 9"):
        quick_trainer(mask_cell=9)


def test_deletion_auc_removes_the_cells_of_the_mask(quick_args, monkeypatch):
    """Catches a metric that chooses the best checkpoint by other cells than were trained on."""
    seen = []
    measured = evaluate_faithfulness
    monkeypatch.setattr(
        "smoot_hf.training.trainer.evaluate_faithfulness", lambda *a, **k: seen.append(measured(*a, **k)) or seen[-1]
    )
    args = quick_args(mask_cell=4, deletion_auc_samples=8)
    SmootTrainer(build("vit"), args, train_dataset=TinyImages(), eval_dataset=TinyImages(8)).evaluate()
    assert [found.convention.cell for found in seen] == [4]


# --- the budget and its file -------------------------------------------------------------------------------------


def test_a_budget_of_cells_counts_cells():
    """Catches a ratio of the pixels where K and its bounds are of 2 x 3 cells."""
    budget = MaskBudget(5, (30, 45), mask_cell=16)
    assert (budget.positions, budget.unit, budget.k_min, budget.k_max) == (6, "cells", 1, 4)
    assert budget.k.tolist() == [3] * 5
    assert budget.to_dataset()["ratio"][:] == [0.5] * 5
    assert "image_size=30x45, mask_cell=16, " in repr(budget)
    settings = SmootSettings(mask_cell=16)
    assert MaskBudget.for_training(settings, 5, (30, 45)).positions == 6


def test_a_file_of_other_cells_is_refused_and_nothing_taken_up(tmp_path):
    """Catches K of patches at work on pixels, also where all numbers fit both: 0 to 1 of the positions, K = 0."""
    path = tmp_path / "k.safetensors"
    ratios = {"mask_ratio": 0.0, "mask_ratio_min": 0.0, "mask_ratio_max": 0.0}
    saved = MaskBudget(3, (8, 8), **ratios, mask_cell=4)
    saved.save(path)
    loaded = MaskBudget.load(path)
    assert (loaded.mask_cell, loaded.image_size, loaded.positions) == (4, (8, 8), 4)
    other = MaskBudget(3, (8, 8), **ratios)
    with pytest.raises(ValueError, match="mask_cell is 4 there and 1 here"):
        other.restore(path)
    with pytest.raises(ValueError, match="mask_cell is 4 there and 1 here"):
        other.load_state_dict(saved.state_dict())
    MaskBudget(3, (8, 8), **ratios, mask_cell=4).restore(path)


def test_what_was_saved_before_there_were_cells_is_of_pixels(tmp_path):
    """Catches an old checkpoint that is refused, or taken for one of any cells."""
    old = MaskBudget(3, (8, 8)).state_dict()
    del old["metadata"]["mask_cell"]
    MaskBudget(3, (8, 8)).load_state_dict(old)
    with pytest.raises(ValueError, match="mask_cell is 1 there and 2 here"):
        MaskBudget(3, (8, 8), mask_cell=2).load_state_dict(old)
