"""Image classes I and II: by hand, on a classifier whose probability is a sum of pixels."""

import math

import pytest
import torch
from torch import nn

from smoot_hf.evaluation.convention import Convention
from smoot_hf.evaluation.image_classes import find_image_classes


class PixelSum(nn.Module):
    """Two classes: the sum of all pixels, and zero."""

    def forward(self, images):
        total = images.sum(dim=(1, 2, 3))
        return torch.stack([total, torch.zeros_like(total)], dim=1)


def magnitude(model, images, target):
    return images.abs().mean(dim=1)


class Wary(nn.Module):
    """Three classes: the label's output is the image's sum less 2, so that it is unlikely where nothing is seen."""

    def forward(self, images):
        total = images.sum(dim=(1, 2, 3)) - 2
        return torch.stack([total, torch.zeros_like(total), torch.full_like(total, -9.0)], dim=1)


def rows(*images):
    return [{"pixel_values": torch.tensor(image).reshape(1, 2, 2), "labels": 0} for image in images]


# By falling magnitude, zero fill. First: 2, 1, .5, .25 -> sums 3.75, 1.75, .75, .25, 0: class I.
# Second: -3, 2, 1, .5 -> sums .5, 3.5, 1.5, .5, 0: class II, peak at 1/4.
# Third: -4, -3, -2, 1 -> sums -8, -4, -1, 1, 0: class II, peak at 3/4, wrong at first and right there.
DATA = rows([2.0, 1.0, 0.5, 0.25], [-3.0, 2.0, 1.0, 0.5], [-4.0, -3.0, -2.0, 1.0])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_classes_share_and_peaks_by_hand():
    """Catches the wrong order of masking, another label's probability, and a peak read off the wrong point."""
    found = find_image_classes(PixelSum(), DATA, magnitude, steps=4, fill="zero", batch_size=2)
    assert found.is_class_two.tolist() == [False, True, True]
    assert found.share == pytest.approx(200 / 3)
    assert found.peak.tolist() == [0, 0.25, 0.75]
    assert found.share_of_early_peaks == 50
    assert found.share_recovered == pytest.approx(100 / 3)
    assert found.floor.tolist() == [0.5] * 3
    assert found.share_raised == found.share
    expected = [[3.75, 1.75, 0.75, 0.25, 0], [0.5, 3.5, 1.5, 0.5, 0], [-8, -4, -1, 1, 0]]
    expected = torch.tensor([[sigmoid(total) for total in totals] for totals in expected])
    torch.testing.assert_close(found.probability, expected)
    # On a tie, at the sum 0, the first class counts.
    assert found.is_correct.tolist() == [[True] * 5, [True] * 5, [False, False, False, True, True]]
    stated = found.to_dict()
    assert stated["mean_probability"]["class_one"] == pytest.approx(expected[0].tolist())
    assert stated["n"] == 3


def test_margin_keeps_small_rises_out():
    """Catches a margin that is ignored, or compared with the wrong side."""
    gain = sigmoid(3.5) - sigmoid(0.5)
    for margin, two in ((gain - 1e-3, [False, True, False]), (gain + 1e-3, [False, False, False])):
        found = find_image_classes(PixelSum(), DATA, magnitude, steps=4, fill="zero", margin=margin)
        assert found.is_class_two.tolist() == two
    alone = find_image_classes(PixelSum(), DATA[:1], magnitude, steps=4, fill="zero")
    assert alone.share == 0
    assert alone.share_of_early_peaks is None
    assert alone.to_dict()["mean_probability"]["class_two"] is None


def test_a_rise_to_chance_is_no_help():
    """Catches images of class II whose label is merely as likely as any other once nothing of them is left.

    -4, -3, -2, -1 -> sums -10, -6, -3, -1, 0: the probability rises all the way, from 0 to 1/2, that of an empty image.
    """
    found = find_image_classes(PixelSum(), rows([-4.0, -3.0, -2.0, -1.0]), magnitude, steps=4, fill="zero")
    assert found.floor.tolist() == [0.5]
    assert (found.share, found.share_raised, found.share_recovered) == (0, 100, 0)
    assert found.to_dict()["share_raised"] == 100
    assert found.share_of_early_peaks is None


def test_the_floor_is_that_of_the_fill_or_chance_whichever_is_higher():
    """Catches a floor that is read off a curve which ends before nothing is left, or one below chance.

    By the fill alone, sum 0, the label has the output -2 beside 0 and -9: far below the chance of a third. The first
    image, -3, 1, 0.5, 0, has the outputs -3.5, -0.5, -1.5 at 0, 1/4 and 1/2: up to 0.38, above chance and class II. The
    second, -3, .6, .2, 0, ends its rise at -1.2: 0.23, below chance. Nothing is masked beyond a half.
    """
    convention = Convention(fill="zero", fractions=(0.0, 0.25, 0.5))
    data = rows([-3.0, 1.0, 0.5, 0.0], [-3.0, 0.6, 0.2, 0.0])
    found = find_image_classes(Wary(), data, magnitude, convention=convention)
    assert found.floor.tolist() == pytest.approx([1 / 3] * 2)
    assert found.is_class_two.tolist() == [True, False]
    assert found.is_raised.tolist() == [True, True]
    assert found.peak.tolist() == [0.25, 0.25]
    # The fill of an image of twos is likely to be the label: with nothing of the image left it is so all the same.
    corner = find_image_classes(PixelSum(), rows([2.0, -9.0, -1.0, 0.5]), magnitude, convention=Convention())
    assert corner.floor.tolist() == pytest.approx([sigmoid(8)])
    assert (corner.share, corner.share_raised) == (0, 100)


def test_nan_and_bad_arguments():
    """Catches NaN maps that get a class, a margin outside its range, and a curve that does not start unmasked."""

    def broken(model, images, target):
        values = magnitude(model, images, target)
        values[1] = math.nan
        return values

    found = find_image_classes(PixelSum(), DATA, broken, steps=4, fill="zero")
    assert found.nan_skipped == 1
    assert found.sample_idx.tolist() == [0, 2]
    with pytest.raises(ValueError, match="NaN in every one"):
        find_image_classes(PixelSum(), DATA, lambda model, images, target: images[:, 0] * math.nan)
    with pytest.raises(ValueError, match=r"attribution must have shape \(3, 2, 2\)"):
        find_image_classes(PixelSum(), DATA, lambda model, images, target: images)
    with pytest.raises(ValueError, match="margin must lie in"):
        find_image_classes(PixelSum(), DATA, margin=1.0)
    with pytest.raises(ValueError, match="dataset must hold"):
        find_image_classes(PixelSum(), [])
    with pytest.raises(ValueError, match="fractions must start at 0"):
        find_image_classes(PixelSum(), DATA, convention=Convention(fractions=(0.1, 0.5)))


def test_model_is_left_as_found():
    """Catches eval mode left on."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, 2)).train()
    find_image_classes(model, DATA)
    assert all(module.training for module in model.modules())


class Standardised(PixelSum):
    """The sum of pixels divided by their spread: NaN for an image of one colour."""

    def __init__(self, first=0):
        super().__init__()
        self.first = first

    def forward(self, images):
        logits = super().forward((images - images.mean()) / images.std(dim=(1, 2, 3), keepdim=True) + images)
        return logits if self.first == 0 else logits.flip(1)


def test_nan_predictions_hurt_whatever_the_classes_are_called():
    """Catches images made right by NaN, whose argmax is class 0, and a share of class II that one NaN makes zero.

    With nothing left the fill is zero everywhere, and the outputs are NaN: at the last of five points, in every image.
    """
    found = []
    for first in (0, 1):
        data = [{**row, "labels": first} for row in DATA]
        found.append(find_image_classes(Standardised(first), data, magnitude, steps=4, fill="zero", batch_size=1))
    for one in found:
        assert one.nan_predictions == 3
        assert not bool(one.is_correct[:, -1].any())
        assert one.probability[:, -1].tolist() == [0.0] * 3
        assert one.floor.tolist() == [0.5] * 3
        assert bool(one.gain.isfinite().all())
        stated = one.to_dict()
        assert (stated["nan_predictions"], stated["predictions"]) == (3, 15)
    assert torch.equal(found[0].is_class_two, found[1].is_class_two)
    assert bool(found[0].is_class_two.any())
    torch.testing.assert_close(found[0].probability, found[1].probability)
