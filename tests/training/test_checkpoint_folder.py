"""A checkpoint is taken up whole or not at all, whatever moment a process was killed at."""

import json
import shutil

import pytest
import torch
from conftest import parameters

from smoot_hf.training.checkpoint_folder import checkpoint_folders, find_damage, newest_whole_checkpoint

# In the order in which a Trainer writes them.
WRITTEN = [
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "mask_budget.safetensors", "rng_state.pth"),
    "trainer_state.json",
]
SAVES = {"save_strategy": "steps", "save_steps": 2, "step_size": 500}


@pytest.fixture
def run(quick_trainer, tmp_path):
    """An undisturbed training, and the folder with its checkpoints of steps 2, 4 and 6."""
    trainer = quick_trainer(**SAVES)
    trainer.train()
    return trainer, tmp_path / "run"


@pytest.fixture
def said(monkeypatch):
    """Warnings about folders that are passed over."""
    warnings = []
    monkeypatch.setattr("smoot_hf.training.checkpoint_folder.logger.warning", warnings.append)
    return warnings


def test_the_list_above_is_the_trainers(run):
    """The tests below tear the files that there are."""
    _, folder = run
    written = {path.name: path.stat().st_mtime_ns for path in (folder / "checkpoint-6").iterdir()}
    assert written.keys() >= set(WRITTEN)
    assert max(written, key=written.get) == "trainer_state.json"
    assert checkpoint_folders(folder) == [str(folder / f"checkpoint-{step}") for step in (6, 4, 2)]


def tear(folder, name, how):
    """Leave `folder` as a process does that is killed when it is about to write a file, or has written half of it."""
    for later in WRITTEN[WRITTEN.index(name) + 1 :]:
        (folder / later).unlink()
    file = folder / name
    if how == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_save_cut_off_anywhere_is_passed_over(run, said):
    """Catches the stock choice of the newest folder, with what a kill left in it."""
    _, folder = run
    for name in WRITTEN:
        for how in ("absent", "half"):
            shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-8")
            tear(folder / "checkpoint-8", name, how)
            assert newest_whole_checkpoint(folder) == str(folder / "checkpoint-6"), (name, how)
            assert "checkpoint-8 is passed over: it is not a whole checkpoint: " in said.pop()
            shutil.rmtree(folder / "checkpoint-8")
    assert newest_whole_checkpoint(folder) == str(folder / "checkpoint-6")
    assert said == []


def test_a_file_cut_short_among_whole_ones_is_damage(run):
    """A copy that ran out of disk, or a power cut: everything is there, and one file has no end."""
    _, folder = run
    for name in WRITTEN:
        file = folder / "checkpoint-6" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-8])
        assert find_damage(folder / "checkpoint-6") == f"{name} is damaged: it cannot be read to its end"
        file.write_bytes(whole)
    assert find_damage(folder / "checkpoint-6") is None


def test_a_checkpoint_without_weights_is_damage(run, said):
    """A kill while the rotation deletes a folder: catches one that still has its trainer_state.json."""
    _, folder = run
    (folder / "checkpoint-6" / "model.safetensors").unlink()
    assert newest_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    assert said.pop().endswith("it has no weights (model.safetensors)")


def test_an_altered_k_is_passed_over(run, said):
    """A power cut may leave a file of full length with other content: catches an error where an earlier K is whole."""
    _, folder = run
    file = folder / "checkpoint-6" / "mask_budget.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-60] + bytes(60))
    assert newest_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    assert said.pop().endswith("mask_budget.safetensors is damaged: its content is not what was written")


def test_a_k_of_a_future_version_is_not_passed_over(run):
    """Catches the newest training lost to an old installation, which cannot tell whether it is whole."""
    _, folder = run
    file = folder / "checkpoint-6" / "mask_budget.safetensors"
    file.write_bytes(file.read_bytes().replace(b"mask_budget/2", b"mask_budget/3"))
    assert newest_whole_checkpoint(folder) == str(folder / "checkpoint-6")


def test_training_goes_on_from_the_newest_whole_checkpoint_to_the_undisturbed_result(run, quick_trainer, said):
    """Catches a torn checkpoint in the way of `resume_from_checkpoint=True`, or one that is left torn by the rerun."""
    whole, folder = run
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-8")
    tear(folder / "checkpoint-8", "model.safetensors", "half")
    tear(folder / "checkpoint-6", "mask_budget.safetensors", "half")
    (folder / "checkpoint-6" / "mask_budget.safetensors.tmp").write_bytes(b"half")
    resumed = quick_trainer(**SAVES)
    resumed.train(resume_from_checkpoint=True)
    assert len(said) == 2
    assert torch.equal(whole.mask_budget.k, resumed.mask_budget.k)
    for (parameter, one), two in zip(parameters(whole).items(), parameters(resumed).values(), strict=True):
        assert torch.equal(one, two), parameter
    assert find_damage(folder / "checkpoint-6") is None
    assert not list(folder.glob("checkpoint-6/*.tmp"))


def test_without_a_whole_checkpoint_there_is_one_error(run, quick_trainer):
    """Catches a training that starts afresh in silence, and the library's error from deep inside a torn file."""
    _, folder = run
    for step in (2, 4, 6):
        tear(folder / f"checkpoint-{step}", "optimizer.pt", "half")
    with pytest.raises(ValueError, match=r"no whole checkpoint of this run in .*run .*; leave it away to start afresh"):
        quick_trainer(**SAVES).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-6 is not a whole checkpoint: it has no trainer_state\.json"):
        quick_trainer(**SAVES).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_a_missing_shard_of_the_weights_is_damage(run):
    """Catches a folder that is judged by the names it has and not by those it lacks."""
    _, folder = run
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "checkpoint-6" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_damage(folder / "checkpoint-6") == "it has no model-2.safetensors"


class Killed(BaseException):
    """Ends a training as a signal does: nothing after it runs."""


def test_a_checkpoint_that_is_written_again_does_not_pass_for_whole_meanwhile(run, quick_trainer, monkeypatch):
    """Catches new weights beside the old optimizer state, under the trainer_state.json of the old ones."""
    _, folder = run

    def killed(self, output_dir):
        raise Killed

    resumed = quick_trainer(**SAVES)
    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", killed)
    with pytest.raises(Killed):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert find_damage(folder / "checkpoint-4") is not None
    assert newest_whole_checkpoint(folder) == str(folder / "checkpoint-6")


@pytest.mark.parametrize("limit", [1, 2])
def test_a_torn_checkpoint_does_not_cost_a_whole_one_its_place(limit, run, quick_trainer):
    """save_total_limit: catches a rotation that keeps the torn folder and deletes the whole one."""
    _, folder = run
    tear(folder / "checkpoint-6", "optimizer.pt", "half")
    quick_trainer(**SAVES, save_total_limit=limit).train(resume_from_checkpoint=True)
    assert [find_damage(f) for f in checkpoint_folders(folder)] == [None] * limit
    assert newest_whole_checkpoint(folder) == str(folder / "checkpoint-6")
