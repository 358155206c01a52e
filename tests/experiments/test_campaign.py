"""A campaign: its loop is the Trainer's, its queue survives, its table is the arithmetic that it says."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyImages, build, largest_difference, parameters
from safetensors.torch import load_file

from smoot_hf import SmootTrainer
from smoot_hf.experiments import (
    campaign,
    campaign_images,
    campaign_queue,
    campaign_run,
    campaign_scores,
    campaign_summary,
)

FORKS = Path(__file__).parents[2] / "recipes" / "campaigns" / "forks.toml"
# Digits in blocks: two steps of training, judged on few images.
TINY = {"planted": "block", "source": "digits", "train_samples": 128, "test_samples": 60, "gap_samples": 0}
FAST = {"num_train_epochs": 1, "per_device_train_batch_size": 64, "learning_rate": 1e-3}


# --- the loop --------------------------------------------------------------------------------------------------------


def cnn():
    """Without dropout: the Trainer's loader draws from the generator that dropout draws from."""
    return build("cnn", feature_dropout=0.0, classifier_dropout=0.0)


LOOPS = {
    "standard": {"method": "standard"},
    "smoot": {"step_size": 300.0, "signed_saliency": False},
    "sgt": {"method": "sgt"},
    "random positions": {"mask_positions": "random", "step_size": 300.0},
    "alternating positions": {"mask_positions": "alternating", "step_size": 300.0},
    "loss pass": {"kl_gradient": "masked", "saliency_score": "log_prob", "step_size": 300.0, "kl_weight": 0.5},
    "share": {"masked_share": 0.4, "masked_every": 2, "step_size": 300.0},
    "eval pass": {"saliency_pass": "eval", "step_size": 500.0, "step_unit": "percent", "rounding": "trunc"},
}


@pytest.mark.parametrize("model", [cnn, lambda: build("vit")], ids=["cnn", "vit"])
@pytest.mark.parametrize("setting", LOOPS)
def test_the_loop_is_the_trainer(setting, model, tmp_path):
    """Catches a campaign that trains something else than the library does: weights and K are equal to the last bit."""
    data, settings = (
        TinyImages(40),
        {**FAST, "num_train_epochs": 3, "per_device_train_batch_size": 16, "weight_decay": 0.1},
    )
    plan = campaign_run.Plan("x", 5, train={**settings, **LOOPS[setting]})
    args = plan.arguments(str(tmp_path))

    class InOrder(SmootTrainer):
        def _get_train_sampler(self, train_dataset=None):
            trainer = self

            class Sampler(torch.utils.data.Sampler):
                def __len__(self):
                    return 40

                def __iter__(self):
                    return iter(campaign_run.epoch_order(40, trainer.epoch_number(), 5).tolist())

            return Sampler()

    theirs = model()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    args.lr_scheduler_type, args.max_grad_norm, args.save_strategy, args.disable_tqdm = "constant", 0.0, "no", True
    args.dataloader_pin_memory = False
    trainer = InOrder(theirs, args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()

    ours = model()
    budget = campaign_run.train(ours, data.images, torch.tensor(data.labels), args, campaign_run.Controls())
    assert largest_difference(dict(ours.named_parameters()), parameters(trainer)) == 0
    if trainer.mask_budget is None:
        assert budget is None
    else:
        assert torch.equal(budget.k, trainer.mask_budget.k)
        assert budget.k.unique().numel() > 1 or setting == "sgt"


def trained(epochs, model=cnn, **settings):
    data, network = TinyImages(40), model()
    plan = campaign_run.Plan("x", 1, train={**FAST, "num_train_epochs": epochs, **settings})
    budget = campaign_run.train(network, data.images, torch.tensor(data.labels), plan.arguments(), plan.controls())
    return network, budget


def test_a_random_walk_takes_the_same_steps_with_other_signs():
    """Catches a control whose steps are of another size; in the first epoch every K is still the same."""
    own, walk = (trained(1, step_size=500.0, k_control=kind)[1].k - 32 for kind in ("own", "random_walk"))
    assert own.abs().max() > 0
    # floor takes a negative step one pixel further than the positive one.
    assert ((own.abs() - walk.abs()).abs() <= 1).all()
    assert 0.2 < (own.sign() == walk.sign()).float().mean() < 0.8


def test_a_shuffled_k_is_that_of_another_image(monkeypatch):
    """Catches a control in which every image keeps its own K, or in which K does not move."""
    own, shuffled = (trained(1, step_size=500.0, k_control=kind)[1].k for kind in ("own", "shuffled"))
    assert torch.equal(own, shuffled)
    seen = []
    step = campaign_run.masked_step
    monkeypatch.setattr(
        campaign_run,
        "masked_step",
        lambda m, x, y, rows, k, *more, **named: seen.append((rows, k)) or step(m, x, y, rows, k, *more, **named),
    )
    trained(2, step_size=500.0, k_control="shuffled")
    rows, k = (torch.cat(column[-1:]) for column in zip(*seen, strict=True))
    assert not torch.equal(k, own[rows])
    assert torch.equal(k.sort().values, own.sort().values)


def test_a_mask_outside_the_evidence_leaves_the_evidence_alone(monkeypatch):
    """Catches a mask on the evidence, one that is the same in every epoch, and gradients that are no longer exact."""
    data, model, seen = TinyImages(40), cnn(), []
    evidence = torch.zeros(40, 8, 8, dtype=torch.bool)
    evidence[:20, :4], evidence[20:, 4:] = True, True
    step = campaign_run.masked_step

    def watched(*args, **named):
        result = step(*args, **named)
        seen.append((args[3], result.is_masked[:, 0]))
        return result

    monkeypatch.setattr(campaign_run, "masked_step", watched)
    train = {**FAST, "num_train_epochs": 2, "method": "sgt", "signed_saliency": False, "masked_outside_evidence": True}
    plan = campaign_run.Plan("x", 1, train={**train, "mask_ratio": 0.25})
    images, labels = data.images, torch.tensor(data.labels)
    campaign_run.train(model, images, labels, plan.arguments(), plan.controls(), evidence=evidence)
    (rows, first), (again, second) = seen
    for order, is_masked in seen:
        assert not (is_masked & evidence[order]).any()
        assert (is_masked.sum((1, 2)) == 16).all()
    assert not torch.equal(first[rows.argsort()], second[again.argsort()])


def test_the_positive_controls_are_what_they_say():
    """Catches a penalty that is not differentiated, and an attack that goes the wrong way."""
    data, model = TinyImages(12), cnn().double()
    images, labels = data.images.double(), torch.tensor(data.labels[:12])
    args = campaign_run.Plan("x", 0, train={"method": "standard"}).arguments()

    def loss(x):
        return torch.nn.functional.cross_entropy(model(pixel_values=x).logits, labels, reduction="none")

    jacobian = torch.autograd.functional.jacobian(loss, images)[range(12), range(12)]
    penalised = campaign_run._standard_loss(model, images, labels, args, campaign_run.Controls(gradient_penalty=0.3))
    assert penalised.item() == pytest.approx((loss(images) + 0.3 * jacobian.square().sum((1, 2, 3))).mean().item())
    # Its gradient by a difference quotient, along one weight.
    weight = model.classifier.weight
    (slope,) = torch.autograd.grad(penalised, weight)
    with torch.no_grad():
        ends = []
        for step in (1e-5, -1e-5):
            weight[1, 3] += step
            with torch.enable_grad():
                ends.append(
                    campaign_run._standard_loss(
                        model, images, labels, args, campaign_run.Controls(gradient_penalty=0.3)
                    ).item()
                )
            weight[1, 3] -= step
    assert slope[1, 3].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    attacked = campaign_run._standard_loss(model, images, labels, args, campaign_run.Controls(adversarial_epsilon=0.1))
    assert attacked.item() == pytest.approx(loss(images + 0.1 * jacobian.sign()).mean().item())
    assert attacked > loss(images).mean()


# --- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_plan():
    """Catches numbers that hang on what the process did before; another seed draws other images and weights."""
    plan = campaign_run.Plan("x", 3, data=TINY, train=FAST)
    torch.manual_seed(99)
    one = campaign_run.run(plan)
    other = campaign_run.run(campaign_run.Plan("x", 4, data=TINY, train=FAST))
    again = campaign_run.run(plan)
    for result in (one, again, other):
        result.pop("seconds")
    assert one == again
    assert one != other
    splits = [campaign_images.make_splits(campaign_images.Data(**TINY), seed) for seed in (3, 4)]
    assert not torch.equal(splits[0].train.pixel_values, splits[1].train.pixel_values)
    assert torch.equal(splits[0].test.pixel_values, splits[1].test.pixel_values)


def test_measuring_every_epoch_changes_nothing(tmp_path):
    """Catches a measurement that draws random numbers, or leaves dropout off; and weights that are not the trained."""
    plan = campaign_run.Plan("x", 3, data=TINY, train={**FAST, "num_train_epochs": 2})
    plain = campaign_run.run(plan, tmp_path / "plain.safetensors")
    measured = campaign_run.run(replace(plan, data={**TINY, "history_samples": 60}), tmp_path / "measured.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "measured.safetensors").read_bytes()
    last = measured["history"][-1]
    assert len(measured["history"]) == 2
    assert last["accuracy"] == measured["accuracy"] == plain["accuracy"]
    assert last["outside_0.1"] == plain["localisation"]["scores"]["outside_0.1"]["value"]
    network = campaign_run.make_network(plan.network, campaign_images.make_splits(plan.images(), 3))
    network.load_state_dict(load_file(tmp_path / "plain.safetensors"))


def test_the_float32_score_loses_the_label_where_its_probability_is_one():
    """Catches a map of the hypothesis about the paper's table that is in truth the exact one."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def model(images):
        return images.flatten(1) @ weight.T

    images = torch.tensor([[40.0, 0.0], [1.0, 0.0]]).reshape(2, 1, 1, 2)
    found = campaign_scores._float32_log_prob_map(model, images, torch.tensor([0, 0])).flatten(1)
    assert found[0, 0] == 0
    assert found[0, 1] > 0
    assert found[1, 0].item() == pytest.approx(1 - 1 / (1 + torch.e**-1), rel=1e-5)


def test_every_setting_of_the_forks_runs():
    """Catches a campaign that ends on its fourth evening with a setting that nobody tried; and their order."""
    plans = [plan for plan in campaign_queue.read_campaign(FORKS) if plan.seed == 0]
    assert [plan.name for plan in plans[:5]] == ["standard", "smoot", "sgt", "sgt random mask", "sgt signed"]
    seen = {}
    for plan in plans:
        settings = {**plan.train, "num_train_epochs": 2, "per_device_train_batch_size": 64, "step_size": 300.0}
        result = campaign_run.run(campaign_run.Plan(plan.name, 0, data=TINY, train=settings))
        seen[plan.name] = json.dumps([result["accuracy"], result["localisation"], result["k"]])
    # Settings that only differ in what was made equal here, and in the length of the training.
    same = {"smoot mu 30", "smoot mu 100", *(name for name in seen if " epochs" in name)}
    distinct = {name: value for name, value in seen.items() if name not in same}
    assert len(set(distinct.values())) == len(distinct), seen


@pytest.mark.parametrize("planted", ["plain", "pair", "on-photo", "decoy"])
def test_other_sets_and_networks_run(planted):
    """Catches a set that the campaign names and cannot make."""
    network = "small" if planted == "on-photo" else "paper"
    data = {**TINY, "planted": planted, "partners": "digits", "gap_samples": 20, "roar_kept": 0.3}
    data |= {"tables": True, "history_samples": 30}
    result = campaign_run.run(campaign_run.Plan("x", 0, data=data, train=FAST, network=network))
    assert ("localisation" in result) == (planted != "plain")
    assert result["deletion"]["n"] == 20
    roar = result["diff_roar"]
    assert roar["difference"] == roar["top"] - roar["bottom"]
    assert 0 <= result["accuracy"] <= 100
    assert set(result["tables"]) >= {"paper corner", "default mean", "paper corner float32", "saturated"}
    (epoch,) = result["history"]
    assert ("outside_0.1" in epoch) == (planted != "plain" and epoch["accuracy"] > 0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"warmup_steps": 5}, "a campaign does not read 'warmup_steps'"),
        ({"mask_position": "random"}, "a campaign does not read 'mask_position'"),
        ({"mask_positions": "salient"}, "mask_positions must be one of"),
        ({"k_control": "shuffled", "method": "sgt"}, "needs method='smoot'"),
        ({"k_control": "sorted"}, "k_control must be"),
        ({"gradient_penalty": 1.0}, "go with method='standard'"),
        ({"masked_outside_evidence": True}, "masked_outside_evidence needs method='sgt'"),
        ({"masked_outside_evidence": True, "masked_share": 0.5}, "masked_outside_evidence needs masked_share=1"),
    ],
)
def test_what_a_run_does_not_know_is_refused(train, message):
    """Catches a misspelt setting that trains the centre under another name."""
    plan = campaign_run.Plan("x", 0, train=train)
    with pytest.raises(ValueError, match=message):
        plan.arguments() and plan.controls()


# --- the queue -------------------------------------------------------------------------------------------------------

FILE = """
seeds = {seeds}
[data]
planted = "block"
source = "digits"
train_samples = 128
test_samples = 60
gap_samples = 0
[train]
num_train_epochs = {epochs}
per_device_train_batch_size = 64
[[settings]]
name = "standard"
method = "standard"
[[settings]]
name = "sgt, random"
method = "sgt"
mask_positions = "random"
"""


def write_file(folder, seeds=2, epochs=1):
    path = folder / "tiny.toml"
    path.write_text(FILE.format(seeds=seeds, epochs=epochs))
    return path


@pytest.mark.slow
def test_a_killed_campaign_goes_on(tmp_path):
    """Catches workers that outlive the campaign, and a finished run that is trained again."""
    path, output = write_file(tmp_path, epochs=4), tmp_path / "out"
    command = [sys.executable, "-m", "smoot_hf.experiments.campaign", str(path)]
    command += ["--output", str(output), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    first = output / "standard-seed0" / "results.json"
    until(lambda: first.is_file())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not alive(process.pid))
    written = sorted(output.rglob("results.json"))
    assert first in written
    assert len(written) < 4
    before = {path: path.read_bytes() for path in written}

    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert len(list(output.rglob("results.json"))) == 4
    assert {path: path.read_bytes() for path in written} == before
    (plan,) = campaign_queue.select(campaign_queue.read_campaign(path), [1], ["sgt, random"])
    fresh = json.loads(json.dumps(campaign_run.run(plan)))
    saved = json.loads(campaign_queue.result_path(plan, output).read_text())
    assert saved["localisation"] == fresh["localisation"]
    assert saved["k"] == fresh["k"] == {"k_min": 64, "k_median": 64, "k_max": 64}


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def test_the_order_is_seed_by_seed_and_the_command_line_chooses(tmp_path):
    """Catches a campaign that is unpaired until its last day."""
    plans = campaign_queue.read_campaign(write_file(tmp_path))
    names = [(plan.seed, plan.name) for plan in plans]
    assert names == [(0, "standard"), (0, "sgt, random"), (1, "standard"), (1, "sgt, random")]
    assert [plan.seed for plan in campaign_queue.select(plans, [1], ["standard"])] == [1]
    with pytest.raises(ValueError, match="no setting 'smoot', only sgt, random, standard"):
        campaign_queue.select(plans, None, ["smoot"])
    assert campaign_queue.folder_name(plans[1]) == "sgt-random-seed0"


def test_a_file_extends_another(tmp_path):
    """Catches entries that are lost, and a table that replaces the other's as a whole."""
    base = campaign_queue.read_campaign(write_file(tmp_path))
    own = tmp_path / "own.toml"
    own.write_text('extends = "tiny.toml"\nseeds = 1\n[data]\ntest_samples = 7\n')
    plans = campaign_queue.read_campaign(own)
    assert [plan.name for plan in plans] == ["standard", "sgt, random"]
    assert plans[0].data == {**base[0].data, "test_samples": 7}
    assert plans[1].train == base[1].train
    own.write_text('extends = "tiny.toml"\nleave_out = ["standard"]')
    assert [plan.name for plan in campaign_queue.read_campaign(own)] == ["sgt, random"] * 2
    own.write_text('extends = "tiny.toml"\nleave_out = ["smoot"]')
    with pytest.raises(ValueError, match="leave_out names 'smoot', which is no setting"):
        campaign_queue.read_campaign(own)
    own.write_text('extends = "missing.toml"')
    with pytest.raises(OSError, match=r"missing\.toml"):
        campaign_queue.read_campaign(own)


def test_results_of_other_settings_are_refused(tmp_path, capsys):
    """Catches a table that mixes two campaigns, and a torn file that passes for a result."""
    path = write_file(tmp_path, seeds=1)
    plans = campaign_queue.read_campaign(path)
    place = campaign_queue.result_path(plans[0], tmp_path / "out")
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"settings": campaign_queue.settings_of(plans[0]), "accuracy": 90.0}))
    assert campaign_queue.finished_result(plans[0], tmp_path / "out")["accuracy"] == 90
    assert campaign_queue.finished_result(plans[1], tmp_path / "out") is None
    with pytest.raises(SystemExit):
        campaign.main([str(write_file(tmp_path, epochs=2)), "--output", str(tmp_path / "out"), "--summary"])
    assert "was made with train" in capsys.readouterr().err
    place.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        campaign_queue.finished_result(plans[0], tmp_path / "out")


def test_exported_runs_sum_up_to_the_same_table(tmp_path, capsys):
    """Catches a run that is lost on the way, rounding that is seen, and an export of other settings."""
    path, output = write_file(tmp_path, seeds=1), tmp_path / "out"
    for number, plan in enumerate(campaign_queue.read_campaign(path)):
        place = campaign_queue.result_path(plan, output)
        place.parent.mkdir(parents=True)
        found = result(plan.name, 0, 20.0 + number / 3, 94.0) | {"settings": campaign_queue.settings_of(plan)}
        place.write_text(json.dumps(found))
    file = tmp_path / "runs.jsonl"
    campaign.main([str(path), "--output", str(output), "--export", str(file), "--summary"])
    written, table = capsys.readouterr().out.split("\n", 1)
    assert written == f"2 of 2 runs written to {file}"
    assert '"value":20.3333}' in file.read_text()
    campaign.main([str(path), "--results", str(file), "--summary"])
    assert capsys.readouterr().out == table
    with pytest.raises(SystemExit):
        campaign.main([str(write_file(tmp_path, seeds=1, epochs=2)), "--results", str(file), "--summary"])
    assert "was made with train" in capsys.readouterr().err
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(ValueError, match="line 3 is no result of a run"):
        campaign_queue.read_export(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = ", "is no TOML"),
        ("seeds = 1", "must hold seeds"),
        ("seeds = 1\nfolds = 2\n[[settings]]\nname = 'a'", "folds"),
        ("seeds = 1\n[[settings]]\nname = 'a'\n[[settings]]\nname = 'a'", "a name of its own, got a"),
        ("seeds = 1\n[[settings]]\nname = 'a b'\n[[settings]]\nname = 'a-b'", "one folder name"),
    ],
)
def test_a_bad_file_is_one_clear_error(text, message, tmp_path):
    """Catches a campaign that begins and then stumbles over its own file."""
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        campaign_queue.read_campaign(tmp_path / "bad.toml")


def test_a_failing_run_is_told_and_the_others_go_on(monkeypatch, tmp_path):
    """Catches one bad setting that ends a night's work, and an error that is swallowed."""
    bad = campaign_run.Plan("bad", 0, data={**TINY, "train_samples": 10**6}, train=FAST)
    error = campaign_queue.run_and_save(bad, tmp_path)
    assert "train_samples is 1000000, but there are 1437 images" in error
    assert not list(tmp_path.rglob("results.json"))
    assert campaign_queue.run_and_save(campaign_run.Plan("good", 0, data=TINY, train=FAST), tmp_path) is None
    assert json.loads((tmp_path / "good-seed0" / "results.json").read_text())["settings"]["name"] == "good"


# --- the table -------------------------------------------------------------------------------------------------------


def result(name, seed, outside, accuracy, k=None):
    return {
        "settings": {"name": name, "seed": seed},
        "accuracy": accuracy,
        "localisation": {"scores": {"outside_0.1": {"value": outside}}},
        "k": k,
        "seconds": {"train": 20.0, "judge": 10.0, "train_cpu": 2.0, "judge_cpu": 1.0},
    }


def test_the_table_is_paired_by_seed():
    """Catches differences of means over different seeds, and a normal interval in place of Student's."""
    found = campaign_summary.paired({0: 3.0, 1: 5.0, 2: 100.0}, {0: 1.0, 1: 1.0, 3: 0.0})
    assert (found.mean, found.n) == (3.0, 2)
    assert found.std == pytest.approx(2**0.5)
    assert found.interval == pytest.approx((3 - 12.7062047, 3 + 12.7062047))
    assert campaign_summary.paired({0: 3.0}, {1: 1.0}) is None
    table = campaign_summary.summary(
        [
            result("standard", 0, 20.0, 94.0),
            result("standard", 1, 30.0, 95.0),
            result("sgt", 0, 18.0, 94.5, {"k_min": 4, "k_median": 5.0, "k_max": 6}),
            result("sgt", 1, 27.0, 94.5, {"k_min": 3, "k_median": 7.0, "k_max": 9}),
        ],
        "outside_0.1",
        "standard",
    )
    lines = table.splitlines()
    assert lines[2] == "| standard | 25.00 ± 7.07 | 94.50 ± 0.71 | – | 3 |"
    assert lines[3].startswith(
        "| sgt | 22.50 ± 6.36; -2.50 ± 0.71 (n = 2), -8.85 to +3.85 | 94.50 ± 0.00; +0.00 ± 0.71"
    )
    assert lines[3].endswith("| 3 / 6 / 9 | 3 |")
    assert "compared with standard: 1;" in table
    with pytest.raises(ValueError, match="no finished run of the setting 'plain'"):
        campaign_summary.summary([result("standard", 0, 20.0, 94.0)], "outside_0.1", "plain")
