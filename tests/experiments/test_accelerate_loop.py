"""The loop without a Trainer computes what SmootTrainer computes."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TinyImages, build, freeze_batch_statistics, largest_difference, parameters
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from smoot_hf import MaskBudget, SmootTrainer


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "recipes")
    import accelerate_loop

    return accelerate_loop


class InOrder(SmootTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


SETTINGS = {
    "smoot": {"step_size": 300},
    "sgt": {"method": "sgt"},
    "masked": {"kl_gradient": "masked", "saliency_score": "log_prob", "step_size": 300, "kl_weight": 0.5},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "step_size": 300},
}


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loop_is_the_trainer(name, setting, loop, quick_args):
    """Catches a README that shows another objective than the trainer's, or K that moves at another time."""
    args = quick_args(**{"max_steps": -1, "num_train_epochs": 2, "max_grad_norm": 0.0} | SETTINGS[setting])
    args.lr_scheduler_type = "constant"
    data = TinyImages()
    ours = model_of(name)
    trainer = InOrder(
        ours, args, train_dataset=data, optimizers=(torch.optim.SGD(ours.parameters(), args.learning_rate), None)
    )
    trainer.train()

    AcceleratorState._reset_state()
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True)
    model = model_of(name)
    rows = TensorDataset(data.images, torch.tensor(data.labels), torch.arange(len(data)))
    prepared = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), args.learning_rate),
        DataLoader(rows, args.per_device_train_batch_size),
    )
    budget = MaskBudget.for_training(args.settings, len(data), (8, 8))
    loop.train(*prepared, budget, args.settings, accelerator, int(args.num_train_epochs))

    # Sums of accumulated batches, and two backward passes in place of one, are rounded in another order.
    found = largest_difference(dict(model.named_parameters()), parameters(trainer))
    assert found <= (1e-6 if setting in ("accumulated", "masked") else 0)
    assert torch.equal(budget.k, trainer.mask_budget.k)
    assert budget.k.unique().numel() > 1 or setting == "sgt"


def test_a_loop_resumes_with_its_k(loop, quick_args, tmp_path):
    """Catches `register_for_checkpointing(budget)` that is refused, or that leaves K or its epoch behind."""
    args, data = quick_args(num_train_epochs=2, step_size=300), TinyImages()

    def prepared():
        AcceleratorState._reset_state()
        accelerator, model = Accelerator(cpu=True), model_of("vit")
        rows = TensorDataset(data.images, torch.tensor(data.labels), torch.arange(len(data)))
        parts = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01), DataLoader(rows, 8))
        budget = MaskBudget.for_training(args.settings, len(data), (8, 8))
        accelerator.register_for_checkpointing(budget)
        return accelerator, parts, budget

    accelerator, parts, budget = prepared()
    loop.train(*parts, budget, args.settings, accelerator, num_epochs=2)
    accelerator.save_state(str(tmp_path / "state"))
    assert budget.k.unique().numel() > 1
    accelerator, _, other = prepared()
    assert other.k.unique().numel() == 1
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(other._stored, budget._stored)
    assert other.epoch == budget.epoch


def model_of(name):
    model = build(name)
    freeze_batch_statistics(model)
    return model


def test_the_recipe_runs_and_saves_what_it_trained(loop, tmp_path, monkeypatch, capsys):
    """Catches a recipe that stops at the first line that a reader would copy."""
    monkeypatch.setattr(sys, "argv", ["loop", "--output_dir", str(tmp_path), "--num_train_epochs", "1", "--use_cpu"])
    loop.main()
    said = capsys.readouterr().out
    assert "of 360 images" in said
    assert MaskBudget.load(tmp_path / "mask_budget.safetensors").num_samples == 1437
    assert (tmp_path / "model.safetensors").is_file()


def test_standard_training_is_refused(loop, monkeypatch, capsys):
    """Catches a loop that masks under the name of standard training."""
    monkeypatch.setattr(sys, "argv", ["loop", "--method", "standard"])
    with pytest.raises(SystemExit):
        loop.main()
    assert "method='standard' masks nothing" in capsys.readouterr().err
