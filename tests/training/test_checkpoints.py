"""What is logged and saved, and what comes back."""

import json

import pytest
import torch
from conftest import TinyImages
from torch.utils.data import Subset

from smoot_hf import evaluate_faithfulness


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


@pytest.mark.parametrize("prefix", ["", "eval_", "eval_corner_"])
def test_the_best_model_may_be_the_most_faithful_one(prefix, quick_trainer):
    """Catches a deletion AUC that is not among the metrics the Trainer chooses by, the greatest kept, another model."""
    data = TinyImages(10)
    name = "eval_corner_deletion_auc" if "corner" in prefix else "eval_deletion_auc"
    trainer = quick_trainer(
        save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model=f"{prefix}deletion_auc", deletion_auc_samples=5,
        trainer_kwargs={"eval_dataset": {"corner": data} if "corner" in prefix else data},
    )  # fmt: skip
    trainer.train()
    reported = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert len(set(reported)) == 2
    assert trainer.state.best_metric == min(reported)
    chosen = evaluate_faithfulness(trainer.model, Subset(data, [0, 2, 4, 6, 8]), curves=())
    assert trainer.evaluate()[name] == pytest.approx(chosen.deletion_auc)
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
