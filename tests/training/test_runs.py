"""A folder's checkpoints are of one run: a second run neither goes on from them nor begins among them unasked."""

import json
import shutil

import pytest
import torch
from conftest import TinyImages, build, parameters, tiny_vit
from datasets import Dataset
from torch.utils.data import ConcatDataset, Subset
from transformers import set_seed

from smoot_hf import SmootTrainer
from smoot_hf.training.checkpoint_folder import RUN_IDENTITY_NAME, RunIdentity, newest_whole_checkpoint

SAVES = {"save_strategy": "steps", "save_steps": 2, "step_size": 500}


class Killed(BaseException):
    """Ends a training as a signal does: nothing after it runs."""


@pytest.fixture
def of_seed(quick_args):
    """A trainer whose initial weights are drawn by the seed, as a script's are."""

    def make(seed, kill_at=None, data=None, **overrides):
        set_seed(seed)
        model = tiny_vit()
        args = quick_args(**SAVES | {"seed": seed} | overrides)
        trainer = SmootTrainer(model, args, train_dataset=TinyImages() if data is None else data)
        if kill_at is not None:
            original = trainer.training_step

            def step(*arguments, **more):
                if trainer.state.global_step == kill_at:
                    raise Killed
                return original(*arguments, **more)

            trainer.training_step = step
        return trainer

    return make


@pytest.fixture
def said(monkeypatch):
    """Warnings about folders that are passed over, or taken though nothing says whose they are."""
    warnings = []
    for module in ("checkpoint_folder", "checkpoints"):
        monkeypatch.setattr(f"smoot_hf.training.{module}.logger.warning", warnings.append)
    return warnings


def interrupt(trainer):
    with pytest.raises(Killed):
        trainer.train()


def require_equal(one, other):
    """Weights and K, bit for bit."""
    assert torch.equal(one.mask_budget.k, other.mask_budget.k)
    for (name, value), two in zip(parameters(one).items(), parameters(other).values(), strict=True):
        assert torch.equal(value, two), name


@pytest.mark.parametrize("second", [{"seed": 1}, {"seed": 0, "learning_rate": 3e-3}], ids=["seed", "settings"])
def test_a_second_run_in_a_first_ones_folder_resumes_as_itself(second, of_seed, tmp_path, said):
    """Catches the finished first run's last checkpoint taken for the second run's, whatever they differ in."""
    first = of_seed(0)
    first.train()
    whole = of_seed(**second, output_dir=str(tmp_path / "undisturbed"))
    whole.train()
    interrupt(of_seed(**second, kill_at=3, overwrite_output_dir=True))
    resumed = of_seed(**second)
    resumed.train(resume_from_checkpoint=True)
    require_equal(whole, resumed)
    assert not torch.equal(first.mask_budget.k, resumed.mask_budget.k)
    assert [line.split("checkpoint-")[1][:40] for line in said] == [
        "6 is passed over: it is of another run: ",
        "4 is passed over: it is of another run: ",
    ]
    assert RunIdentity.load(tmp_path / "run").run_id == resumed.run_identity.run_id != first.run_identity.run_id


@pytest.mark.parametrize("kill_at", [0, 1])
def test_a_run_killed_before_its_first_checkpoint_is_not_resumed_as_the_one_before(kill_at, of_seed):
    """Catches a folder that names no run until a checkpoint is saved."""
    of_seed(0).train()
    interrupt(of_seed(0, kill_at=kill_at, overwrite_output_dir=True))
    with pytest.raises(ValueError, match=r"no whole checkpoint of this run in .*another run.*leave it away to start"):
        of_seed(0).train(resume_from_checkpoint=True)


OTHERS = {
    "seed": ({"seed": 1}, "its seed is 0, not 1"),
    "method": ({"seed": 0, "method": "sgt"}, "its method is smoot, not sgt"),
    "data": ({"seed": 0, "data": type("Named", (TinyImages,), {"fingerprint": "b"})()},
             "its dataset_fingerprint is a, not b"),
}  # fmt: skip


@pytest.mark.parametrize(("other", "says"), OTHERS.values(), ids=OTHERS)
def test_a_run_that_was_never_begun_here_does_not_resume_anothers(other, says, of_seed):
    """Catches `resume_from_checkpoint=True` given by habit, in the folder of other data, method or seed."""
    named = type("Named", (TinyImages,), {"fingerprint": "a"})()
    of_seed(0, data=named, max_steps=2).train()
    with pytest.raises(ValueError, match=f"checkpoint-2: it is of another run: {says}"):
        of_seed(**{"data": named} | other).train(resume_from_checkpoint=True)


def test_another_model_does_not_resume_either(of_seed, quick_trainer):
    """Catches an identity without the model."""
    of_seed(0, max_steps=2).train()
    with pytest.raises(ValueError, match=r"its model is ViTForImageClassification-.*, not ResNetFor"):
        quick_trainer("resnet", **SAVES, seed=0).train(resume_from_checkpoint=True)


def test_beginning_afresh_among_anothers_checkpoints_is_refused(of_seed, tmp_path):
    """Catches two runs in one folder without a word; the flag or another folder is the way."""
    of_seed(0, max_steps=2).train()
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    identity = (tmp_path / "run" / RUN_IDENTITY_NAME).read_bytes()
    with pytest.raises(ValueError, match=r"holds checkpoint-2 of another run .*seed 0.*overwrite_output_dir=True"):
        of_seed(1).train()
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    assert (tmp_path / "run" / RUN_IDENTITY_NAME).read_bytes() == identity
    of_seed(1, output_dir=str(tmp_path / "other"), max_steps=2).train()
    of_seed(1, overwrite_output_dir=True, max_steps=2).train()
    assert RunIdentity.load(tmp_path / "run" / "checkpoint-2").seed == 1


def test_a_torn_checkpoint_does_not_keep_a_run_from_beginning_again(of_seed, tmp_path):
    """A kill in the first save: catches a folder that can neither be resumed from nor begun in."""
    of_seed(0, max_steps=2).train()
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    of_seed(0, max_steps=2).train()


def test_one_trainer_may_train_again(of_seed):
    """A notebook's second `train()`: catches its own first training taken for another's, and the older resumed."""
    trainer = of_seed(0, max_steps=4)
    trainer.train()
    first = trainer.run_identity.run_id
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.run_identity.run_id != first
    chosen = newest_whole_checkpoint(trainer.args.output_dir)
    assert chosen.endswith("checkpoint-2")
    assert RunIdentity.load(chosen).run_id == trainer.run_identity.run_id


def test_a_checkpoint_that_is_named_must_be_of_this_seed_and_data(of_seed, tmp_path, said):
    """Catches a script that looks for the last checkpoint itself; another method is taken, and said."""
    of_seed(0, max_steps=2).train()
    path = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"is of another run: its seed is 0, not 1\. Resume with the seed"):
        of_seed(1).train(resume_from_checkpoint=path)
    standard = of_seed(0, method="standard", max_steps=4, output_dir=str(tmp_path / "standard"))
    standard.train(resume_from_checkpoint=path)
    assert [line.partition(" was ")[2] for line in said] == ["trained with method='smoot': the rest is 'standard'"]
    assert standard.run_identity.method == "standard"


def test_a_checkpoint_without_an_identity_is_taken_with_a_warning(of_seed, tmp_path, said):
    """One of version 0.1.0 or of a plain Trainer: catches it refused, taken in silence, or lost to a kill."""
    of_seed(0, max_steps=4).train()
    run = tmp_path / "run"
    for path in run.rglob(RUN_IDENTITY_NAME):
        path.unlink()
    interrupted = of_seed(0, kill_at=5)
    with pytest.raises(Killed):
        interrupted.train(resume_from_checkpoint=True)
    # No checkpoint of its own yet: the old one is still the one to take.
    resumed = of_seed(0)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert len(said) == 2
    assert all("checkpoint-4 is taken, though nothing in it says which run it is of" in line for line in said)
    # From now on the folder is the new run's.
    assert newest_whole_checkpoint(run).endswith("checkpoint-6")
    shutil.rmtree(run / "checkpoint-6")
    assert newest_whole_checkpoint(run) is None
    assert "does not say which run it is of, and the folder is that of run " in said[-1]
    with pytest.raises(ValueError, match="checkpoint-4 of another run: give this one an output_dir of its own"):
        of_seed(1).train()


def test_checkpoints_copied_together_are_not_guessed_at(of_seed, tmp_path):
    """Catches the highest step of two runs whose folder says nothing."""
    of_seed(0, max_steps=4).train()
    of_seed(1, max_steps=2, output_dir=str(tmp_path / "other")).train()
    (tmp_path / "run" / RUN_IDENTITY_NAME).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    shutil.copytree(tmp_path / "other" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"holds checkpoints of 2 runs \(checkpoint-4, checkpoint-2\) and no run_id"):
        newest_whole_checkpoint(tmp_path / "run")
    assert newest_whole_checkpoint(tmp_path / "run", asked=RunIdentity(seed=1)).endswith("checkpoint-2")


def test_nothing_of_an_earlier_run_stays_in_a_checkpoint_of_the_same_step(of_seed, tmp_path):
    """Catches the optimizer and K of the first run beside the weights of the second, which saves its model alone."""
    of_seed(0, max_steps=2).train()
    of_seed(1, max_steps=2, overwrite_output_dir=True, save_only_model=True).train()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", RUN_IDENTITY_NAME, "trainer_state.json"} <= names
    assert names.isdisjoint({"optimizer.pt", "mask_budget.safetensors", "rng_state.pth"})
    assert RunIdentity.load(tmp_path / "run" / "checkpoint-2").seed == 1


def test_each_batch_size_that_is_tried_is_a_run_of_its_own(of_seed, tmp_path):
    """auto_find_batch_size: catches a restart refused for its own checkpoints, or resumed from those of the try."""
    trainer = of_seed(0, auto_find_batch_size=True, max_steps=4)
    original, sizes = trainer.training_step, []

    def step(model, inputs, *arguments, **more):
        sizes.append(len(inputs["labels"]))
        if sizes[-1] == 8 and trainer.state.global_step == 3:
            raise RuntimeError("CUDA out of memory.")
        return original(model, inputs, *arguments, **more)

    trainer.training_step = step
    trainer.train()
    assert sizes[0] == 8 > sizes[-1]
    saved = {path.parent.name: RunIdentity.load(path.parent).run_id for path in tmp_path.rglob("model.safetensors")}
    assert set(saved.values()) == {trainer.run_identity.run_id}
    assert len(trainer._own_runs) == 2


def test_each_trial_of_a_search_has_a_folder_and_an_id_of_its_own(quick_args, tmp_path):
    """Catches a search that is refused at its second trial, or whose trials share an identity."""
    pytest.importorskip("optuna")
    trainer = SmootTrainer(model_init=lambda: build("vit"), args=quick_args(**SAVES | {"max_steps": 2}),
                           train_dataset=TinyImages(), eval_dataset=TinyImages(8))  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        compute_objective=lambda metrics: metrics["eval_loss"], n_trials=2, backend="optuna",
    )  # fmt: skip
    folders = [tmp_path / "run" / f"run-{number}" for number in range(2)]
    ids = [RunIdentity.load(folder).run_id for folder in folders]
    assert len(set(ids)) == 2
    assert ids == [RunIdentity.load(folder / "checkpoint-2").run_id for folder in folders]


def hf_data(first):
    """Rows of an HF data set, from those of the tiny images, in an order of one's own."""
    rows = [TinyImages()[i] for i in first]
    columns = {
        "pixel_values": [row["pixel_values"].tolist() for row in rows],
        "labels": [row["labels"] for row in rows],
    }
    return Dataset.from_dict(columns).with_format("torch")


WRONG_ROWS = {
    "parts in another order": lambda: ConcatDataset([hf_data(range(12, 24)), hf_data(range(12))]),
    "a row that changed": lambda: ConcatDataset([hf_data(range(12)), hf_data([*range(12, 23), 3])]),
    "two rows exchanged": lambda: ConcatDataset([hf_data(range(12)), hf_data([*range(12, 22), 23, 22])]),
}


@pytest.mark.parametrize("other", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_k_does_not_go_to_other_rows(other, of_seed, tmp_path, monkeypatch):
    """Catches K by row number alone in a data set put together of parts, and rows that no sample of 64 looks at."""
    said = []
    monkeypatch.setattr("smoot_hf.training.trainer.logger.warning", said.append)
    data = ConcatDataset([hf_data(range(12)), hf_data(range(12, 24))])
    of_seed(0, data=data, max_steps=2).train()
    path = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match="is of another run: its dataset_fingerprint is v2-"):
        of_seed(0, data=other()).train(resume_from_checkpoint=path)
    (tmp_path / "run" / "checkpoint-2" / RUN_IDENTITY_NAME).unlink()
    with pytest.raises(ValueError, match=r"belongs to another training set .*: dataset_fingerprint is v2-"):
        of_seed(0, data=other()).train(resume_from_checkpoint=path)
    of_seed(0, data=ConcatDataset([hf_data(range(12)), hf_data(range(12, 24))])).train(resume_from_checkpoint=path)
    assert said == []


@pytest.mark.parametrize("donor", ["later checkpoint", "other run", "other seed"])
def test_a_k_file_from_elsewhere_is_refused(donor, of_seed, tmp_path):
    """Catches the K of a later step, of another run or of another seed, of one length and one set of bounds."""
    of_seed(0, max_steps=4).train()
    own, other = tmp_path / "run", tmp_path / "other"
    of_seed(int(donor == "other seed"), max_steps=4, output_dir=str(other)).train()
    source = (own if donor == "later checkpoint" else other) / f"checkpoint-{4 if donor == 'later checkpoint' else 2}"
    shutil.copy(source / "mask_budget.safetensors", own / "checkpoint-2")
    trainer = of_seed(0)
    before = trainer.mask_budget.k
    with pytest.raises(ValueError, match=r"is of another training, or of another time in it: (run_id|global_step) is"):
        trainer.train(resume_from_checkpoint=str(own / "checkpoint-2"))
    assert torch.equal(trainer.mask_budget.k, before)


@pytest.mark.parametrize("data", [None, Subset(TinyImages(), range(24))], ids=["nothing known", "indices known"])
def test_where_nothing_identifies_the_data_a_resumed_run_says_so(data, of_seed, monkeypatch):
    """Catches silence about a check that was not made."""
    said = []
    monkeypatch.setattr("smoot_hf.training.trainer.logger.warning", said.append)
    of_seed(0, data=data, max_steps=2).train()
    assert said == []
    of_seed(0, data=data).train(resume_from_checkpoint=True)
    assert len(said) == 1
    assert "nothing identifies the training set" in said[0]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"run_id": null}', '{"run_id": "a", "seed": "0"}', '{"run_id": "a", "more": 1}',
     '{"run_id": 1}', "[" * 100_000, "\ud800"],
)  # fmt: skip
def test_a_damaged_identity_is_damage(content, of_seed, tmp_path):
    """Catches a crash from deep inside json, and a checkpoint whose run is unknown taken for one without identity."""
    of_seed(0, max_steps=4).train()
    path = tmp_path / "run" / "checkpoint-4" / RUN_IDENTITY_NAME
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert newest_whole_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    shutil.copy(path, tmp_path / "run")
    with pytest.raises(ValueError, match=r"run_identity\.json is damaged: it does not name a run"):
        newest_whole_checkpoint(tmp_path / "run")


def test_the_identity_is_in_every_checkpoint_and_survives_resuming(of_seed, tmp_path):
    """Catches an id that each process start draws anew."""
    first = of_seed(0, max_steps=4)
    first.train()
    again = of_seed(0)
    again.train(resume_from_checkpoint=True)
    contents = {(folder / RUN_IDENTITY_NAME).read_text() for folder in (tmp_path / "run").glob("checkpoint-*")}
    assert len(contents) == 1
    assert json.loads(contents.pop()) == vars(again.run_identity) == vars(first.run_identity)
