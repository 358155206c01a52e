"""Several labels for an image: the recipe from the command to the report, the maps of the labels, the campaign."""

import importlib
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, EvalPrediction
from transformers.modeling_outputs import ImageClassifierOutput

from smoot_hf.data import InputPipeline, PlantedImages, planted_digits
from smoot_hf.experiments import (
    campaign_images,
    campaign_queue,
    campaign_run,
    campaign_summary,
    compare,
    evaluate,
    label_maps,
    prediction,
    train,
    training_report,
)
from smoot_hf.experiments.recipes import RECIPES

FOLDER = Path(__file__).parents[2] / "recipes"
QUICK = [
    *("--use_cpu", "--disable_tqdm", "true", "--card_samples", "8", "--num_train_epochs", "1"),
    *("--max_train_samples", "96", "--max_eval_samples", "40"),
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs of the recipe, and one of single digits; and the metrics of the first."""
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(FOLDER)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        found = train.main(RECIPES["several_digits"], argv=["--output_dir", "smoot", *QUICK])
        recommended = ["--output_dir", "recommended", "--preset", "recommended", "--seed", "1"]
        train.main(RECIPES["several_digits"], argv=[*recommended, *QUICK])
        train.main(RECIPES["digits"], argv=["--output_dir", "single", *QUICK])
        yield folder, found


def test_a_run_learns_the_labels_and_says_how_many_are_right(runs):
    """Fault: a softmax over labels that do not exclude each other, or the metrics of one label."""
    folder, found = runs
    config = json.loads((folder / "smoot/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert len(config["id2label"]) == 10
    # With three digits of ten in the fullest image, the mean binary cross-entropy of a coin is 0.69.
    assert found["eval_loss"] < 0.6
    assert 0 <= found["eval_accuracy"] <= 1
    assert 0 < found["eval_mean_average_precision"] <= 1
    model = AutoModelForImageClassification.from_pretrained(folder / "smoot", trust_remote_code=True)
    logits, labels = torch.randn(3, 10), torch.eye(10)[:3]
    assert torch.equal(model._loss(logits, labels), F.binary_cross_entropy_with_logits(logits, labels))


def test_the_report_leaves_out_what_is_of_one_class(runs):
    """Fault: a confusion matrix of labels, classes of training images that none of them are, a section that failed."""
    page = (runs[0] / "smoot/report.html").read_text("utf-8")
    headings = ["The run", "Labels", "K over the epochs", "The least and the most masked training images"]
    assert [part.partition("</h2>")[0] for part in page.split("<h2>")[1:]] == headings
    assert "could not be made" not in page
    card = (runs[0] / "smoot/README.md").read_text("utf-8")
    assert "mean average precision" in card.lower()
    assert (runs[0] / "smoot/results.json").is_file()
    assert "with all labels right" in page


def test_a_table_of_labels_counts_each_by_itself():
    """Fault: recall and precision exchanged, or a label that no image has divided by zero."""
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    predicted = np.array([[1, 1, 0], [0, 1, 0], [1, 0, -1], [1, 0, 0]])
    table = training_report.label_table(labels, predicted, ["a", "b", "c"])
    for cells in (["a", "3", "66.7 % (2 of 3)", "66.7 % (2 of 3)"], ["b", "1", "100.0 % (1 of 1)", "50.0 % (1 of 2)"]):
        assert all(cell in table for cell in cells)
    assert ">c<" not in table


def test_an_image_is_right_with_all_of_its_labels():
    """Fault: single labels counted, NaN taken for a label that is absent, or the mean over images of the precision."""
    logits = np.array([[2.0, -1.0], [1.0, 3.0], [-1.0, -2.0], [np.nan, -1.0]], dtype=np.float32)
    labels = np.array([[1, 0], [0, 1], [0, 0], [0, 0]], dtype=np.float32)
    found = prediction.metrics(EvalPrediction(logits, labels))
    assert found == {"accuracy": 0.5, "mean_average_precision": 1.0}


def test_every_label_has_its_map_in_the_figure(runs):
    """Fault: no figure, or one of other images than those of the record."""
    recipe = importlib.import_module("draw_several")
    images = recipe.recorded_images(Path("smoot"), "test")
    maps = recipe.label_maps(recipe.read_checkpoint("smoot", "cpu"), images, 0)
    assert [one.label for one in maps] == [str(label) for label in np.flatnonzero(images.labels[0])]
    for one in maps:
        assert one.saliency.shape == one.evidence.shape == (16, 16)
        assert one.evidence.sum() == 64
    # An image counts as one whose labels all are predicted; a model of one epoch knows none.
    row = int((images.labels.sum(axis=1) == 3).argmax())
    models = {name: recipe.read_checkpoint(name, "cpu") for name in ("smoot", "recommended")}
    recipe.draw(models, images, [row, row], Path("several.png"))
    assert plt.imread("several.png").shape[1] > 900


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["single"], "single was not trained on the planted set several"),
        (["smoot", "--count", "0"], "--count must be at least 1, got 0"),
        (["smoot", "--names", "a", "b"], "a name for each, got 1 and 2"),
        (["smoot", "single"], "one of the models has exclusive classes"),
        (["smoot", "recommended"], "all models predict the labels of no test image with 3 digits"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_error(runs, capsys, argv, message):
    """Fault: a traceback where a line would do, or an empty figure."""
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("draw_several").main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_several_labels_is_evaluated_without_image_classes(runs, capsys):
    """Fault: an accuracy of one class, a table that lacks what was measured, or a model of one label taken for it."""
    model = AutoModelForImageClassification.from_pretrained("smoot", trust_remote_code=True)
    # A model of one epoch predicts no label: of none would the place of the map be measured.
    *_, bias = (value for name, value in model.named_parameters() if name.endswith("bias"))
    bias.data += 3
    shutil.copytree("smoot", "predicting")
    model.save_pretrained("predicting")
    argv = ["predicting", "--dataset", "digits", "--planted", "several", "--max_eval_samples", "60", "--steps", "4"]
    results = evaluate.main([*argv, "--output", "evaluated"])
    curve, *_, located, checked = results.rows
    assert curve.metrics.keys() >= {"mean_average_precision", "subset_accuracy", "deletion_auc"}
    assert "accuracy" not in curve.metrics
    assert "recall" in located.metrics
    assert checked.metrics.keys() == {"random_weights"}
    assert sorted(path.name for path in Path("evaluated").glob("*.png")) == ["curves_gradient.png"]
    assert "Mean average precision" in Path("evaluated/table.md").read_text()
    with pytest.raises(SystemExit):
        evaluate.main(["single", *argv[1:]])
    assert "a model of one label(s) an image, and the images have several" in capsys.readouterr().err


def test_a_comparison_refuses_several_labels_before_it_trains(runs, capsys):
    """Fault: a comparison that takes the labels of an image for its class, after hours of training."""
    with pytest.raises(SystemExit):
        compare.main(["--recipe", "several_digits", "--runs", "smoot", *QUICK])
    assert "several labels are not compared here" in capsys.readouterr().err.splitlines()[-1]


# --- where the maps lie ----------------------------------------------------------------------------------------------


class ReadsBlocks(nn.Module):
    """Each of three logits is the sum of the pixels that `weights` (3, H, W) marks."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.config = SimpleNamespace(problem_type="multi_label_classification", num_labels=len(weights))

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=torch.einsum("bchw,khw->bk", pixel_values, self.weights))


def test_shares_are_those_of_the_blocks():
    """Fault: own and other blocks exchanged, an image without labels that counts, shares that do not add up to 100."""
    evidence = torch.tensor([[[0, 1], [-1, -1]], [[-1, -1], [-1, -1]]]).repeat_interleave(5, 1).repeat_interleave(5, 2)
    pixels = torch.zeros(2, 1, 10, 10, dtype=torch.uint8)
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    images = PlantedImages(pixels, labels, evidence.to(torch.int16))
    weights = torch.zeros(3, 10, 10)
    # Label 0 looks at its own block; label 1 with a quarter of the mass at its own, and else at a null block.
    weights[0, :5, :5] = 1.0
    weights[1, :5, 5:], weights[1, 5:, :5] = 1.0, 3.0
    pipeline = InputPipeline((0.0,), (1.0,))
    found = label_maps.shares_by_part(ReadsBlocks(weights), images, pipeline)
    values = {name: score["value"] for name, score in found.items()}
    top = {"own_0.1": 50.0, "others_0.1": 0.0, "null_0.1": 50.0, "outside_0.1": 50.0}
    assert values == pytest.approx(top | {"own_mass": 62.5, "others_mass": 0.0, "null_mass": 37.5})
    chances = {name: score["chance"] for name, score in found.items() if name.endswith("mass")}
    assert chances == pytest.approx({"own_mass": 25.0, "others_mass": 25.0, "null_mass": 50.0})


def test_a_campaign_trains_and_judges_several_labels(tmp_path, monkeypatch):
    """Fault: a softmax, classes counted by the largest number of a matrix of 0 and 1, measures of one label."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    campaign_images.load_pixels.cache_clear()
    data = {"planted": "several", "train_samples": 64, "test_samples": 40, "gap_samples": 0}
    fast = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 1e-3}
    for method in ("standard", "sgt"):
        found = campaign_run.run(campaign_run.Plan("x", 0, data, {"method": method, **fast}))
        assert 0 < found["mean_average_precision"] <= 100
        scores = found["localisation"]["scores"]
        assert sum(scores[f"{part}_0.1"]["value"] for part in label_maps.PARTS) == pytest.approx(100)
        assert scores["own_mass"]["chance"] == pytest.approx(25)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"data": {"planted": "several"}}, "gap_samples is of images with one label: set it to 0"),
        ({"network": "small"}, "planted='several' needs network='paper'"),
        ({"train": {"method": "standard", "adversarial_epsilon": 0.1}}, "no control but the optimizer"),
    ],
)
def test_a_campaign_refuses_what_is_of_one_label(plan, message):
    """Fault: a softmax cross-entropy of several labels, a network that does not know what its labels are."""
    data = {"planted": "several", "gap_samples": 0}
    with pytest.raises(ValueError, match=message):
        campaign_run.Plan("x", 0, **{"data": data, **plan}).controls()


def test_the_page_says_what_the_committed_runs_say():
    """Fault: numbers that no run has given, or that are of other runs."""
    page = (FOLDER.parent / "docs/several-labels.md").read_text("utf-8")
    results = campaign_queue.read_export(FOLDER / "campaigns/results/several-digits.jsonl")
    runs = campaign_summary.group(results)
    methods = ("standard", "sgt", "recommended")
    assert {name: sorted(runs[name]) for name in methods} == {
        name: list(range(len(results) // len(methods))) for name in methods
    }
    assert f"n = {len(results) // 3}" in page
    parts = [f"{part}_{kind}" for kind in ("0.1", "mass") for part in label_maps.PARTS]
    for measure in (*parts, "mean_average_precision", "accuracy"):
        values = {name: campaign_summary.values_of(runs[name], measure) for name in methods}
        cells = [f"{fmean(found.values()):.1f} ± {stdev(found.values()):.1f}" for found in values.values()]
        assert f"| {' | '.join(cells)} |" in page, measure
        pairs = (("sgt", "standard"), ("recommended", "standard"), ("recommended", "sgt"))
        found = [campaign_summary.paired(values[one], values[other]) for one, other in pairs]
        cells = [f"{p.mean:+.1f} ± {p.std:.1f} ({p.interval[0]:+.1f} to {p.interval[1]:+.1f})" for p in found]
        assert f"| {' | '.join(cells)} |" in page, measure


def test_the_splits_show_different_digits():
    """Fault: a test set made of the digits that were trained on."""
    splits = planted_digits("several")
    blocks = {}
    for split, images in splits.items():
        tiles = images.pixel_values.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 64)
        marked = images.evidence[:, ::8, ::8].reshape(-1) >= 0
        blocks[split] = {tuple(tile) for tile in tiles[marked].tolist()}
    assert not blocks["train"] & blocks["test"]
