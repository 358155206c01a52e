"""Arguments that make no sense: refused by name, value and range, before anything is loaded."""

import math

import pytest
from bad_input import Case, args_of, judge, train_recipe


def argument(name, value, message):
    return Case(lambda folder: args_of(folder, **{name: value}), ValueError, message)


CASES = {
    "mask_ratio above 1": argument("mask_ratio", 1.5, r"mask_ratio must be in \[0, 1\], got 1.5"),
    "mask_ratio NaN": argument("mask_ratio", math.nan, r"mask_ratio must be in \[0, 1\], got nan"),
    "mask_ratio text": argument("mask_ratio", "0.5", "mask_ratio must be a number, got '0.5'"),
    "mask_ratio_min above mask_ratio": argument("mask_ratio_min", 0.9, "mask_ratio_min=0.9, mask_ratio=0.5"),
    "mask_ratio_max below mask_ratio": argument("mask_ratio_max", 0.4, "mask_ratio=0.5, mask_ratio_max=0.4"),
    "top_n 0": argument("top_n", 0, "top_n must be finite and at least 1, got 0"),
    "top_n a fraction": argument("top_n", 2.5, "top_n must be a whole number, got 2.5"),
    "alpha 2": argument("alpha", 2, r"alpha must be in \[0, 1\], got 2"),
    "alpha None": argument("alpha", None, "alpha must be a number, got None"),
    "kl_weight -1": argument("kl_weight", -1, "kl_weight must be finite and at least 0, got -1"),
    "step_size negative": argument("step_size", -1.0, "step_size must be finite and at least 0, got -1.0"),
    "step_size infinite": argument("step_size", math.inf, "step_size must be finite and at least 0, got inf"),
    "method unknown": argument("method", "smooth", "method must be one of 'standard', 'sgt', 'smoot', got 'smooth'"),
    "rounding unknown": argument("rounding", "ceil", "rounding must be one of 'floor', 'trunc', 'nearest', got 'ceil'"),
    "signed_saliency text": argument("signed_saliency", "no", "signed_saliency must be True or False, got 'no'"),
    "mask_budget_sharded 2": argument("mask_budget_sharded", 2, "mask_budget_sharded must be True or False, got 2"),
    "num_train_samples 0": argument("num_train_samples", 0, "num_train_samples must be finite and at least"),
    "deletion_auc_samples -1": argument("deletion_auc_samples", -1, "deletion_auc_samples must be finite and at least"),
    "accumulation 0": argument("gradient_accumulation_steps", 0, "gradient_accumulation_steps must be .* at least 1"),
    "batch 0": argument("per_device_train_batch_size", 0, "per_device_train_batch_size must be .* at least 1, got 0"),
    "label smoothing 2": argument("label_smoothing_factor", 2.0, r"label_smoothing_factor must be in \[0, 1\], got 2"),
    "recipe: alpha 2": Case(train_recipe("--alpha", "2"), 2, r"alpha must be in \[0, 1\], got 2.0"),
    "recipe: step_size NaN": Case(train_recipe("--step_size", "nan"), 2, "step_size must be finite .* got nan"),
    "recipe: unknown flag": Case(train_recipe("--mask_ration", "1"), 2, "unknown argument .*did you mean mask_ratio"),
    "recipe: top_n a fraction": Case(train_recipe("--top_n", "2.5"), 2, "--top_n.*invalid int value: '2.5'"),
    "recipe: learning rate -1": Case(
        train_recipe("--learning_rate=-1"), 2, "learning_rate must be finite and at least 0, got -1.0"
    ),
    "learning rate text": argument("learning_rate", "1e-3", "learning_rate must be a number, got '1e-3'"),
    "weight decay NaN": argument("weight_decay", math.nan, "weight_decay must be finite and at least 0, got nan"),
    "recipe: patch of no pixel": Case(
        train_recipe("--model", "deit-tiny", "--from_scratch", "--patch_size", "0"), 2, "patch_size must be at least 1"
    ),
    "recipe: no such metric": Case(
        train_recipe("--load_best_model_at_end", "--metric_for_best_model", "beauty"),
        1,
        "metric_for_best_model.* 'eval_beauty'.*available evaluation metrics are",
    ),
    "recipe: no such configuration file": Case(train_recipe("--config", "{}/none.yaml"), 2, "cannot read .*none.yaml"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, bad_input_folder, capsys):
    """Catches a value that trains something else, or fails hours later without saying which it was."""
    judge(CASES[name], bad_input_folder, capsys)
