"""What a Trainer's user expects of resuming: at any step, with other loaders, batches and trainers."""

import json

import pytest
import torch
from conftest import QUICK, PixelImages, TinyImages, build, largest_difference, parameters
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from smoot_hf import InputPipeline, SmootTrainer

# Three steps an epoch: step 4 is in the middle of the second.
SAVES = {"save_strategy": "steps", "save_steps": 4, "step_size": 500, "max_steps": 8, "logging_steps": 1}
TIMES = ("runtime", "per_second", "train_loss")  # train_loss: the stock Trainer's mean is over the steps since resuming


def state_of(trainer):
    """Everything that a training leaves behind, tensors by name."""
    optimizer = trainer.optimizer.state_dict()["state"]
    state = {f"optimizer.{i}.{name}": value for i, entry in optimizer.items() for name, value in entry.items()}
    state |= {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    logs = [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)}
        for entry in trainer.state.log_history
    ]
    return state | {"k": trainer.mask_budget.k, "k.stored": trainer.mask_budget._stored}, logs


def require_same(one, other):
    """Bit for bit, logs included."""
    (tensors, logs), (others, other_logs) = state_of(one), state_of(other)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert logs == other_logs
    assert len(one.mask_budget.k.unique()) > 1


@pytest.mark.parametrize(
    ("name", "workers"), [(name, workers) for name in ("vit", "resnet", "cnn") for workers in (0, 2)] + [("timm", 0)]
)
def test_a_training_resumed_in_mid_epoch_is_the_uninterrupted_one(name, workers, quick_trainer, tmp_path):
    """Catches augmentation, fill or dropout drawn from a random state that is restored after the first batches."""

    def trainer():
        return augmenting(quick_trainer, name, dataloader_num_workers=workers)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    require_same(whole, resumed)


ODD = {
    # Without dropout: a persistent loader draws a random number where it begins alone, for the plain Trainer as well.
    "persistent workers": (
        "vit",
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3},
    ),
    "drop last": ("cnn", {"dataloader_drop_last": True}),
    "accumulation": ("cnn", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "share": ("cnn", {"masked_share": 0.4, "masked_every": 3}),
    "loss pass": ("cnn", {"saliency_score": "log_prob", "kl_gradient": "masked"}),
    "smoothed labels": ("cnn", {"saliency_score": "log_prob", "label_smoothing_factor": 0.1, "shared_dropout": False}),
    "compiled": ("cnn", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "bf16": ("cnn", {"bf16": True, "saliency_pass": "eval"}),
}


@pytest.mark.parametrize(("name", "settings"), ODD.values(), ids=ODD)
def test_so_it_is_with_an_uneven_set_and_less_usual_settings(name, settings, quick_trainer, tmp_path):
    """Catches rows, dropout or K that another loader, another pass or a wrapped model loses on resuming."""
    whole, resumed = (augmenting(quick_trainer, name, PixelImages(21), **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    require_same(whole, resumed)


def augmenting(quick_trainer, name, data=None, **settings):
    """A trainer whose images are flipped and cropped at random."""
    pipeline = InputPipeline((0.5,) * 3, (0.25,) * 3, crop_padding=2, horizontal_flip=True, seed=1)
    return quick_trainer(
        name, data or PixelImages(), {"input_pipeline": pipeline}, **SAVES | {"optim": "adamw_torch"} | settings
    )


def test_a_finished_training_is_continued_for_more_epochs(quick_trainer):
    """Catches first visits of the last epoch that block the next one's, and a K that starts afresh."""
    settings = {"max_steps": -1, "save_strategy": "epoch", "lr_scheduler_type": "constant", "step_size": 500}
    settings |= {"logging_steps": 1}
    settings |= {"overwrite_output_dir": True}
    whole, short, longer = (quick_trainer(**settings, num_train_epochs=epochs) for epochs in (4, 2, 4))
    short.train()
    longer.train(resume_from_checkpoint=True)
    whole.train()
    require_same(whole, longer)


def test_with_ignore_data_skip_an_epoch_begins_again_and_its_samples_stay(quick_trainer, tmp_path, recorder):
    """Catches a second move in one epoch of the samples that had moved before the training was broken off."""
    first = quick_trainer(**SAVES | {"max_steps": 4})
    first.train()
    k, has_moved = first.mask_budget.k, first.mask_budget._stored < 0
    recorder.calls.clear()
    again = quick_trainer(**SAVES | {"max_steps": 7}, ignore_data_skip=True)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert [call["epoch"] for call in recorder.calls] == [1, 1, 1]
    assert torch.equal(again.mask_budget.k[has_moved], k[has_moved])
    assert not torch.equal(again.mask_budget.k, k)


def test_resuming_with_another_batch_size_goes_on_with_k(quick_trainer, tmp_path, recorder):
    """Steps are counted as a Trainer counts them; catches K, or the visits of an epoch, lost with the old batches."""
    first = quick_trainer(**SAVES | {"max_steps": 4})
    first.train()
    k, has_moved = first.mask_budget.k, first.mask_budget._stored < 0
    assert has_moved.sum() == 8
    recorder.calls.clear()
    # Six steps an epoch: step 4 is in the first, where every sample has a move left.
    halved = quick_trainer(**SAVES | {"per_device_train_batch_size": 4, "max_steps": 6})
    halved.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert [call["epoch"] for call in recorder.calls] == [0, 0]
    rows = torch.cat([call["sample_idx"] for call in recorder.calls])
    assert torch.equal(torch.cat([call["k"] for call in recorder.calls]), k[rows])
    others = torch.ones(24, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(halved.mask_budget.k[others], k[others])
    assert not torch.equal(halved.mask_budget.k[rows], k[rows])
    # Three steps an epoch again, of eight: step 4 is in the second, whose visits the checkpoint knows.
    recorder.calls.clear()
    same = quick_trainer(**SAVES | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 6})
    same.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    rows = torch.cat([call["sample_idx"] for call in recorder.calls])
    assert [call["epoch"] for call in recorder.calls] == [1] * 4
    assert not has_moved[rows].any()


@pytest.mark.parametrize("method", ["standard", "smoot"])
def test_a_finished_training_takes_no_further_step(method, quick_trainer, tmp_path):
    """A kill after the last save: catches the stock loop's one step more where the training ends in mid-epoch."""
    settings = SAVES | {"max_steps": 4, "lr_scheduler_type": "constant", "method": method}
    whole, resumed = quick_trainer(**settings), quick_trainer(**settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 4
    assert largest_difference(parameters(whole), parameters(resumed)) == 0
    if method == "smoot":
        assert torch.equal(whole.mask_budget.k, resumed.mask_budget.k)


def test_save_only_model_starts_the_rest_afresh_and_says_so(quick_trainer, tmp_path, monkeypatch):
    """Catches silence about an optimizer state and a K that were not saved."""
    quick_trainer(**SAVES, save_only_model=True).train()
    folder = tmp_path / "run" / "checkpoint-4"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("optimizer", "mask_budget"))]
    said = []
    for module in ("trainer", "checkpoints"):
        monkeypatch.setattr(f"smoot_hf.training.{module}.logger.warning", said.append)
    trainer = quick_trainer(**SAVES | {"save_strategy": "no"})
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 8
    assert sorted("K starts afresh" in line for line in said) == [False, True]
    assert any("optimizer and learning rate start afresh" in line for line in said)


def plain_trainer(tmp_path, name, folder, **overrides):
    args = TrainingArguments(output_dir=str(tmp_path / folder), **(QUICK | overrides))
    return Trainer(model=build(name), args=args, train_dataset=TinyImages())


@pytest.mark.parametrize("name", ["vit", "resnet", "cnn"])
def test_smoot_goes_on_from_a_plain_trainers_checkpoint(name, tmp_path, quick_trainer, monkeypatch):
    """Catches weights or an optimizer state left behind: K starts afresh, with one warning, all else goes on."""
    plain = plain_trainer(tmp_path, name, "plain", save_strategy="steps", save_steps=4, max_steps=4)
    plain.train()
    folder, said = str(tmp_path / "plain" / "checkpoint-4"), []
    monkeypatch.setattr("smoot_hf.training.trainer.logger.warning", said.append)
    trainer = quick_trainer(name, max_steps=4, mask_ratio=0.25)
    trainer.train(resume_from_checkpoint=folder)
    assert trainer.state.global_step == 4  # there was nothing left to do
    assert largest_difference(dict(plain.model.named_parameters()), parameters(trainer)) == 0
    assert len(said) == 1
    assert "has no mask_budget.safetensors: K starts afresh at mask_ratio" in said[0]
    assert trainer.mask_budget.k.unique().tolist() == [16]
    further = quick_trainer(name, max_steps=6, step_size=500)
    further.train(resume_from_checkpoint=folder)
    assert further.state.global_step == 6
    assert len(further.mask_budget.k.unique()) > 1


# A plain Trainer cannot resume a ViT, its own no more than ours (huggingface/transformers issue 43701).
@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_a_plain_trainer_goes_on_from_our_checkpoint(name, tmp_path, quick_trainer):
    """Catches files that the stock Trainer trips over: it ends where our own standard training ends."""
    quick_trainer(name, **SAVES).train()
    folder = str(tmp_path / "run" / "checkpoint-4")
    plain = plain_trainer(tmp_path, name, "plain", max_steps=8)
    plain.train(resume_from_checkpoint=folder)
    standard = quick_trainer(name, method="standard", max_steps=8)
    standard.train(resume_from_checkpoint=folder)
    assert plain.state.global_step == 8
    assert largest_difference(dict(plain.model.named_parameters()), parameters(standard)) == 0


def test_the_rotation_keeps_the_best_checkpoint_and_its_k(tmp_path, quick_trainer):
    """save_total_limit with load_best_model_at_end: catches a K file in the way, and a checkpoint without one."""
    scores = iter([2.0, 1.0, 0.0])
    trainer = quick_trainer(
        **SAVES | {"max_steps": 6, "save_steps": 2}, save_total_limit=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
        trainer_kwargs={"eval_dataset": TinyImages(8), "compute_metrics": lambda _: {"score": next(scores)}},
    )  # fmt: skip
    trainer.train()
    folders = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert folders == ["checkpoint-2", "checkpoint-6"]
    last = load_file(tmp_path / "run" / "checkpoint-6" / "mask_budget.safetensors")["k"]
    # K is that of the end, as the optimizer's state is; the best model's own is in its checkpoint.
    assert torch.equal(trainer.mask_budget.k, last)
    assert (tmp_path / "run" / "checkpoint-2" / "mask_budget.safetensors").is_file()
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-2")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"signed_saliency": True}, "signed_saliency is False there and True here"),
        ({"saliency_score": "log_prob"}, "saliency_score is logit there and log_prob here"),
        ({"saliency_target": "predicted"}, "saliency_target is label there and predicted here"),
        ({"mask_fill": "mean"}, "mask_fill is uniform there and mean here"),
        ({"mask_positions": "random"}, "mask_positions is least_salient there and random here"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_a_k_that_means_something_else_is_refused(changed, says, saved_run, quick_trainer):
    """Catches a K fitted to one ranking of the pixels at work on another."""
    with pytest.raises(ValueError, match=says):
        quick_trainer(max_steps=4, **changed).train(resume_from_checkpoint=str(saved_run / "checkpoint-2"))


def test_how_k_moves_may_be_changed_on_resuming(saved_run, quick_trainer):
    """As the learning rate may; catches a refusal of what does not change what K means."""
    trainer = quick_trainer(max_steps=4, step_size=700, alpha=0.5, kl_weight=2.0, rounding="trunc")
    trainer.train(resume_from_checkpoint=str(saved_run / "checkpoint-2"))
    assert isinstance(trainer, SmootTrainer)
    assert trainer.state.global_step == 4
