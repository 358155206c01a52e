"""The report at the end of a training: what it shows, that names are text in it, and that it costs no model."""

import json
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest

from smoot_hf.experiments import train, training_report, training_run
from smoot_hf.experiments.recipes import RECIPES

QUICK = [
    *("--use_cpu", "--disable_tqdm", "true", "--num_train_epochs", "1"),
    *("--max_train_samples", "150", "--max_eval_samples", "30", "--card_samples", "10"),
]
ALWAYS = ["The run", "Accuracy by class", "Confusion matrix"]
OF_SMOOT = ["K over the epochs", "The least and the most masked training images"]
OF_SALIENCY = ["Saliency of test images", "Deletion"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")


class Page(HTMLParser):
    """Headings of a page, its pictures, and all its text."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.sources, self.tags, self.text = [], [], set(), ""
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._tag = tag
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self._tag == "h2":
            self.headings.append(data)
        self.text += data
        self._tag = ""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains on digits and gives the page of its report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def trained(*flags):
        train.main(RECIPES["digits"], argv=["--output_dir", "run", *QUICK, *flags])
        return Page(Path("run/report.html").read_text("utf-8"))

    return trained


def test_a_run_of_smoot_has_every_section_and_loads_nothing(run):
    """Fault: a section that failed or is missing, curves by pixels beside masks of cells, a reference to elsewhere."""
    page = run("--mask_cell", "2")
    assert page.headings == [*ALWAYS, *OF_SMOOT, *OF_SALIENCY]
    assert "could not be made" not in page.text
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "cells of 2" in page.text
    # Images that are classified wrongly come from all test images, not from the ten whose saliency is measured.
    right = round(30 * json.loads(Path("run/eval_results.json").read_text())["eval_accuracy"])
    assert page.text.count("Predicted: ") == min(6, right) + min(6, 30 - right) > 10
    # A picture for each of two curves, of the classes' images of lowest and highest K, and two for each explained one.
    assert len(page.sources) > 2 + 2 * 10


def test_standard_training_misses_nothing_but_k(run):
    """Fault: a report that fails without K, or with a section about it; saliency where none was asked for."""
    page = run("--method", "standard", "--card_samples", "0")
    assert page.headings == ALWAYS
    assert "could not be made" not in page.text


def test_a_report_that_fails_costs_no_model(run, monkeypatch):
    """Fault: a trained model without a card because of a picture."""

    def fail(*_, **__):
        raise KeyError("no such font")

    said = []
    monkeypatch.setattr(training_report, "write_training_report", fail)
    monkeypatch.setattr(training_run.logger, "warning", said.append)
    with pytest.raises(FileNotFoundError):
        run("--method", "standard", "--card_samples", "0")
    assert Path("run/README.md").is_file()
    assert [line for line in said if "report" in line] == ["run/report.html is not written: 'no such font'"]


def test_counts_are_those_of_the_predictions():
    """Fault: rows and columns in each other's place, an image without a prediction counted for the last class."""
    counts = training_report.confusion_matrix(np.array([0, 0, 1, 1]), np.array([0, 1, 1, -1]), 2)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1]]
    page = Page(training_report.confusion(counts, ["ant", "bee"]))
    assert "no prediction" in page.text
    accuracy = Page(training_report.accuracy_table(np.array([0, 0, 2]), np.array([0, 1, 2]), ["ant", "bee", "wasp"]))
    # Lowest first; a class without test images has no accuracy.
    assert accuracy.text.index("ant") < accuracy.text.index("wasp")
    assert "50.01 of 2" in accuracy.text
    assert "bee" not in accuracy.text


def test_class_names_are_text():
    """Fault: a class whose name adds a script to the page."""
    names = ["<script>alert(1)</script>", "a & b"]
    counts = training_report.confusion_matrix(np.array([0, 1]), np.array([1, 1]), 2)
    page = Page(training_report.confusion(counts, names))
    assert "script" not in page.tags
    assert page.text.count(names[0]) == 3
    table = Page(training_report.accuracy_table(np.array([0]), np.array([1]), names))
    assert "script" not in table.tags
