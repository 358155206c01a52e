"""The arguments of SMOOT: parsed, explained, validated."""

from dataclasses import FrozenInstanceError, dataclass, fields, make_dataclass

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from smoot_hf import SmootSettings, SmootTrainingArguments
from smoot_hf.training.arguments import _DECIDE_THE_BEST, _DECIDE_WEIGHTS, GREATER_IS_BETTER, greater_is_better

ADDED = [f for f in fields(SmootTrainingArguments) if f.name not in {g.name for g in fields(TrainingArguments)}]


def test_every_added_field_is_a_flag_with_help(tmp_path):
    """Catches a field that the command line cannot set, and one that --help does not explain."""
    parser = HfArgumentParser(SmootTrainingArguments)
    flags = {
        "method": "sgt", "mask_ratio": "0.4", "mask_ratio_min": "0.1", "mask_ratio_max": "0.9", "step_size": "3.5",
        "step_unit": "percent", "rounding": "trunc", "alpha": "0.95", "top_n": "3", "delta_mode": "label",
        "kl_weight": "0.5", "saliency_score": "log_prob", "signed_saliency": "True", "saliency_target": "predicted",
        "saliency_pass": "eval", "shared_dropout": "False", "kl_gradient": "masked", "mask_fill": "mean",
        "fill_step": "0.5", "mask_positions": "random", "mask_cell": "4", "masked_share": "0.25",
        "masked_every": "2", "deletion_auc_samples": "64",
        "overwrite_output_dir": "True", "keep_freed_memory": "True", "num_train_samples": "7",
        "mask_budget_sharded": "True",
    }  # fmt: skip
    assert sorted(flags) == sorted(f.name for f in ADDED)
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    (args,) = parser.parse_args_into_dataclasses([*words, "--output_dir", str(tmp_path)])
    for f in ADDED:
        assert str(getattr(args, f.name)) == flags[f.name]
        assert f.metadata["help"]


def test_defaults_are_those_of_the_design(tmp_path):
    """Catches a default that drifts: published numbers hang on them."""
    args = SmootTrainingArguments(output_dir=str(tmp_path))
    assert {f.name: getattr(args, f.name) for f in ADDED} == {
        "method": "smoot", "mask_ratio": 0.5, "mask_ratio_min": 0.2, "mask_ratio_max": 0.8, "step_size": 10.0,
        "mask_cell": 1, "step_unit": "auto", "rounding": "floor", "alpha": 0.8, "top_n": 5, "delta_mode": "rank",
        "kl_weight": 1.0,
        "saliency_score": "logit", "signed_saliency": False, "saliency_target": "label", "saliency_pass": "shared",
        "shared_dropout": True, "kl_gradient": "both", "mask_fill": "uniform", "fill_step": 0.2,
        "masked_share": 1.0, "masked_every": 1,
        "mask_positions": "least_salient", "deletion_auc_samples": 0, "overwrite_output_dir": False,
        "keep_freed_memory": False, "num_train_samples": None, "mask_budget_sharded": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "smooth", r"method must be one of 'standard', 'sgt', 'smoot', got 'smooth'"),
        ("mask_ratio", 1.5, r"mask_ratio must be in \[0, 1\], got 1.5"),
        ("mask_ratio_min", -0.1, r"mask_ratio_min must be in \[0, 1\], got -0.1"),
        ("mask_ratio_max", float("nan"), r"mask_ratio_max must be in \[0, 1\], got nan"),
        ("mask_ratio_min", 0.9, "mask_ratio_min=0.9, mask_ratio=0.5, mask_ratio_max=0.8"),
        ("mask_ratio", 0.1, "mask_ratio_min=0.2, mask_ratio=0.1, mask_ratio_max=0.8"),
        ("alpha", 1.01, r"alpha must be in \[0, 1\], got 1.01"),
        ("top_n", 0, "top_n must be finite and at least 1, got 0"),
        ("mask_cell", 0, "mask_cell must be finite and at least 1, got 0"),
        ("mask_cell", 1.5, "mask_cell must be a whole number, got 1.5"),
        ("masked_share", 0.0, r"masked_share must be in \(0, 1\], got 0.0"),
        ("masked_share", 1.5, r"masked_share must be in \(0, 1\], got 1.5"),
        ("masked_share", float("nan"), r"masked_share must be in \(0, 1\], got nan"),
        ("masked_every", 0, "masked_every must be finite and at least 1, got 0"),
        ("masked_every", 1.5, "masked_every must be a whole number, got 1.5"),
        ("top_n", 2.5, r"top_n must be a whole number, got 2.5"),
        ("deletion_auc_samples", -1, "deletion_auc_samples must be finite and at least 0, got -1"),
        ("step_size", -1.0, "step_size must be finite and at least 0, got -1.0"),
        ("kl_weight", float("inf"), "kl_weight must be finite and at least 0, got inf"),
        ("step_unit", "pixel", "step_unit must be one of 'auto', 'pixels', 'percent', got 'pixel'"),
        ("rounding", "ceil", "rounding must be one of"),
        ("delta_mode", "top", "delta_mode must be one of"),
        ("saliency_score", "prob", "saliency_score must be one of"),
        ("saliency_target", "true", "saliency_target must be one of"),
        ("saliency_pass", "own", "saliency_pass must be one of"),
        ("kl_gradient", "none", "kl_gradient must be one of"),
        ("mask_positions", "salient", "mask_positions must be one of"),
        ("mask_fill", "noise", "mask_fill must be one of"),
        ("fill_step", -0.1, "fill_step must be finite and at least 0, got -0.1"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(tmp_path, field, value, message):
    """Each error names the field, its value and what would be right."""
    with pytest.raises(ValueError, match=message):
        SmootTrainingArguments(output_dir=str(tmp_path), **{field: value})


def test_sgt_needs_no_bounds_around_its_ratio(tmp_path):
    """Catches smoot's bounds refusing a legitimate fixed K."""
    assert SmootTrainingArguments(output_dir=str(tmp_path), method="sgt", mask_ratio=0.0).mask_ratio == 0


def test_a_step_in_percent_is_of_the_image(tmp_path):
    """Catches a step of ten pixels where ten percentage points were asked for."""
    args = SmootTrainingArguments(output_dir=str(tmp_path), step_size=10, step_unit="percent")
    assert args.step_in_positions((224, 224)) == pytest.approx(5017.6)
    args.mask_cell = 16
    assert args.step_in_positions((224, 224)) == pytest.approx(19.6)
    args.step_unit = "pixels"
    assert args.step_in_positions((224, 224)) == 10


@pytest.mark.parametrize(
    ("size", "cell", "positions"),
    [
        ((28, 28), 1, 10),  # the paper's sizes: exactly its ten pixels
        ((32, 32), 1, 10),
        ((8, 8), 1, 10),
        ((33, 28), 1, 10 * 33 * 28 / 784),  # one row more than the paper's
        ((224, 224), 1, 640),
        ((224, 224), 16, 2.5),
        ((32, 32), 4, 10 * 64 / 784),
        ((30, 45), 16, 10 * 6 / 784),  # narrow cells count
    ],
)
def test_by_default_the_step_is_the_papers_share_of_the_image(size, cell, positions):
    """Catches ten pixels of 50,176, which move nothing, and a step of the paper's sizes that is not the paper's."""
    assert SmootSettings(mask_cell=cell).step_in_positions(size) == pytest.approx(positions, rel=1e-12)


def test_a_cell_larger_than_the_image_has_no_step():
    """Catches one cell for the whole image, and an error that names another argument than the user's."""
    with pytest.raises(ValueError, match=r"mask_cell must be between 1 and 8, .* 8x9 pixels, got 16"):
        SmootSettings(mask_cell=16).step_in_positions((8, 9))


def test_plain_training_arguments_gain_the_defaults(tmp_path):
    """A script that parses TrainingArguments works unchanged; catches a lost value."""
    plain = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-4, seed=7)
    args = SmootTrainingArguments.from_training_arguments(plain)
    assert isinstance(args, SmootTrainingArguments)
    assert (args.learning_rate, args.seed, args.method) == (3e-4, 7, "smoot")
    assert args.to_dict()["mask_ratio"] == 0.5


@dataclass
class TheirArguments(TrainingArguments):
    """As people have them: a field, what is made of it, a method that is overridden, and one of their own."""

    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.run_name = f"{self.run_name}, {self.temperature} degrees"

    def to_dict(self):
        return super().to_dict() | {"kelvin": self.temperature + 273}

    def heat(self):
        return 2 * self.temperature


def test_a_class_of_arguments_of_ones_own_gains_the_fields_and_keeps_everything(tmp_path):
    """Catches a lost field or method, what was made of the fields made once more, and arguments changed in place."""
    theirs = TheirArguments(output_dir=str(tmp_path), run_name="run", temperature=30.0, learning_rate=3e-4)
    theirs.set_by_hand = "kept"
    before = dict(vars(theirs))
    args = SmootTrainingArguments.from_training_arguments(theirs)
    assert vars(theirs) == before
    assert isinstance(args, TheirArguments)
    assert isinstance(args, SmootTrainingArguments)
    assert vars(args) == before | {f.name: f.default for f in ADDED}
    assert (args.run_name, args.heat(), args.to_dict()["kelvin"]) == ("run, 30.0 degrees", 60, 303)
    assert {"temperature", "mask_ratio"} <= {f.name for f in fields(args)} & args.to_dict().keys()
    args.check_smoot_fields()


def test_such_arguments_can_be_saved_and_read(tmp_path):
    """The Trainer pickles its arguments beside the model; catches a class that cannot be found again, and a token."""
    theirs = TheirArguments(output_dir=str(tmp_path), temperature=30.0, hub_token="secret")
    args = SmootTrainingArguments.from_training_arguments(theirs)
    torch.save(args, tmp_path / "training_args.bin")
    read = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(read) is type(args)
    assert vars(read).keys() == vars(args).keys()
    assert read.to_dict() | {"hub_token": None} == args.to_dict() | {"hub_token": None}
    assert (args.hub_token, read.hub_token, read.heat()) == ("secret", None, 60)


@pytest.mark.parametrize("name", ["alpha", "check_smoot_fields"])
def test_a_name_of_two_meanings_is_refused(name, tmp_path):
    """Catches a field of the user's own that silently becomes a weight of delta."""
    kind = make_dataclass("Mixed", [(name, float, 0.3)], bases=(TrainingArguments,))
    with pytest.raises(TypeError, match=rf"Mixed.{name} has a name .* another meaning: rename it, or derive Mixed"):
        SmootTrainingArguments.from_training_arguments(kind(output_dir=str(tmp_path)))
    with pytest.raises(TypeError, match="args must be SmootTrainingArguments or TrainingArguments, got dict"):
        SmootTrainingArguments.from_training_arguments({"output_dir": str(tmp_path)})


NAMES = ["{}", "eval_{}", "eval_corner_{}", "corner_{}"]


@pytest.mark.parametrize("metric", GREATER_IS_BETTER)
@pytest.mark.parametrize("name", NAMES)
def test_every_reported_metric_knows_its_direction(metric, name, tmp_path):
    """Catches the worst checkpoint kept as the best: the stock default is that a greater value is better."""
    greater, settings = GREATER_IS_BETTER[metric], {"output_dir": str(tmp_path), "report_to": "none"}
    settings["metric_for_best_model"] = name.format(metric)
    assert SmootTrainingArguments(**settings).greater_is_better is greater
    assert SmootTrainingArguments(**settings, greater_is_better=greater).greater_is_better is greater
    with pytest.raises(ValueError, match=rf"greater_is_better={not greater} contradicts .*{metric}.*={greater}"):
        SmootTrainingArguments(**settings, greater_is_better=not greater)
    plain = TrainingArguments(**settings)
    assert SmootTrainingArguments.from_training_arguments(plain).greater_is_better is greater
    assert plain.greater_is_better is True


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("outside_0.1", False), ("eval_outside_0.025", False), ("eval_corner_outside_1", False), ("outside_in", None),
     ("eval_relevance_mass", True), ("roc_auc_0.1", None)],
)  # fmt: skip
def test_the_share_outside_is_known_with_its_top(metric, greater):
    """Catches the highest share outside the evidence kept as the best, and metrics of others taken for ours."""
    assert greater_is_better(metric) is greater


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("metric", GREATER_IS_BETTER)
def test_a_schedule_that_follows_a_metric_goes_its_way(schedule, metric, tmp_path):
    """Catches a learning rate that is lowered for as long as the metric improves."""
    settings = {"output_dir": str(tmp_path), "metric_for_best_model": metric, "lr_scheduler_type": schedule}
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    right, wrong = ("max", "min") if GREATER_IS_BETTER[metric] else ("min", "max")
    SmootTrainingArguments(**settings, lr_scheduler_kwargs={"mode": right})
    with pytest.raises(ValueError, match=f"{schedule}.*{metric}.*its mode is '{wrong}': set .*'mode': '{right}'"):
        SmootTrainingArguments(**settings, lr_scheduler_kwargs={"mode": wrong})


def test_metrics_of_others_keep_the_direction_that_the_user_gives(tmp_path):
    """Catches a name that merely resembles one of ours, and an argument of the Trainer's that is overruled."""
    for metric in ("loss", "accuracy", "eval_f1", "auc", "deletion_auc_gap", "mydeletion_auc"):
        assert greater_is_better(metric) is None
        for greater in (None, True, False):
            settings = {"output_dir": str(tmp_path), "metric_for_best_model": metric, "greater_is_better": greater}
            expected = TrainingArguments(**settings).greater_is_better
            assert SmootTrainingArguments(**settings).greater_is_better is expected


def test_a_direction_turned_round_after_construction_is_refused(quick_trainer):
    """Catches an argument that is set later and that nobody checks."""
    trainer = quick_trainer(metric_for_best_model="deletion_auc")
    trainer.args.greater_is_better = True
    with pytest.raises(ValueError, match="greater_is_better=True contradicts"):
        trainer.train()


def test_how_often_a_run_is_looked_at_does_not_tell_it_from_another(tmp_path):
    """Catches a comparison that refuses two runs since one of them was evaluated more often."""

    def changed(**arguments):
        return SmootTrainingArguments(str(tmp_path), use_cpu=True, **arguments).changed_from_defaults()

    looks = {"eval_strategy": "steps", "eval_steps": 7, "save_steps": 14, "logging_steps": 3, "run_name": "other"}
    assert changed(**looks) == changed()
    assert changed(learning_rate=0.5, kl_weight=2.0) == {"learning_rate": 0.5, "kl_weight": 2.0}
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 14}
    assert changed(**best, eval_steps=7) != changed(**best, eval_steps=14)


def test_what_decides_the_weights_is_a_field():
    """Catches a misspelled name in the list, which would let runs of unlike settings be compared."""
    known = {f.name for f in fields(SmootTrainingArguments)}
    # Fields that one of the supported versions of transformers does not have.
    of_some_versions = {"warmup_ratio", "neftune_noise_alpha", "liger_kernel_config", "train_sampling_strategy"}
    assert (_DECIDE_WEIGHTS | _DECIDE_THE_BEST) - known <= of_some_versions


def test_the_settings_are_those_of_the_arguments(tmp_path):
    """Catches a field of the method that stands in one of the two classes only, or with another default."""
    args = SmootTrainingArguments(str(tmp_path), use_cpu=True)
    assert args.settings == SmootSettings()
    others = {"deletion_auc_samples", "overwrite_output_dir", "keep_freed_memory", "num_train_samples"}
    others |= {"mask_budget_sharded"}
    own = {f.name for f in ADDED} - others
    assert own | {"seed", "label_smoothing_factor"} == {f.name for f in fields(SmootSettings)}
    with pytest.raises(FrozenInstanceError):
        args.settings.alpha = 0.5
    with pytest.raises(ValueError, match="alpha must be in"):
        SmootSettings(alpha=2.0)
