"""Deletion and insertion by cells: equal to a slow loop, chance included, and never compared with another cell."""

import math

import pytest
import reference
import torch
from conftest import TinyImages, build
from torch import nn

from smoot_hf import functional as SF
from smoot_hf.evaluation.comparison import compare_faithfulness
from smoot_hf.evaluation.convention import Convention
from smoot_hf.evaluation.faithfulness import evaluate_faithfulness
from smoot_hf.evaluation.image_classes import find_image_classes
from smoot_hf.evaluation.ranked_batches import NothingToMeasureError, random_map
from smoot_hf.evaluation.results import faithfulness_row

HEIGHT, WIDTH, CELL = 7, 5, 2
# Four rows of three cells, narrower at the right and below.
POSITIONS, GRID = 12, (4, 3)


class Weighted(nn.Module):
    """Two classes: a sum of the pixels, each of its own weight and curved, and a constant; in float64."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2, HEIGHT, WIDTH, generator=generator, dtype=torch.float64))

    def forward(self, images):
        total = (self.weight * images + 0.3 * images**2).sum(dim=(1, 2, 3))
        return torch.stack([total, torch.zeros_like(total)], dim=1)


def rows(n=5):
    images = torch.randn(n, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [{"pixel_values": images[i], "labels": i % 2} for i in range(n)]


def probability(model, image, label):
    """In percent, of lists of rows for each channel."""
    weight = model.weight.tolist()
    total = sum(
        weight[c][i][j] * image[c][i][j] + 0.3 * image[c][i][j] ** 2
        for c in range(2)
        for i in range(HEIGHT)
        for j in range(WIDTH)
    )
    p = 1 / (1 + math.exp(-total))
    return 100 * (p if label == 0 else 1 - p)


def slow_curve(model, row, order, counts, restored=False):
    """The probability after each count of cells, in their order, has become zero (or everything but these)."""
    image, label = row["pixel_values"].tolist(), row["labels"]
    values = []
    for count in counts:
        chosen = set(order[:count])
        kept = [
            [
                [value if ((i // CELL, j // CELL) in chosen) == restored else 0.0 for j, value in enumerate(line)]
                for i, line in enumerate(channel)
            ]
            for channel in image
        ]
        values.append(probability(model, kept, label))
    return values


def slow_map(model, row):
    """Magnitude of the gradient of the label's logit; that of the constant class is nothing."""
    if row["labels"] == 1:
        return [[0.0] * WIDTH for _ in range(HEIGHT)]
    x, w = row["pixel_values"].tolist(), model.weight.tolist()
    return [
        [sum(abs(w[c][i][j] + 0.6 * x[c][i][j]) for c in range(2)) / 2 for j in range(WIDTH)] for i in range(HEIGHT)
    ]


def area(counts, values):
    return sum((counts[i] - counts[i - 1]) / POSITIONS * (values[i] + values[i - 1]) / 2 for i in range(1, len(counts)))


def test_all_curves_equal_a_slow_loop():
    """Catches single pixels removed, sums that are means, fractions of pixels, and narrow cells left out or last."""
    model, data = Weighted(), rows()
    convention = Convention(measure="probability", fill="zero")
    found = evaluate_faithfulness(model, data, steps=5, cell=CELL, convention=convention, batch_size=2)
    counts = [math.floor(step * POSITIONS / 5) for step in range(6)]
    assert found.convention.cell == CELL
    assert found.fractions.tolist() == [count / POSITIONS for count in counts]
    # The gradient of the constant class is flat, and ranks nothing.
    assert found.sample_idx.tolist() == [0, 2, 4]
    assert found.flat_skipped == 2
    for place, number in enumerate(found.sample_idx.tolist()):
        row = data[number]
        sums = reference.cell_sum(slow_map(model, row), CELL)
        rising = reference.rank_least_salient(sums)
        noise = SF.counter_uniform(0, 0, torch.tensor([number]), GRID)[0].tolist()
        chance = reference.rank_least_salient([[-value for value in line] for line in noise])
        expected = {
            "deletion": slow_curve(model, row, rising[::-1], counts),
            "insertion": slow_curve(model, row, rising[::-1], counts, restored=True),
            "least_salient_first": slow_curve(model, row, rising, counts),
            "random": slow_curve(model, row, chance, counts),
        }
        for name, values in expected.items():
            measured = float(getattr(found, name).sample_auc[place])
            assert measured == pytest.approx(area(counts, values), rel=1e-9), name


def test_cells_of_one_pixel_change_nothing():
    """Catches a convention of single pixels whose numbers are no longer those of before."""
    model, data = build("vit"), TinyImages(12)
    without, by_one = evaluate_faithfulness(model, data), evaluate_faithfulness(model, data, cell=1)
    assert without.convention == by_one.convention
    assert "cells" not in without.convention.describe()
    for name in ("deletion", "insertion", "least_salient_first", "random"):
        assert torch.equal(getattr(without, name).sample_auc, getattr(by_one, name).sample_auc)
    noise = SF.counter_uniform(3, 0, torch.arange(4), (8, 9))
    assert torch.equal(random_map(3, torch.arange(4), (8, 9)), noise)


def test_every_cell_is_as_likely_to_go_first_by_chance():
    """Catches noise summed over cells, by which the narrow cells at the edge would go last."""
    sums = SF.cell_sum(random_map(0, torch.arange(3000), (5, 5), 2), 2)
    first = sums.flatten(1).argmax(dim=1).bincount(minlength=9) / 3000
    # The standard deviation of a share of one ninth is 0.0057.
    assert (first - 1 / 9).abs().max() < 0.025


def test_the_random_attribution_is_the_random_curve():
    """Catches the control of the image classes, drawn by pixel where that of the curves is drawn by cell."""
    found = evaluate_faithfulness(Weighted(), rows(), "random", cell=CELL, fill="zero")
    assert torch.equal(found.deletion.sample_auc, found.random.sample_auc)


def test_image_classes_mask_cells():
    """Catches a convention that says cells over curves of pixels."""
    model, data = Weighted(), rows()
    found = find_image_classes(model, data, steps=POSITIONS, fill="zero", cell=CELL)
    assert found.convention.cell == CELL
    assert found.fractions.tolist() == pytest.approx([count / POSITIONS for count in range(POSITIONS + 1)])
    order = reference.rank_least_salient(reference.cell_sum(slow_map(model, data[2]), CELL))[::-1]
    expected = slow_curve(model, data[2], order, range(POSITIONS + 1))
    assert (100 * found.probability[1]).tolist() == pytest.approx(expected, rel=1e-9)


def test_unlike_cells_are_not_compared():
    """Catches a difference between single pixels and patches that passes for one between two models."""
    model, data = build("vit"), TinyImages(12)
    found = [evaluate_faithfulness(model, data, cell=cell, curves=()) for cell in (2, 4)]
    with pytest.raises(ValueError, match=r"one convention, got '.*cells of 2x2 pixels.*cells of 4x4 pixels"):
        compare_faithfulness(*found)
    with pytest.raises(ValueError, match="must have one convention, got 2"):
        faithfulness_row("vit", dict(enumerate(found)))
    assert faithfulness_row("vit", {0: found[1]}).convention["cell"] == 4


@pytest.mark.parametrize(
    ("cell", "message"),
    [(0, "cell must be a whole number of at least 1, got 0"), (1.5, "cell must be a whole number .* got 1.5"),
     (6, "cell must be between 1 and 5, .* 7x5 pixels, got 6")],
)  # fmt: skip
def test_impossible_cells_are_one_clear_error(cell, message):
    """Catches a cell that is cut down to the image in silence."""
    with pytest.raises(ValueError, match=message):
        evaluate_faithfulness(Weighted(), rows(), cell=cell)


def test_sums_that_are_all_alike_rank_nothing():
    """Catches images ranked by the place of their cells: the map varies within the cells and not between them."""

    def stripes(model, images, target):
        return (torch.arange(images.shape[3]) % 2).expand(len(images), *images.shape[2:])

    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": 0}]
    assert evaluate_faithfulness(build("vit"), data, stripes).n == 1
    with pytest.raises(NothingToMeasureError, match="one value at all positions"):
        evaluate_faithfulness(build("vit"), data, stripes, cell=4)
