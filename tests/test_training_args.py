"""The arguments of SMOOT: parsed, explained, validated."""

from dataclasses import dataclass, fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from smoot_hf import SmootTrainingArguments

ADDED = [f for f in fields(SmootTrainingArguments) if f.name not in {g.name for g in fields(TrainingArguments)}]


def test_every_added_field_is_a_flag_with_help(tmp_path):
    """Catches a field that the command line cannot set, and one that --help does not explain."""
    parser = HfArgumentParser(SmootTrainingArguments)
    flags = {
        "method": "sgt", "mask_ratio": "0.4", "mask_ratio_min": "0.1", "mask_ratio_max": "0.9", "step_size": "3.5",
        "step_unit": "percent", "rounding": "trunc", "alpha": "0.95", "top_n": "3", "delta_mode": "label",
        "kl_weight": "0.5", "saliency_score": "log_prob", "signed_saliency": "False", "saliency_target": "predicted",
        "saliency_pass": "eval", "shared_dropout": "False", "kl_gradient": "masked", "mask_fill": "mean",
        "deletion_auc_samples": "64", "overwrite_output_dir": "True",
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
        "step_unit": "pixels", "rounding": "floor", "alpha": 0.8, "top_n": 5, "delta_mode": "rank", "kl_weight": 1.0,
        "saliency_score": "logit", "signed_saliency": True, "saliency_target": "label", "saliency_pass": "shared",
        "shared_dropout": True, "kl_gradient": "both", "mask_fill": "uniform",
        "deletion_auc_samples": 0, "overwrite_output_dir": False,
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
        ("top_n", 2.5, r"top_n must be a whole number, got 2.5"),
        ("deletion_auc_samples", -1, "deletion_auc_samples must be finite and at least 0, got -1"),
        ("step_size", -1.0, "step_size must be finite and at least 0, got -1.0"),
        ("kl_weight", float("inf"), "kl_weight must be finite and at least 0, got inf"),
        ("step_unit", "pixel", "step_unit must be one of 'pixels', 'percent', got 'pixel'"),
        ("rounding", "ceil", "rounding must be one of"),
        ("delta_mode", "top", "delta_mode must be one of"),
        ("saliency_score", "prob", "saliency_score must be one of"),
        ("saliency_target", "true", "saliency_target must be one of"),
        ("saliency_pass", "own", "saliency_pass must be one of"),
        ("kl_gradient", "none", "kl_gradient must be one of"),
        ("mask_fill", "noise", "mask_fill must be one of"),
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
    assert args.step_in_pixels((224, 224)) == pytest.approx(5017.6)
    args.step_unit = "pixels"
    assert args.step_in_pixels((224, 224)) == 10


def test_plain_training_arguments_gain_the_defaults(tmp_path):
    """A script that parses TrainingArguments works unchanged; catches a lost value."""
    plain = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-4, seed=7)
    args = SmootTrainingArguments.from_training_arguments(plain)
    assert isinstance(args, SmootTrainingArguments)
    assert (args.learning_rate, args.seed, args.method) == (3e-4, 7, "smoot")
    assert args.to_dict()["mask_ratio"] == 0.5


def test_foreign_arguments_are_refused(tmp_path):
    """Catches the fields of a user's own class vanishing silently."""

    @dataclass
    class Mine(TrainingArguments):
        temperature: float = 1.0

    with pytest.raises(TypeError, match="derive Mine from SmootTrainingArguments"):
        SmootTrainingArguments.from_training_arguments(Mine(output_dir=str(tmp_path)))
