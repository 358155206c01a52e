"""The recipe that draws images of lowest and highest K: from a run's folder to the figure."""

import importlib
import shutil
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from smoot_hf import MaskBudget
from smoot_hf.experiments import budget_by_class, train
from smoot_hf.experiments import checkpoint as checkpoint_module
from smoot_hf.experiments.recipes import RECIPES

FOLDER = Path(__file__).parents[2] / "recipes"
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--max_train_samples", "150", "--max_eval_samples", "20"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of smoot on 150 digits, one with a single K for all of them, and one without K."""
    folder = tmp_path_factory.mktemp("budget")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        own = ["--output_dir", "smoot", "--num_train_epochs", "3"]
        train.main(RECIPES["digits"], argv=[*own, *QUICK])
        shutil.copytree(next(Path("smoot").glob("checkpoint-*")), "bare")
        for method in ("standard", "sgt"):
            Path(method).mkdir()
            shutil.copy("smoot/run.json", method)
        MaskBudget(150, (8, 8), 0.5, 0.5, 0.5).save("sgt/mask_budget.safetensors")
        yield folder


@pytest.fixture
def recipe(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return importlib.import_module("draw_budget")


def a_budget(k):
    budget = MaskBudget(len(k), (10, 10))
    budget._stored.copy_(torch.tensor(k))
    return budget


class Images:
    """What `by_class` asks of a data set."""

    def __init__(self, labels):
        self.label_names = ["cat", "dog", "nobody"]
        self.labels = np.array(labels)


def test_classes_are_sorted_by_median_and_their_images_by_k():
    """Fault: an image in another class's row, a class without images, the wrong end of the order."""
    found = budget_by_class.by_class(a_budget([60, 20, 60, 30, 25, 60]), Images([0, 1, 0, 1, 0, 1]))
    assert [one.label for one in found] == ["dog", "cat"]
    assert found[0].sample_idx.tolist() == [1, 3, 5]
    assert found[1].k.tolist() == [25, 60, 60]
    low, high = budget_by_class.extremes(found[1], 2)
    assert found[1].sample_idx[low].tolist() == [4, 0]
    # Of equal K the first in the data comes first among the highest, and stands at the end.
    assert found[1].sample_idx[high].tolist() == [2, 0]
    assert [len(places) for places in budget_by_class.extremes(found[0], 9)] == [3, 3]


def test_an_image_of_several_labels_stands_with_each_of_them():
    """Fault: places of the flattened labels taken for rows."""
    labels = [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    found = budget_by_class.by_class(a_budget([60, 20, 30]), Images(labels))
    assert {one.label: one.sample_idx.tolist() for one in found} == {"dog": [1], "cat": [1, 0]}


def test_of_too_many_classes_the_two_ends_are_drawn():
    """Fault: classes drawn twice, or the ends left out."""
    assert budget_by_class.chosen(list("abcdefg"), 4) == list("abfg")
    assert budget_by_class.chosen(list("abcdefg"), 3) == list("abg")
    assert budget_by_class.chosen(list("abc"), 1) == ["a"]
    assert budget_by_class.chosen(list("abc"), 3) == list("abc")


@pytest.mark.parametrize(("lowest", "highest"), [(12, 51), (30, 30), (204, 819), (0, 48)])
def test_every_k_falls_into_one_bar_and_bars_are_equally_wide(recipe, lowest, highest):
    """Fault: the highest K outside of the bars, or K on an edge; both make a histogram that lies."""
    edges = recipe.bar_edges(lowest, highest)
    assert edges[0] < lowest
    assert highest < edges[-1]
    assert len(edges) <= 49
    assert len({*np.diff(edges).tolist()}) == 1
    assert np.all(edges % 1 == 0.5)


def test_a_run_becomes_a_figure_and_a_table(runs, recipe, capsys):
    """Fault: K of one image beside another: the images are those of the record, a selection of the data set."""
    path = recipe.main(["smoot", "--count", "2", "--classes", "2", "--output", "drawn/budget.png"])
    shown = plt.imread(path)
    assert shown.shape[1] > 900
    assert shown.std() > 0.1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    checkpoint = next(Path("smoot").glob("checkpoint-*"))
    budget = MaskBudget.load(checkpoint / "mask_budget.safetensors")
    assert sum(int(line[1]) for line in lines) == budget.num_samples == 150
    assert min(int(line[2]) for line in lines) == budget.statistics()["k_min"]
    assert max(int(line[4]) for line in lines) == budget.statistics()["k_max"]
    # One of its checkpoints serves as well.
    images = checkpoint_module.recorded_images(checkpoint, "train")
    assert torch.equal(checkpoint_module.load_budget(checkpoint, images).k, budget.k)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["standard"], "standard holds no checkpoint with mask_budget.safetensors"),
        (["absent", "--dataset", "digits"], "absent holds no checkpoint with"),
        (["sgt"], "one K for all images, 32"),
        (["bare"], "bare has no run.json that says what it was trained on: give --dataset"),
        (["bare", "--dataset", "digits"], "trained on 150 other images, of 8x8 pixels"),
        (["smoot", "--count", "0"], "--count must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_error(runs, recipe, capsys, argv, message):
    """Fault: K drawn beside images that it does not belong to, and a traceback where a line would do."""
    with pytest.raises(SystemExit) as stop:
        recipe.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
