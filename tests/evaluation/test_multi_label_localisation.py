"""Localisation of models with several labels for an image: each label's own map against its own evidence."""

from types import SimpleNamespace

import pytest
import reference
import torch
from torch import nn

from smoot_hf.evaluation import (
    NothingToMeasureError,
    compare_localisation,
    evaluate_localisation,
    on_shared_images,
)
from smoot_hf.evaluation.results import localisation_row

LABELS, SIDE = 3, 6


class Columns(nn.Module):
    """Output j grows with the pixels of two columns of its own."""

    config = SimpleNamespace(problem_type="multi_label_classification")

    def __init__(self, order=(0, 1, 2), bias=1e4):
        super().__init__()
        self.order, self.bias = order, nn.Parameter(torch.tensor(bias))

    def forward(self, images):
        columns = images[:, 0].sum(dim=1).unflatten(1, (LABELS, 2)).sum(dim=2)
        return columns[:, list(self.order)] + self.bias


def rows(n=8, seed=0, labels=None):
    """Noise images; the evidence of label j is columns 2j and 2j + 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n, LABELS), generator=generator) if labels is None else torch.tensor(labels)
    images = torch.randn(len(labels), 1, SIDE, SIDE, generator=generator)
    evidence = torch.zeros(LABELS, SIDE, SIDE, dtype=torch.bool)
    for label in range(LABELS):
        evidence[label, :, 2 * label : 2 * label + 2] = True
    return [
        {"pixel_values": image, "labels": row.float(), "evidence": evidence}
        for image, row in zip(images, labels, strict=True)
    ]


def ones(*shape):
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_every_label_has_a_map_of_its_own(batch_size):
    """Catches the map of all labels for each of them, and evidence of another label or image."""
    data = rows()
    pairs = [(row, label) for row, one in enumerate(data) for label in range(LABELS) if one["labels"][label]]
    found = evaluate_localisation(Columns(), data, batch_size=batch_size)
    assert list(zip(found.sample_idx.tolist(), found.label_idx.tolist(), strict=True)) == pairs
    assert (found.n, found.accuracy, found.recall) == (len(pairs), 100, 100)
    for name in ("relevance_mass", "rank_accuracy", "pointing_game", "roc_auc"):
        assert found.scores[name].value == 100, name
    # Columns of the next label: every pixel that counts is outside.
    turned = evaluate_localisation(Columns((1, 2, 0)), data, batch_size=batch_size)
    assert turned.relevance_mass.value == 0


def test_scores_equal_the_slow_loop():
    """Catches scores that are paired with another label's mask: the maps are noise of a function of the caller's."""
    data = rows()

    def noise(model, images, target):
        return images[:, 0] * (1 + target.argmax(dim=1))[:, None, None]

    found = evaluate_localisation(Columns(), data, noise, top=(0.1,))
    for place, (row, label) in enumerate(zip(found.sample_idx.tolist(), found.label_idx.tolist(), strict=True)):
        values = (data[row]["pixel_values"][0] * (1 + label)).tolist()
        expected = reference.localisation_scores(values, data[row]["evidence"][label].tolist(), 0.1)
        expected["outside_0.1"] = expected.pop("top_outside")
        for name, value in expected.items():
            assert float(found.scores[name].sample_values[place]) == pytest.approx(100 * value, abs=1e-4), name


def test_labels_that_are_not_predicted_are_left_out():
    """Catches a whole image that is left out for one label, and a recall over the images."""
    data = rows(labels=[[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]])
    data[0]["pixel_values"] = torch.ones(1, SIDE, SIDE)
    data[0]["pixel_values"][..., 2:4] = -1
    found = evaluate_localisation(Columns(bias=0.0), data[:2])
    assert (found.n, found.incorrect, found.recall) == (1, 1, 50)
    assert (found.sample_idx.tolist(), found.label_idx.tolist()) == ([0], [0])
    assert evaluate_localisation(Columns(bias=0.0), data[:2], only_correct=False).n == 2


def test_models_are_compared_on_the_pairs_that_both_get_right():
    """Catches rows that are matched without their labels, of which each image has several."""
    data = rows(labels=[[1, 1, 1], [0, 1, 1]])
    a, b = evaluate_localisation(Columns(), data), evaluate_localisation(Columns(bias=0.0), data)
    assert 0 < b.n < a.n
    shared = on_shared_images(a, b)
    assert [one.n for one in shared] == [b.n, b.n]
    assert shared[0].label_idx.tolist() == b.label_idx.tolist()
    assert shared[0].sample_idx.tolist() == b.sample_idx.tolist()
    assert compare_localisation(a, b, "relevance_mass").difference == 0


def test_a_row_of_results_says_what_it_holds():
    """Catches a recall under the name of an accuracy, and a description that says "images"."""
    row = localisation_row("mine", {0: evaluate_localisation(Columns(), rows())})
    assert row.metrics["recall"].mean == 100
    assert "accuracy" not in row.metrics
    assert "accuracy" not in row.details["by_seed"]["0"]
    assert "each label that is predicted of each image" in row.convention["description"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"evidence": torch.ones(SIDE, SIDE, dtype=torch.bool)},
            r"bool mask \(classes, H, W\) for a multi-label model",
        ),
        (
            {"evidence": torch.ones(2, SIDE, SIDE, dtype=torch.bool)},
            r"\(classes, H, W\) = \(3, 6, 6\).*got \(2, 6, 6\)",
        ),
        ({"evidence": torch.ones(LABELS, 5, SIDE, dtype=torch.bool)}, r"= \(3, 6, 6\) like .*got \(3, 5, 6\)"),
        ({"evidence": torch.ones(LABELS, SIDE, SIDE)}, r"must be a bool mask .*got \['float32 \(3, 6, 6\)'\]"),
        ({"labels": 1}, "got the one value 1"),
        ({"labels": [1, 0]}, r"\(classes, H, W\) = \(2, 6, 6\) like the labels"),
    ],
)
def test_evidence_that_does_not_fit_gets_a_line(change, message):
    """Catches a mask that is broadcast over the labels, and an error from deep inside."""
    with pytest.raises(ValueError, match=message):
        evaluate_localisation(Columns(), [{**row, **change} for row in rows()])


def test_a_mask_for_each_label_is_refused_for_exclusive_classes():
    """Catches evidence of which one label's is read."""
    model = Columns()
    model.config = None
    data = [{**row, "labels": 1} for row in rows()]
    with pytest.raises(ValueError, match=r"must be a bool mask \(H, W\) of one size"):
        evaluate_localisation(model, data)


def test_no_label_at_all_is_nothing_to_measure():
    """Catches an error about an empty list."""
    with pytest.raises(NothingToMeasureError, match="none of the 2 images has a label"):
        evaluate_localisation(Columns(), rows(labels=[[0, 0, 0]] * 2))
