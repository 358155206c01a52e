"""The commands and the recipes: their settings, their command line, and a run from the command to the saved model."""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction, TrainingArguments

import smoot_hf
from smoot_hf import MaskBudget, SmootTrainer, SmootTrainingArguments
from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.experiments import (
    arguments,
    checkpoint,
    checkpoint_evaluation,
    compare,
    evaluate,
    flags,
    prediction,
    train,
    training_run,
)
from smoot_hf.experiments.campaign_images import Data
from smoot_hf.experiments.command import SUBCOMMANDS
from smoot_hf.experiments.recipes import RECIPES
from smoot_hf.experiments.run import settings_of
from smoot_hf.presets import PRESETS

FOLDER = Path(__file__).parents[2] / "recipes"
# Name of a recipe -> its file: train_<name>.py, or finetune_<name>.py.
FILES = {path.stem.partition("_")[2]: path for kind in ("train", "finetune") for path in FOLDER.glob(f"{kind}_*.py")}
NAMES = sorted(FILES)
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--max_train_samples", "200", "--max_eval_samples", "100"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """As when a command is run: `runs/` is in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parse(recipe, *argv):
    return arguments.parse(arguments.make_parser(RECIPES[recipe] if recipe else {}, "help"), list(argv))


def one_line(capsys):
    """What a user sees of an error."""
    error = capsys.readouterr().err.strip().splitlines()
    return error[-1]


def run(recipe, *argv):
    return train.main(RECIPES[recipe], argv=[*argv, *QUICK])


def test_there_is_a_recipe_for_every_data_set():
    """Fault: the tests below find nothing to test."""
    assert NAMES == [
        "cifar10",
        "cifar100",
        "cifar10_mixed",
        "digits",
        "fashion_mnist",
        "mnist",
        "photos",
        "several_digits",
    ]
    assert sorted(RECIPES) == sorted([*NAMES, "digits-block"])


def test_nan_logits_are_wrong():
    """Fault: the argmax of NaN, 0, that is right for the images of class 0 in a run that has diverged."""
    logits = np.array([[np.nan, np.nan], [2.0, np.nan], [2.0, 1.0], [1.0, 2.0]], dtype=np.float32)
    assert prediction.metrics(EvalPrediction(logits, np.array([0, 0, 0, 0]))) == {"accuracy": 0.25}


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_flags(name):
    """Fault: a misspelled default, which argparse takes without a word."""
    defaults = {**arguments.DEFAULTS, **RECIPES[name]}
    args, recipe = parse(name)
    for key, value in defaults.items():
        if key not in ("output_dir", "report_to"):
            assert getattr(args, key, getattr(recipe, key, None)) == value, key
    assert args.report_to == []


@pytest.mark.parametrize(
    ("name", "learning_rate", "alpha", "model"),
    [
        ("mnist", 1.0, 0.95, "cnn"),
        ("fashion_mnist", 1.0, 0.95, "cnn"),
        ("cifar10", 0.001, 0.8, "deit-tiny"),
        ("cifar100", 0.001, 0.8, "deit-tiny"),
    ],
)
def test_settings_are_the_papers(name, learning_rate, alpha, model):
    """Fault: a table reproduced with the settings of another."""
    args, recipe = parse(name)
    assert (args.learning_rate, args.alpha, recipe.model, recipe.optimizer) == (learning_rate, alpha, model, "adadelta")
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.max_grad_norm) == (100, 256, 0)
    assert (args.method, args.rounding, args.step_size, args.kl_weight, args.signed_saliency) == (
        "smoot",
        "trunc",
        10,
        1,
        True,
    )
    assert str(args.lr_scheduler_type.value) == "constant"


@pytest.mark.parametrize("as_first", [True, False])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_flags_override_the_configuration_file_and_it_the_recipe(tmp_path, as_first, suffix):
    """Fault: the file wins over the command line, or 5e-1 stays the text that YAML takes it for."""
    path = tmp_path / f"config.{suffix}"
    text = {"yaml": "alpha: 5e-1\ntop_n: 3\nhorizontal_flip: true\nmodel: null\n", "json": '{"alpha": 0.5, "top_n": 3}'}
    path.write_text(text[suffix])
    argv = [str(path)] if as_first else ["--config", str(path)]
    args, recipe = parse("mnist", *argv, "--top_n", "4")
    assert (args.alpha, args.top_n, recipe.model) == (0.5, 4, "cnn")
    assert recipe.horizontal_flip == (suffix == "yaml")


def test_output_directory_names_the_run():
    """Fault: runs that overwrite each other."""
    assert parse("mnist")[0].output_dir == "runs/mnist-cnn-smoot"
    assert parse("cifar10", "--method", "sgt", "--dataset", "/data/cifar/")[0].output_dir == (
        "runs/cifar-deit-tiny-sgt"
    )
    assert parse("mnist", "--output_dir", "here")[0].output_dir == "here"
    # Seeds are runs of their own; the default one needs no mention.
    assert parse("mnist", "--seed", "7")[0].output_dir == "runs/mnist-cnn-smoot-seed7"
    assert parse("mnist", "--seed", "42")[0].output_dir == "runs/mnist-cnn-smoot"


def test_a_preset_comes_after_the_recipe_and_before_the_flags():
    """Fault: a preset that a recipe overrides, that overrides a flag, or that says what no argument is."""
    parser = arguments.make_parser({}, "help")
    for name, preset in PRESETS.items():
        args, _ = arguments.parse(parser, ["--recipe", "mnist", "--preset", name])
        assert {field: getattr(args, field) for field in preset} == preset
        assert args.alpha == 0.95
    args, _ = arguments.parse(parser, ["--preset", "recommended", "--fill_step", "0.3", "--method", "smoot"])
    assert (args.fill_step, args.method, args.mask_fill) == (0.3, "smoot", "adversarial")
    with pytest.raises(SystemExit):
        arguments.parse(parser, ["--preset", "best"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "unknown argument --lerning_rate: did you mean learning_rate"),
        (["--max_train", "1"], "unknown argument --max_train"),
        (["--method", "smot"], "invalid choice: 'smot'"),
        (["--alpha", "2"], "alpha must be in [0, 1], got 2.0"),
        (["missing.yaml"], "cannot read the configuration file 'missing.yaml'"),
        (["--config", "wrong.yaml"], "unknown key 'datset' in wrong.yaml: did you mean dataset"),
        (["--config", "list.yaml"], "must map names of flags to values"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, message, capsys):
    """Fault: two hundred flags of usage, or a traceback."""
    Path("wrong.yaml").write_text("datset: digits\n")
    Path("list.yaml").write_text("- 1\n")
    with pytest.raises(SystemExit) as stop:
        parse("digits", *argv)
    assert stop.value.code == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "someone/something"], "--dataset takes a local directory"),
        (["--model", "someone/something"], "--model takes a local directory"),
        (["--image_column", "photo"], "image_column='photo' is not a column"),
        (["--max_train_samples", "0"], "max_train_samples must be at least 1"),
        (["--crop_padding", "-1"], "crop_padding must be at least 0"),
        (["--resume_from_checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["--resume_from_checkpoint", "true"], "no whole checkpoint of this run in runs/digits-cnn-smoot;"),
    ],
)
def test_wrong_data_or_model_are_one_line(argv, message, capsys):
    """Fault: a traceback where the network or a name is missing."""
    with pytest.raises(SystemExit) as stop:
        train.main({"dataset": "digits"}, argv=[*argv, "--use_cpu"])
    assert stop.value.code == 2
    assert message in one_line(capsys)


def test_help_explains_every_flag(capsys):
    """Fault: a flag without help."""
    parser = arguments.make_parser({}, "help")
    unexplained = [a.dest for a in parser._actions if not a.help and not any("--no" in o for o in a.option_strings)]
    assert unexplained == []


def test_flags_read_from_the_sources_are_those_of_the_classes():
    """Fault: a flag that is refused at once though the full parser takes it, or explained otherwise; a new release."""
    defaults = RECIPES["mnist"]
    full = arguments.make_parser(defaults, "help")
    quick = flags.quick_parser(defaults, "help")
    assert [action.option_strings for action in quick._actions] == [action.option_strings for action in full._actions]
    ours = {f.name for f in fields(SmootTrainingArguments)} - {f.name for f in fields(TrainingArguments)}
    for mine, theirs in zip(quick._actions, full._actions, strict=True):
        assert (mine.dest, mine.help or None) == (theirs.dest, theirs.help)
        # None takes one value, "?" at most one, "*" any number: never fewer than the full parser takes.
        allowed = {None: (None, "?"), "?": ("?",), "+": ("*",), 0: (0,)}
        assert mine.nargs in (*allowed[theirs.nargs], "*"), mine.dest
        assert mine.choices is None or list(mine.choices) == list(theirs.choices), mine.dest
        assert mine.type in (None, theirs.type), mine.dest
        if mine.dest in ours or mine.dest in defaults:
            assert mine.default == theirs.default, mine.dest


COMMANDS = {name: [str(path)] for name, path in FILES.items()}
COMMANDS |= {name: ["-m", f"smoot_hf.experiments.{name.replace('-', '_')}"] for name in SUBCOMMANDS}
# As the script that an installation makes.
SCRIPT = ["-c", "from smoot_hf.experiments.command import main; main()"]
COMMANDS |= {f"smoot-hf {name}": [*SCRIPT, name] for name in SUBCOMMANDS}


def run_without_torch(folder, *argv):
    """Run Python where an import of torch fails."""
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{FOLDER.parent}"}
    return subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_checked_before_anything_slow_is_imported(name, tmp_path):
    """Fault: twenty seconds of importing before a misspelled flag is told, or --help shown."""
    takes_words = name.split()[-1] in ("evaluate", "demo", "campaign", "explain")
    wrong = ["x", "--dataset", "y", "--prt", "1"] if takes_words else ["--lerning_rate", "1"]
    if name.endswith("fetch-backbone"):
        wrong = ["efficientnet-lite0", "folder", "--fodler", "1"]
    for argv, code, expected in ((["--help"], 0, "usage: "), (wrong, 2, wrong[-2])):
        done = run_without_torch(tmp_path, *COMMANDS[name], *argv)
        assert done.returncode == code, done.stderr
        assert expected in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == (1 if code else 0)


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        ([], 2, "smoot-hf: error: the following arguments are required: subcommand"),
        (["--help"], 0, "  compare         Train and compare the methods over several seeds"),
        (["--version"], 0, f"smoot-hf {smoot_hf.__version__}"),
        (["trian"], 2, "invalid choice: 'trian'"),
        (["train", "--help"], 0, "usage: smoot-hf train "),
        (["train", "--alhpa", "1"], 2, "smoot-hf train: error: unknown argument --alhpa: did you mean alpha"),
        (["compare", "--recipe", "imagenet"], 2, "smoot-hf compare: error: argument --recipe: invalid choice"),
        (["evaluate"], 2, "smoot-hf evaluate: error: the following arguments are required: checkpoint, --dataset"),
    ],
)
def test_the_command_finds_its_subcommand(argv, code, expected, tmp_path):
    """Fault: a subcommand that hands its flags to another, or answers under another name."""
    done = run_without_torch(tmp_path, *SCRIPT, *argv)
    assert done.returncode == code, done.stderr
    assert expected in done.stdout + done.stderr


def test_a_recipe_by_its_name_is_the_recipe():
    """Fault: an installation without the repository trains with other settings; a flag that a recipe overrides."""
    for name in NAMES:
        named, own = parse("", "--recipe", name), parse(name)
        assert settings_of(*named) == settings_of(*own)
        assert named[0].output_dir == own[0].output_dir
    Path("recipe.yaml").write_text("recipe: mnist\nalpha: 0.5\n")
    args, recipe = parse("", "recipe.yaml", "--top_n", "3")
    assert (recipe.dataset, args.alpha, args.top_n, args.rounding) == ("ylecun/mnist", 0.5, 3, "trunc")


def test_a_recipe_within_a_recipe_is_refused(capsys):
    """Fault: the settings of two data sets, mixed."""
    with pytest.raises(SystemExit):
        parse("digits", "--recipe", "mnist")
    assert "unknown argument --recipe" in one_line(capsys)


def test_every_command_reads_a_configuration_file():
    """Fault: flags of a file that override those of the command line, a switch, or a list that takes the next word."""
    Path("judge.yaml").write_text("dataset: digits\nbf16: true\nconvert_rgb: false\nattribution: [gradient, random]\n")
    parser = evaluate.make_parser()
    found = parser.parse_args(flags.with_config(parser, ["run", "--config", "judge.yaml", "--dataset", "other"]))
    assert (found.checkpoint, found.dataset, found.bf16, found.convert_rgb) == ("run", "other", True, False)
    assert found.attribution == ["gradient", "random"]
    Path("compare.yaml").write_text("recipe: mnist\nseeds: [3, 4]\nalpha: 0.5\nlabel_names: [a, b]\n")
    parser = compare.make_comparison_parser()
    argv = flags.with_config(parser, ["compare.yaml", "--seeds", "5", "--top_n", "2"], others_follow=True)
    found, rest = parser.parse_known_args(argv)
    assert (found.recipe, found.seeds) == ("mnist", [5])
    assert rest == ["--alpha=0.5", "--label_names", "a", "b", "--top_n", "2"]


# Defaults that version 0.1.0 had otherwise, and why they differ.
CHANGED_DEFAULTS = {
    ("evaluate", "--device"): "None",  # a GPU is used where there is one
    ("train", "--step_unit"): "'auto'",  # the same at the paper's sizes, and K moves on larger images
    ("train", "--signed_saliency"): "False",  # docs/verdict.md; the recipes keep the paper's reading
}


def test_every_flag_of_version_0_1_0_is_still_there_with_its_default():
    """Fault: a script or a configuration file of before that is refused, or trains with other settings."""
    former = json.loads((Path(__file__).parents[1] / "fixtures" / "recipe_flags.json").read_text())
    commands = {
        "compare_methods": ("compare", compare.make_comparison_parser()),
        "evaluate_faithfulness": ("evaluate", evaluate.make_parser()),
        "train": ("train", arguments.make_parser({}, "")),
        **{
            f"train_{name}": (name, arguments.make_parser(RECIPES[name], ""))
            for name in NAMES
            if f"train_{name}" in former
        },
    }
    assert former.keys() == commands.keys()
    for file, (name, parser) in commands.items():
        now = {option: repr(action.default) for action in parser._actions for option in action.option_strings}
        expected = {flag: CHANGED_DEFAULTS.get((name, flag), default) for flag, default in former[file].items()}
        assert expected == {flag: now.get(flag) for flag in expected}, name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "unknown argument --lerning_rate: did you mean learning_rate"),
        (["--method", "smot"], "invalid choice: 'smot'"),
        (["--top_n", "2.5"], "invalid int value: '2.5'"),
        (["missing.yaml"], "cannot read the configuration file 'missing.yaml'"),
        (["wrong.yaml"], "unknown key 'datset' in wrong.yaml: did you mean dataset"),
    ],
)
def test_what_is_checked_early_is_told_in_the_same_words(argv, message, capsys):
    """Fault: an early check that lets pass what it could refuse, or that says less than the full parser."""
    Path("wrong.yaml").write_text("datset: digits\n")
    with pytest.raises(SystemExit) as stop:
        flags.check_flags({}, "help", argv)
    assert stop.value.code == 2
    assert message in one_line(capsys)


def test_what_is_right_passes_the_early_check():
    """Fault: a command that worked is refused."""
    Path("right.yaml").write_text("alpha: 5e-1\nlabel_names: [a, b]\nlr_scheduler_kwargs: {a: 1}\n")
    right = ["right.yaml", "--top-n", "4", "--bf16", "--horizontal_flip", "false", "--no_shared_dropout"]
    right += ["--label_names", "a", "b", "--alpha", "-1", "--resume_from_checkpoint=true", "--warmup_steps", "0.1"]
    flags.check_flags({"alpha": 0.95}, "help", right)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "class TrainingArguments(Other):\n    seed: int = 0\n",
        "class TrainingArguments:\n    seed: int = (\n",
    ],
)
def test_sources_that_do_not_tell_every_flag_refuse_none(source, monkeypatch):
    """Fault: flags of a release that spreads its arguments over several classes are refused as unknown."""
    Path("training_args.py").write_text(source)
    assert flags.read_flags_of(Path("training_args.py"), "TrainingArguments", []) is None
    monkeypatch.setattr(flags, "_SOURCES", (("no_such_package", "a.py", "A", []),))
    flags.check_flags({}, "help", ["--anything", "1"])


def test_a_field_of_two_classes_is_read_from_the_first(tmp_path, monkeypatch):
    """Fault: fields that are stated once, in the settings of the method, are flags without default and help."""
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "settings.py").write_text(
        "class Settings:\n    alpha: float = _setting(0.8, 'Weight.')\n    seed: int = 42\n"
    )
    (package / "arguments.py").write_text(
        "class Arguments:\n    alpha: float = _of_settings('alpha')\n    other: bool = _argument(False, 'Other.')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sources = (("some_package", "settings.py", "Settings", []), ("some_package", "arguments.py", "Arguments", []))
    monkeypatch.setattr(flags, "_SOURCES", sources)
    found = {action.dest: action for action in flags.quick_parser({}, "help")._actions}
    assert (found["alpha"].default, found["alpha"].help, found["alpha"].type) == (0.8, "Weight.", float)
    assert (found["seed"].default, found["other"].help) == (42, "Other.")


def test_the_line_of_an_error_goes_into_the_launchers_report(monkeypatch, capsys, tmp_path):
    """Fault: a launcher whose last words are that some process ended with code 2."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stop:
        flags.OneLineParser(prog="recipe").error("too\nmuch", code=1)
    assert stop.value.code == 1
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert failure.message == "recipe: error: too much" == one_line(capsys)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "absent" / "error.json"))
    with pytest.raises(SystemExit):
        flags.OneLineParser(prog="recipe").error("too much")


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--lerning_rate", "1"], ["--dataset", "nowhere", "--use_cpu"]])
def test_torchrun_says_the_line_last(argv):
    """Fault: our line is buried under the launcher's traceback, which says an exit code alone."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(FOLDER / "train_digits.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *argv], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    last = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("=")][-1]
    assert "train_digits.py: error: " in last
    assert argv[0].lstrip("-") in last or "nowhere" in last


@pytest.mark.parametrize("method", ["smoot", "standard"])
def test_digits_from_command_to_saved_model(method, capsys):
    """Fault: what is saved is not what was evaluated (weights, processor, class names), or the summary is missing."""
    metrics = run("digits", "--num_train_epochs", "2", "--method", method)
    printed = capsys.readouterr().out
    folder = Path(f"runs/digits-cnn-{method}")
    assert f"{method} on digits: 200 training and 100 test images, 1 process(es) on cpu" in printed
    assert f"test accuracy     {metrics['eval_accuracy']:.2%} of 100 images" in printed
    assert ("K min/median/max" in printed) == (method == "smoot")
    assert f"model saved in    {folder}" in printed
    assert json.loads((folder / "all_results.json").read_text())["eval_accuracy"] == metrics["eval_accuracy"]

    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    test = load_image_dataset("digits")["test"].shuffle(seed=0).select(range(100))
    with torch.no_grad():
        predicted = model(**processor(test["image"][:], return_tensors="pt")).logits.argmax(1)
    assert float(np.mean(predicted.numpy() == np.array(test["labels"]))) == pytest.approx(metrics["eval_accuracy"])
    assert model.config.id2label[3] == "3"


def test_photographs_of_mixed_sizes_from_command_to_record():
    """Fault: a flag that training has and evaluation, demo or record have not, so that they see other images."""
    for split, count in {"train": 6, "validation": 4, "extra": 2}.items():
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
        sizes = [(12 + i, 16 - i, 3) for i in range(count)]
        images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, s, np.uint8)) for i, s in enumerate(sizes)]
        columns = {"image": images, "label": [i % 2 for i in range(count)]}
        path = Path(f"photographs/data/{split}-00000-of-00001.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    flags = ["--image_size", "8", "--eval_split", "extra"]
    quick = ["--output_dir", "run", "--num_train_epochs", "1", "--card_samples", "0"]
    run("digits", "--dataset", "photographs", *flags, *quick)
    settings = json.loads(Path("run/run.json").read_text())["settings"]
    assert (settings["image_size"], settings["eval_split"]) == (8, "extra")
    recorded = checkpoint.recorded_images(Path("run"), "test")
    options = evaluate.make_parser().parse_args(["run", "--dataset", "photographs", *flags])
    judged = checkpoint_evaluation.load_test_images(options)
    assert recorded.image_shape == judged.image_shape == (3, 8, 8)
    assert len(recorded) == len(judged) == 2
    assert recorded.fingerprint == judged.fingerprint
    checkpoint.load_checkpoint("run", judged, "cpu")
    processor = AutoImageProcessor.from_pretrained("run")
    assert (processor.do_center_crop, processor.size["shortest_edge"]) == (True, 8)


def test_evaluation_on_the_training_split_is_refused(capsys):
    """Fault: training accuracy that is reported as test accuracy."""
    with pytest.raises(SystemExit):
        run("digits", "--eval_split", "train")
    assert "eval_split='train' is what is trained on" in one_line(capsys)


def test_adadelta_gets_its_flags():
    """Fault: AdamW in its place, or a flag that does not reach it."""
    args, recipe = parse("digits", *QUICK, "--weight_decay", "0.1", "--learning_rate", "0.5")
    trainer = training_run.make_trainer(training_run.prepare(args, recipe), args, recipe)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    assert type(trainer.optimizer) is torch.optim.Adadelta
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1


def test_resumed_run_goes_on():
    """Fault: the flag is parsed and forgotten."""
    run("digits", "--num_train_epochs", "1")
    run("digits", "--num_train_epochs", "2", "--resume_from_checkpoint", "true")
    state = json.loads(Path("runs/digits-cnn-smoot/trainer_state.json").read_text())
    assert state["epoch"] == 2
    assert [entry["epoch"] for entry in state["log_history"] if "loss" in entry] == [1.0, 2.0]


def refused(capsys, *argv):
    """The line that a recipe ends with, which has not trained."""
    with pytest.raises(SystemExit) as stop:
        run("digits", *argv)
    assert stop.value.code == 2
    return one_line(capsys)


def test_a_second_run_in_the_folder_of_a_first_one_is_refused_or_its_own(capsys):
    """Fault: it goes on from the first one's checkpoint, or takes its record's place before it is refused."""
    short = ["--num_train_epochs", "1", "--output_dir", "run"]
    run("digits", *short, "--seed", "0")
    record = Path("run/run.json").read_text()
    capsys.readouterr()
    assert "holds checkpoint-4 of another run (run " in refused(capsys, *short, "--seed", "1")
    resume = ["--resume_from_checkpoint", "true"]
    assert "its seed is 0, not 1" in refused(capsys, *short, "--seed", "1", *resume)
    assert "its method is smoot, not sgt" in refused(capsys, *short, "--seed", "0", "--method", "sgt", *resume)
    # Other data show only once they are there.
    with pytest.raises(SystemExit) as stop:
        train.main(RECIPES["digits"], argv=[*QUICK, *short, "--seed", "0", *resume, "--max_train_samples", "40"])
    assert stop.value.code == 1
    assert "its dataset_fingerprint is v2-" in one_line(capsys)
    assert Path("run/run.json").read_text() == record
    run("digits", *short, "--seed", "1", "--overwrite_output_dir", "true")
    assert json.loads(Path("run/run.json").read_text())["seed"] == 1


def test_what_reads_a_run_reads_that_run(monkeypatch):
    """Fault: the model, or the K, that an earlier run has left in the folder of one that is under way."""
    short = ["--output_dir", "run", "--save_total_limit", "9"]
    run("digits", *short, "--seed", "0", "--num_train_epochs", "2")
    assert checkpoint.saved_model("run") == "run"

    class Killed(BaseException):
        pass

    def kill_at(step):
        class Dying(SmootTrainer):
            def training_step(self, *args, **kwargs):
                if self.state.global_step == step:
                    raise Killed
                return super().training_step(*args, **kwargs)

        monkeypatch.setattr(training_run, "SmootTrainer", Dying)
        with pytest.raises(Killed):
            run("digits", *short, "--seed", "1", "--num_train_epochs", "2", "--overwrite_output_dir", "true")

    images = checkpoint.recorded_images(Path("run"), "train")
    kill_at(1)
    with pytest.raises(ValueError, match="run is the folder of a run that has saved nothing yet"):
        checkpoint.saved_model("run")
    with pytest.raises(ValueError, match="run holds no checkpoint with mask_budget"):
        checkpoint.load_budget(Path("run"), images)
    kill_at(5)
    newest = Path("run/checkpoint-4")
    assert Path("run/checkpoint-8").is_dir()
    assert checkpoint.saved_model("run") == str(newest)
    expected = MaskBudget.load(newest / "mask_budget.safetensors").k
    assert torch.equal(checkpoint.load_budget(Path("run"), images).k, expected)


def test_a_limited_data_set_has_all_classes(tmp_path):
    """Fault: the first rows of an imagefolder are all of one class; grey images reach a model that takes RGB."""
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(20):
                Image.new("L", (8, 8), color=10 * i).save(folder / f"{i}.png")
    args, recipe = parse(
        "", "--dataset", str(tmp_path / "set"), "--convert_rgb", "--use_cpu", "--max_train_samples", "10"
    )
    task = training_run.prepare(args, recipe)
    assert (len(task.train), len(task.test)) == (10, 40)
    assert set(task.train.labels) == {0, 1}
    assert task.train.image_shape == (3, 8, 8)
    assert task.processor.do_convert_rgb
    assert task.model.config.label2id == {"cat": 0, "dog": 1}


def test_a_planted_recipe_trains_and_its_run_is_read_again_with_the_evidence():
    """Fault: a flag that planting loses on the way, masks that reach the model, or a run read plain."""
    train.main(argv=["--recipe", "digits-block", "--num_train_epochs", "1", *QUICK])
    folder = Path("runs/digits-block-cnn-smoot")
    assert json.loads((folder / "run.json").read_text())["settings"]["planted"] == "block"
    test = checkpoint.recorded_images(folder, "test")
    assert test.image_shape == (1, 16, 8)
    assert test.evidence.float().mean() == 0.5
    options = evaluate.make_parser().parse_args([str(folder), "--dataset", "digits", "--planted", "block"])
    assert checkpoint_evaluation.load_test_images(options).fingerprint == test.fingerprint


def test_the_planted_sets_are_those_that_one_data_set_is_enough_for():
    """Fault: a set that the library can plant and a command refuses, or the other way round."""
    for choices in (get_type_hints(flags.RecipeArguments)["planted"], Data.__dataclass_fields__["planted"].type):
        known = [name for name in get_args(choices) if name not in ("pair", "on-photo")]
        assert known == list(evaluate.PLANTED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["torch.distributed.run", "--standalone", "--nproc_per_node=2"], 2),
        (["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"], 1),
    ],
)
def test_the_number_of_processes_is_said_as_it_is(launcher, processes, tmp_path):
    """Fault: a launcher that starts fewer processes than it was asked to, and nobody notices."""
    command = [sys.executable, "-m", *launcher, str(FOLDER / "train_digits.py"), *QUICK, "--num_train_epochs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"100 test images, {processes} process(es) on cpu") == 1


def test_the_table_of_recipes_names_every_file():
    """Fault: a recipe or a benchmark that nobody finds, or a line of the table whose file is gone."""
    table = (FOLDER / "README.md").read_text()
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")}
    named = {name.removeprefix("recipes/") for name in re.findall(r"[\w/]+\.py", table)}
    assert named == files
    assert set(re.findall(r"smoot-hf ([a-z-]+)", table)) == set(SUBCOMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_needs(name):
    """Fault: `uv run` of a recipe that lacks a package, or takes another copy of this one than the one beside it."""
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", FILES[name].read_text())
    stated = tomllib.loads("".join(line[2:] for line in block.group(1).splitlines(keepends=True)))
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    assert stated["requires-python"] == project["requires-python"]
    extras = "recipes,photos" if name == "photos" else "recipes"
    assert stated["dependencies"] == [f"{project['name']}[{extras}]"]
    assert stated["tool"]["uv"]["sources"] == {"smoot-hf": {"path": "..", "editable": True}}
