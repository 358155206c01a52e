"""K moves as Equation 4 says, whatever the sampler, the search or the second training."""

import numpy as np
import pytest
import reference
import torch
from conftest import TinyImages, build
from torch.utils.data import WeightedRandomSampler

from smoot_hf import SmootTrainer
from smoot_hf.training import problem

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
    modes, single = [], problem.SINGLE_LABEL
    noting = single._replace(shift=lambda *a: (modes.append(a[4]), single.shift(*a))[1])
    monkeypatch.setattr(problem, "SINGLE_LABEL", noting)
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
