"""Comparison and evaluation: from the command to results.json, tables, figures and a report that stands alone."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from smoot_hf import Convention, evaluate_localisation
from smoot_hf.evaluation.attributions import Method
from smoot_hf.evaluation.convention import PRESETS
from smoot_hf.evaluation.image_classes import ImageClasses
from smoot_hf.evaluation.results import load_results
from smoot_hf.experiments import (
    checkpoint,
    checkpoint_evaluation,
    compare,
    evaluate,
    figures,
    method_comparison,
    run,
    training_run,
)
from smoot_hf.functional.removal import Fill

ROOT = Path(__file__).parents[2]
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--max_train_samples", "200", "--max_eval_samples", "60"]
COMPARE = ["--methods", "sgt", "smoot", "--seeds", "0", "1", "--num_train_epochs", "2", "--output", "out", *QUICK]
QUANTILES = ["min", "lower_quartile", "median", "upper_quartile", "max"]
PNG = b"\x89PNG\r\n\x1a\n"

# Old releases of matplotlib warn of what their own dependencies will drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder in which two methods with two seeds were compared."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        compare.main(COMPARE)
    return folder


@pytest.fixture
def here(compared, monkeypatch):
    """As on the command line, in the folder of the comparison."""
    monkeypatch.chdir(compared)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", compared / "cache")
    return compared


def error_of(capsys, main, argv):
    """The one line that a user sees of an error; anything else fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line or "Error" in line]
    assert len(lines) == 1
    return lines[0]


class Links(HTMLParser):
    """Everything that a page would load, and its text."""

    def __init__(self, page):
        super().__init__()
        self.links, self.tags, self.text = [], set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, data):
        self.text += data + "\n"


# --- the comparison -------------------------------------------------------------------------------------------------


def test_results_keep_to_the_schema_and_hold_every_number(here):
    """Fault: a row lost (method, fill, preset or comparison), a seed averaged away, or K of sgt that is not fixed."""
    results = load_results(here / "out/results.json")
    rows = {
        (row.name, row.convention and (row.convention["fill"], row.convention["score"])): row for row in results.rows
    }
    for fill in ("corner", "mean"):
        for score in ("logit", "log_prob"):
            for method in ("sgt", "smoot"):
                metrics = rows[method, (fill, score)].metrics
                assert {"accuracy", "deletion_auc", "random_auc", "k_min", "k_median", "k_max"} <= metrics.keys()
                assert all(set(found.values) == {0, 1} for found in metrics.values())
            for metric in ("gap", "deletion_auc"):
                row = rows[f"smoot minus sgt: {metric}", (fill, score)]
                ours, other = (rows[name, (fill, score)].metrics[metric].values for name in ("smoot", "sgt"))
                assert row.metrics[f"{metric}_difference"].values == pytest.approx(
                    {seed: ours[seed] - other[seed] for seed in (0, 1)}
                )
    for method in ("sgt", "smoot"):
        judged, own = rows[f"map of {method}, {method} asked", ("corner", "logit")], rows[method, ("corner", "logit")]
        assert judged.metrics["referee_gap"].values == own.metrics["gap"].values
        assert judged.metrics["referee_auc"].values == own.metrics["deletion_auc"].values
    assert rows["map of sgt, smoot asked", ("corner", "logit")].metrics["referee_gap"].n == 2
    fixed = rows["sgt", ("corner", "logit")].metrics
    assert fixed["k_min"].mean == fixed["k_max"].mean == 32
    assert results.settings["seeds"] == [0, 1]
    assert results.settings["training"]["num_train_epochs"] == 2
    assert results.environment["device"].startswith("cpu")


def test_history_of_k_ends_where_the_run_did(here):
    """Fault: histograms of the wrong epoch, or the last epoch missing."""
    rows = {row.name: row for row in load_results(here / "out/results.json").rows}
    for seed in (0, 1):
        history = json.loads((here / f"out/runs/smoot-seed{seed}/k_history.json").read_text())
        assert history["epochs"] == [0, 1, 2]
        assert all(sum(counts) == 200 for counts in history["counts"])
        assert history["counts"][0][32 - history["k_min"]] == 200
        found = rows["smoot: training"].details["k_by_epoch"][str(seed)]
        assert {name: values[0] for name, values in found.items()} == {"epoch": 0, **dict.fromkeys(QUANTILES, 32)}
        ends = {f"k_{name}": found[name][-1] for name in ("min", "max")}
        assert ends == {name: rows["smoot"].metrics[name].values[seed] for name in ends}


def test_statistics_of_a_histogram():
    """Fault: off by one in K or in the rank. By hand: K = 5, 5, 7, 7, 7, 8, 8, 8."""
    history = run.BudgetHistory(64, 4)
    history.add(1.0, [0, 2, 0, 3, 3])
    history.add(1.0, [0, 2, 0, 3, 3, 0])
    assert history.epochs == [1.0]
    found = history.statistics()
    assert [found[name] for name in QUANTILES] == [[5], [5], [7], [8], [8]]


def test_every_figure_is_a_picture(here):
    """Fault: a figure forgotten, or an empty file."""
    for name in ("curves.png", "saliency.png", "k.png"):
        content = (here / "out" / name).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000


def test_report_stands_alone_and_shows_the_tables_numbers(here):
    """Fault: a picture or style that is loaded from elsewhere, or a report whose numbers are not those of the table."""
    page = (here / "out/report.html").read_text()
    found = Links(page)
    assert len(found.links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not found.tags & {"script", "link", "iframe"}
    assert "url(" not in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    numbers = re.findall(r"(\d+\.\d+ ± \d+\.\d+) \(n=2\)", (here / "out/table.md").read_text())
    assert len(numbers) > 40
    assert set(numbers) <= set(re.findall(r"\d+\.\d+ ± \d+\.\d+", found.text))
    assert "Saliency on the evidence" not in found.text
    for text in (
        "SMOOT's gap higher than that of sgt beyond the noise of 2 seeds",
        "AUC lower than that of sgt beyond the noise of 2 seeds",
        "Every map, judged by every method",
        "random order",
        "rounding trunc",
        "transformers",
        "corner fill",
    ):
        assert text in found.text


def test_table_has_a_control_and_two_fills(here):
    """Fault: a number without its control or its convention."""
    table = (here / "out/table.md").read_text()
    assert "AUC, random order" in table
    assert "corner fill" in table
    assert "mean fill" in table
    assert "smoot minus sgt" in table


def test_the_gap_leads_and_the_answer_comes_first(here):
    """Fault: the number that plain robustness moves is read before the one in which it cancels."""
    table = (here / "out/table.md").read_text()
    assert table.startswith("- Is SMOOT's gap higher than that of sgt beyond the noise of 2 seeds? ")
    heads = next(line for line in table.splitlines() if "Accuracy" in line)
    assert heads.index("Gap") < heads.index("AUC")
    assert "map of smoot |" in table


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The folder in which two methods with two seeds were compared on planted evidence."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        compare.main(["--recipe", "digits-block", *COMPARE[: COMPARE.index("--output")], *QUICK])
    return folder / "runs/compare-digits-block"


def test_localisation_is_compared_where_the_evidence_is_known(planted):
    """Fault: masks lost on the way, images that not all methods get right, or a verdict on something else."""
    rows = {row.name: row for row in load_results(planted / "results.json").rows if "outside_0.1" in row.metrics}
    assert set(rows) == {"sgt", "smoot", "random map"}
    for seed in ("0", "1"):
        counts = [rows[method].details["by_seed"][seed]["n"] for method in ("sgt", "smoot")]
        assert counts[0] == counts[1] <= 60
        scores = rows["smoot"].details["by_seed"][seed]["scores"]["outside_0.1"]
        assert scores["chance"] == 50
        assert rows["random map"].metrics["outside_0.1"].values[int(seed)] == scores["control"]
    differences = {row.name: row for row in load_results(planted / "results.json").rows if "minus" in row.name}
    for metric in ("outside_0.1", "relevance_mass"):
        found = differences[f"smoot minus sgt: {metric}"].metrics[f"{metric}_difference"].values
        ours, other = (rows[method].metrics[metric].values for method in ("smoot", "sgt"))
        assert found == pytest.approx({seed: ours[seed] - other[seed] for seed in (0, 1)})
    table = (planted / "table.md").read_text()
    assert table.startswith("- Is SMOOT's share of the top 10 % outside the evidence lower than that of sgt")
    page = Links((planted / "report.html").read_text()).text
    assert "Saliency on the evidence" in page
    assert "digits-block" in page


def test_a_model_that_gets_nothing_right_costs_the_others_nothing(planted, monkeypatch, tmp_path, capsys):
    """Fault: a traceback in place of the report, after hours of training; what was measured of the others is lost."""
    shutil.copytree(planted / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", planted.parents[1] / "cache")
    broken = Path("runs/smoot-seed0/model.safetensors")
    # The outputs are NaN: every image is classified wrongly, and no saliency ranks anything.
    weights = {name: torch.full_like(values, torch.nan) for name, values in load_file(broken).items()}
    save_file(weights, broken, metadata={"format": "pt"})
    capsys.readouterr()
    compare.main(["--recipe", "digits-block", "--runs", *map(str, Path("runs").iterdir()), "--output", "out", *QUICK])
    lines = [line for line in capsys.readouterr().out.splitlines() if " is left out: " in line]
    what = ["smoot, seed 0: faithfulness"] * 4
    what += ["smoot, seed 0: localisation", "seed 0: each method's maps by the others' models"]
    assert [line.partition(" is left out: ")[0] for line in lines] == what
    rows = {row.name: row for row in load_results(Path("out/results.json")).rows}
    for metric in ("outside_0.1_difference", "gap_difference"):
        (found,) = {frozenset(row.metrics[metric].values) for row in rows.values() if metric in row.metrics}
        assert found == {1}
    assert rows["map of smoot, sgt asked"].metrics["referee_gap"].values.keys() == {1}
    assert "Saliency on the evidence" in Links(Path("out/report.html").read_text()).text


def test_a_planted_checkpoint_is_evaluated_with_its_localisation(planted, monkeypatch, tmp_path):
    """Fault: rows that carry evidence and are not judged by it, or numbers that are not those of the library."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    options = ["--dataset", "digits", "--planted", "block", *EVALUATE[2:]]
    argv = [str(planted / "runs/sgt-seed0"), *options, "--attribution", "gradient", "smooth_grad"]
    results = evaluate.main([*argv, "--output", str(tmp_path / "one")])
    test = checkpoint_evaluation.load_test_images(evaluate.make_parser().parse_args([argv[0], *options]))
    model, pipeline = checkpoint.load_checkpoint(str(planted / "runs/sgt-seed0"), test, "cpu")
    for name in ("gradient", "smooth_grad"):
        (row,) = [row for row in results.rows if row.name == name and "outside_0.1" in row.metrics]
        expected = evaluate_localisation(model, test, name, input_pipeline=pipeline)
        assert row.metrics["outside_0.1"].mean == pytest.approx(expected.outside[0.1].value)
        assert row.metrics["pointing_game"].mean == pytest.approx(expected.pointing_game.value)
    low, high = expected.outside[0.1].interval
    assert f"[{low:.2f}, {high:.2f}]" in (tmp_path / "one/table.md").read_text()


def test_seeds_differ_and_methods_of_one_seed_start_alike(here):
    """Fault: initial weights that ignore the seed, which makes the spread over seeds too small."""
    weights = {}
    for method, seed in (("smoot", 0), ("sgt", 0), ("smoot", 1)):
        options = compare.make_comparison_parser().parse_args(["--methods", method, "--seeds", str(seed)])
        ((args, settings),) = method_comparison.plan_runs(options, QUICK, Path("unused"))
        weights[method, seed] = training_run.prepare(args, settings).model.hidden.weight
    assert torch.equal(weights["smoot", 0], weights["sgt", 0])
    assert not torch.equal(weights["smoot", 0], weights["smoot", 1])


def test_second_call_trains_nothing_and_an_unfinished_run_alone_goes_on(here, capsys, monkeypatch):
    """Fault: an hour of training repeated; a run that was cut off taken for a finished one, or started afresh."""
    before = load_results("out/results.json")
    trained = []
    train = method_comparison.train
    monkeypatch.setattr(
        method_comparison,
        "train",
        lambda trainer, args, settings: trained.append(args) or train(trainer, args, settings),
    )
    compare.main(COMPARE)
    assert trained == []
    assert capsys.readouterr().out.count("finished before, not trained again") == 4
    again = load_results("out/results.json")
    assert [row.to_dict() for row in again.rows] == [row.to_dict() for row in before.rows]

    record = Path("out/runs/smoot-seed1/run.json")
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "is_finished": False}))
    compare.main(COMPARE)
    assert [(args.method, args.seed) for args in trained] == [("smoot", 1)]
    assert trained[0].resume_from_checkpoint is True
    assert json.loads(record.read_text())["is_finished"]


def test_finished_runs_of_elsewhere_are_compared(here):
    """Fault: --runs trains, or takes method and seed from nowhere."""
    folders = [f"out/runs/{name}" for name in ("sgt-seed0", "smoot-seed0")]
    report = compare.main(["--runs", *folders, "--output", "other", *QUICK])
    assert report == Path("other/report.html")
    first, other = (load_results(f"{name}/results.json") for name in ("out", "other"))
    assert not Path("other/runs").exists()
    assert other.rows[0].metrics["deletion_auc"].values == {0: first.rows[0].metrics["deletion_auc"].values[0]}
    assert "One seed each" in report.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "smot"], "invalid choice: 'smot'"),
        (["--recipe", "imagenet"], "invalid choice: 'imagenet'"),
        (["--seed", "1"], "--seed is a flag of a single run: use --methods, --seeds and --output"),
        (["--lerning_rate", "1"], "unknown argument --lerning_rate: did you mean learning_rate"),
        (["--runs", "empty"], "empty holds no finished run"),
        (["--runs", "nowhere"], "nowhere holds no finished run"),
        (["--runs", "out/runs/sgt-seed0", "out/runs/sgt-seed0"], "are both sgt with seed 0"),
        (["--runs", "out/runs/sgt-seed0", "--max_train_samples", "100"], "was trained on other images (digits)"),
        (
            ["--output", "out", "--num_train_epochs", "4"],
            "was trained with num_train_epochs=2.0, not 4.0: choose another --output",
        ),
        (["--dataset", "someone/something"], "--dataset takes a local directory"),
    ],
)
def test_bad_input_of_a_comparison_is_one_line(here, capsys, argv, message):
    """Fault: a traceback, or a table of runs that cannot be compared."""
    Path("empty").mkdir(exist_ok=True)
    assert message in error_of(capsys, compare.main, [*QUICK, *argv])


# --- one checkpoint -------------------------------------------------------------------------------------------------


def test_one_checkpoint_is_evaluated(here, capsys):
    """Fault: the recipe's number is not the comparison's for the same model and convention; a figure is missing."""
    argv = ["out/runs/sgt-seed0", "--dataset", "digits", "--max_eval_samples", "60", "--output", "one"]
    evaluate.main([*argv, "--attribution", "gradient", "random", "--device", "cpu"])
    results, compared = load_results("one/results.json"), load_results("out/results.json")
    rows = {(row.name, row.convention["fill"]): row for row in results.rows}
    same = next(r for r in compared.rows if r.name == "sgt" and r.convention == rows["gradient", "mean"].convention)
    for metric in ("accuracy", "deletion_auc", "random_auc"):
        assert rows["gradient", "mean"].metrics[metric].values[0] == pytest.approx(same.metrics[metric].values[0])
    checks = rows["gradient: image classes, random weights", "corner"]
    assert {"class_two", "recovered", "random_weights"} <= checks.metrics.keys()
    ignores_the_weights = rows["random: image classes, random weights", "corner"]
    assert ignores_the_weights.metrics["random_weights"].mean == pytest.approx(1)
    for name in ("curves_gradient", "classes_gradient", "curves_random"):
        assert Path(f"one/{name}.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "AUC, random order" in printed
    assert "Class II, random order" in printed
    random_row = ignores_the_weights.metrics
    assert random_row["class_two"].values == random_row["class_two_random"].values
    assert checks.metrics["class_two_random"].values == random_row["class_two_random"].values
    assert checks.metrics["raised"].mean >= checks.metrics["class_two"].mean
    auc = rows["gradient", "mean"].metrics["deletion_auc"].mean
    low, high = rows["gradient", "mean"].details["by_seed"]["0"]["deletion"]["interval"]
    assert f"| {auc:.2f} [{low:.2f}, {high:.2f}] |" in printed


def test_the_example_of_class_two_is_one():
    """Fault: the image of the largest rise is shown as class II though it rises to chance only.

    The first image rises from 0 to 0.09, below the chance of 0.1; the second, of class II, from 0.15 to 0.2.
    """
    found = ImageClasses(
        fractions=torch.tensor([0.0, 0.5, 1.0]),
        probability=torch.tensor([[0.0, 0.09, 0.05], [0.15, 0.2, 0.1]]),
        is_correct=torch.zeros(2, 3, dtype=torch.bool),
        floor=torch.tensor([0.1, 0.1]),
        margin=0.01,
        sample_idx=torch.tensor([0, 1]),
        nan_skipped=0,
        convention=Convention(),
    )

    class Images:
        label_names = ("zero", "one")

        def __getitem__(self, row):
            return {"pixel_values": torch.zeros(1, 2, 2), "labels": row}

    shown = checkpoint_evaluation.examples(found, Images())
    assert [(name, example.row) for name, example in shown.items()] == [("Class II", 1)]


def test_choices_are_those_of_the_library():
    """Fault: an attribution or a fill that the library has and the command refuses, or the other way round."""
    module = evaluate
    assert tuple(PRESETS) == module.CONVENTIONS
    assert get_args(Method) == module.ATTRIBUTIONS
    assert get_args(Fill) == module.FILLS


def test_bf16_reaches_every_measurement(here, monkeypatch):
    """Fault: a flag that curves, image classes or the check with random weights do not see."""
    module, seen = checkpoint_evaluation, {}

    def watched(name):
        measure = getattr(module, name)

        def watch(model, *args, **options):
            seen[name] = set()
            hook = model.register_forward_hook(lambda _, __, output: seen[name].add(output.logits.dtype))
            found = measure(model, *args, **options)
            hook.remove()
            return found

        return watch

    for name in ("evaluate_faithfulness", "find_image_classes", "randomized_weights_correlation"):
        monkeypatch.setattr(module, name, watched(name))
    argv = ["out/runs/sgt-seed0", "--dataset", "digits", "--max_eval_samples", "20", "--steps", "2", "--bf16"]
    evaluate.main([*argv, "--output", "half", "--device", "cpu"])
    assert load_results("half/results.json").settings["bf16"] is True
    assert len(seen) == 3
    for dtypes in seen.values():
        assert dtypes == {torch.bfloat16}


EVALUATE = ["--dataset", "digits", "--max_eval_samples", "20", "--steps", "2", "--device", "cpu"]
MEASURING = ("evaluate_faithfulness", "find_image_classes", "randomized_weights_correlation")


@pytest.fixture
def measured(monkeypatch):
    """The names of the functions that measured something, in order; `fail_at` ends the process at one of them."""
    module = checkpoint_evaluation
    # Figures take longer than these measurements.
    monkeypatch.setattr(module, "try_to_draw", lambda *_: False)

    class Calls(list):
        fail_at = None

    calls = Calls()

    def watch(name, measure):
        def watched(*args, **options):
            calls.append(name)
            if len(calls) == calls.fail_at:
                raise KeyboardInterrupt
            return measure(*args, **options)

        return watched

    for name in MEASURING:
        monkeypatch.setattr(module, name, watch(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_an_evaluation_that_was_stopped_goes_on_where_it_was(here, measured, tmp_path, stop, capsys):
    """Fault: ten minutes of measuring lost, or a resumed evaluation with other numbers than an undisturbed one."""
    main, argv = evaluate.main, ["out/runs/sgt-seed0", *EVALUATE]
    argv += ["--attribution", "gradient", "smooth_grad", "--output"]
    measured.fail_at = stop
    with pytest.raises(KeyboardInterrupt):
        main([*argv, str(tmp_path / "stopped")])
    assert len(list((tmp_path / "stopped/measurements").iterdir())) == stop - 1
    measured.clear()
    measured.fail_at = None
    main([*argv, str(tmp_path / "stopped")])
    assert len(measured) == 9 - (stop - 1)
    assert capsys.readouterr().out.count("measured before") == stop - 1
    if stop > 1:
        main([*argv, str(tmp_path / "whole")])
        resumed, whole = (load_results(tmp_path / name / "results.json") for name in ("stopped", "whole"))
        assert [row.to_dict() for row in resumed.rows] == [row.to_dict() for row in whole.rows]
        assert (tmp_path / "stopped/table.md").read_text() == (tmp_path / "whole/table.md").read_text()


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_whole_measurements(here, tmp_path):
    """Fault: a part of a file, taken for a measurement."""
    command = [
        sys.executable,
        "-m",
        "smoot_hf.experiments.evaluate",
        "out/runs/sgt-seed0",
        "--output",
        str(tmp_path),
    ]
    slow = ["--attribution", "gradient", "integrated_gradients", "--dataset", "digits", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(here / "cache")}
    process = subprocess.Popen([*command, *slow], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, until = tmp_path / "measurements", time.monotonic() + 120
    while not list(folder.glob("*.pt")) and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    found = list(folder.glob("*.pt"))
    assert found
    for path in found:
        with torch.serialization.safe_globals(checkpoint_evaluation._CLASSES):
            assert {"identity", "measured"} == torch.load(path, weights_only=True).keys()


def other_weights(folder):
    shutil.copytree("out/runs/sgt-seed0", folder / "model")
    weights = load_file(folder / "model/model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, folder / "model/model.safetensors", metadata={"format": "pt"})
    return [str(folder / "model"), *EVALUATE]


def other_processor(folder):
    shutil.copytree("out/runs/sgt-seed0", folder / "model")
    path = folder / "model/preprocessor_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "image_mean": [value + 0.1 for value in content["image_mean"]]}))
    return [str(folder / "model"), *EVALUATE]


OTHERS = {
    "weights": other_weights,
    "processor": other_processor,
    "images": lambda _: ["out/runs/sgt-seed0", *EVALUATE, "--max_eval_samples", "21"],
    "steps": lambda _: ["out/runs/sgt-seed0", *EVALUATE, "--steps", "3"],
    "cell": lambda _: ["out/runs/sgt-seed0", *EVALUATE, "--cell", "2"],
    "convention": lambda _: ["out/runs/sgt-seed0", *EVALUATE, "--convention", "paper"],
    "seed": lambda _: ["out/runs/sgt-seed0", *EVALUATE, "--seed", "1"],
    "precision": lambda _: ["out/runs/sgt-seed0", *EVALUATE, "--bf16"],
    "version": lambda _: ["out/runs/sgt-seed0", *EVALUATE],
}


@pytest.mark.parametrize("other", OTHERS)
def test_measurements_of_anything_else_are_not_taken_for_these(here, measured, tmp_path, monkeypatch, other):
    """Fault: numbers of another model, data set or convention in the table, since their files lie in the folder."""
    main = evaluate.main
    main(["out/runs/sgt-seed0", *EVALUATE, "--output", str(tmp_path / "one")])
    assert measured == ["find_image_classes", *["evaluate_faithfulness"] * 2, "find_image_classes", MEASURING[2]]
    measured.clear()
    argv = OTHERS[other](tmp_path)
    if other == "version":
        module = checkpoint_evaluation
        known = module.describe_environment("cpu")
        monkeypatch.setattr(module, "describe_environment", lambda _: {**known, "torch": "2.11.0"})
    main([*argv, "--output", str(tmp_path / "one")])
    # Random weights have nothing to do with steps or cells.
    assert len(measured) == (4 if other in ("steps", "cell") else 5)
    if other == "cell":
        assert {row.convention["cell"] for row in load_results(tmp_path / "one" / "results.json").rows} == {2}


def test_the_same_checkpoint_in_another_folder_is_the_same(here, measured, tmp_path):
    """Fault: a checkpoint told by its path."""
    main = evaluate.main
    main(["out/runs/sgt-seed0", *EVALUATE, "--output", str(tmp_path / "one")])
    measured.clear()
    shutil.copytree("out/runs/sgt-seed0", tmp_path / "moved")
    main([str(tmp_path / "moved"), *EVALUATE, "--batch_size", "7", "--output", str(tmp_path / "one")])
    assert measured == []


def test_a_damaged_or_crafted_measurement_is_one_line(here, tmp_path, capsys):
    """Fault: a traceback, or code in a file that is run when it is read."""
    main, argv = evaluate.main, ["out/runs/sgt-seed0", *EVALUATE, "--output", str(tmp_path)]
    main(argv)
    files = sorted((tmp_path / "measurements").iterdir())
    path, whole = files[0], files[0].read_bytes()
    path.write_bytes(whole[:-100])
    assert "remove it, to measure that once more" in error_of(capsys, main, argv)
    torch.save({"identity": "", "measured": pathlib.PurePosixPath("x")}, path)
    assert "cannot be read" in error_of(capsys, main, argv)
    path.write_bytes(files[1].read_bytes())
    assert "holds another measurement than its name says" in error_of(capsys, main, argv)


def test_few_images_are_not_paid_with_the_decoding_of_all(here, monkeypatch):
    """Fault: 50,000 training images decoded to look at 24 test images."""
    seen = []
    decode = training_run.decode_images
    monkeypatch.setattr(
        training_run, "decode_images", lambda splits, **how: seen.append(dict(splits)) or decode(splits, **how)
    )
    options = evaluate.make_parser().parse_args(["out/runs/sgt-seed0", *EVALUATE, "--max_eval_samples", "24"])
    images = checkpoint_evaluation.load_test_images(options)
    of_the_run = checkpoint.recorded_images(Path("out/runs/sgt-seed0"), "test")
    assert (len(images), len(of_the_run)) == (24, 360)
    assert [(len(splits["train"]), len(splits["test"])) for splits in seen] == [(1, 24), (1, 360)]


def test_numbers_are_there_when_a_figure_cannot_be_drawn(here, tmp_path, monkeypatch, caplog):
    """Fault: hours of measuring end in a traceback of matplotlib, before anything is written; an old figure stays."""
    (tmp_path / "curves_gradient.png").write_bytes(PNG)

    def fail(*_):
        assert (tmp_path / "results.json").is_file()
        assert (tmp_path / "table.md").is_file()
        raise RuntimeError("no such font")

    monkeypatch.setattr(checkpoint_evaluation, "draw_curves", fail)
    monkeypatch.setattr(checkpoint_evaluation, "examples", lambda *_: {})
    evaluate.main(["out/runs/sgt-seed0", *EVALUATE, "--output", str(tmp_path)])
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.split(": ", 1)[1] for message in warned if "is not drawn" in message] == [
        "no such font",
        "there is no example, neither a right image of class I nor an image of class II",
    ]
    assert not (tmp_path / "curves_gradient.png").exists()


def test_a_report_lacks_the_figure_that_cannot_be_drawn(here, monkeypatch, caplog):
    """Fault: a comparison without a table, since a saliency grid could not be drawn."""

    def fail(*_):
        assert Path("lacking/table.md").is_file()
        raise ValueError("no image of a class")

    monkeypatch.setattr(method_comparison, "draw_saliency_grid", fail)
    folders = [f"out/runs/{name}" for name in ("sgt-seed0", "smoot-seed0")]
    report = compare.main(["--runs", *folders, "--output", "lacking", *QUICK])
    assert len(Links(report.read_text()).links) == 2
    assert "saliency.png is not drawn: no image of a class" in caplog.text


def test_a_grid_of_one_class_is_drawn(tmp_path):
    """Fault: a test set of a single class ends in an error of an array's indices."""
    figures.draw_saliency_grid(torch.rand(1, 8, 8, 1), ["a"], {"sgt": torch.rand(1, 8, 8)}, 0, tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes().startswith(PNG)


def test_a_crafted_run_ends_a_comparison_with_one_line_before_training(here, tmp_path, capsys):
    """Fault: a run of somebody else's whose record or history of K is taken as it is, or fails after the evaluation."""
    for name, message in (("run.json", "method must be one of"), ("k_history.json", "must hold an object")):
        run = tmp_path / name.partition(".")[0] / "smoot-seed0"
        shutil.copytree("out/runs/smoot-seed0", run)
        content = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({**content, "method": "../../outside"}))
        assert message in error_of(capsys, compare.main, ["--runs", str(run), *QUICK])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["out/runs/sgt-seed0", "--fill", "corner"], "--fill must name at least two"),
        (["out/runs/sgt-seed0", "--fill", "corner", "black"], "invalid choice: 'black'"),
        (["out/runs/sgt-seed0", "--steps", "0"], "steps must be at least 1, got 0"),
        (["out/runs/sgt-seed0", "--convert_rgb"], "takes 1 channels, the images have 3"),
        (["out/runs/sgt-seed0", "--attribution", "deep_lift"], "deep_lift cannot explain"),
        (["empty"], "cannot load the checkpoint 'empty'"),
    ],
)
def test_bad_input_of_an_evaluation_is_one_line(here, capsys, argv, message):
    """Fault: a traceback, or a number for what cannot be measured."""
    Path("empty").mkdir(exist_ok=True)
    rest = ["--dataset", "digits", "--max_eval_samples", "60", "--device", "cpu", "--output", "bad"]
    assert message in error_of(capsys, evaluate.main, [*argv, *rest])
