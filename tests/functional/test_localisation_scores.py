"""Localisation: equal to a slow loop over all orders of ties, to values worked out by hand, and to Quantus."""

import importlib.util
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf.functional.localisation import (
    boxes_to_mask,
    evidence_share,
    pointing_game,
    rank_accuracy,
    relevance_mass,
    roc_auc,
    top_outside,
)

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7))
SCORES = [relevance_mass, rank_accuracy, pointing_game, roc_auc, top_outside]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.float8_e5m2, torch.int8]
TOPS = st.sampled_from([0.025, 0.1, 0.29, 0.3, 0.5, 1.0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(size, seed, levels=3):
    """Maps of few levels, so that ties are the rule, and evidence that is now and then empty or the whole image."""
    attribution = torch.randint(-levels, levels + 1, size, generator=generator(seed)).double()
    density = torch.rand(size[0], 1, 1, generator=generator(seed + 1)) * 1.4 - 0.2
    return attribution, torch.rand(size, generator=generator(seed + 2)) < density


def measured(score, attribution, evidence, top):
    return score(attribution, evidence, top) if score is top_outside else score(attribution, evidence)


@given(SIZES, SEEDS, TOPS, st.sampled_from(DTYPES))
def test_every_score_equals_the_slow_loop(size, seed, top, dtype):
    """Catches a tie broken by position, a mask read the wrong way round, a count that is rounded up, rows mixed up."""
    attribution, evidence = draw(size, seed)
    for image in range(size[0]):
        expected = reference.localisation_scores(attribution[image].tolist(), evidence[image].tolist(), top)
        for score in SCORES:
            found = measured(score, attribution.to(dtype), evidence, top)
            assert found.dtype == torch.float64
            assert found[image].item() == pytest.approx(expected[score.__name__], abs=1e-12, nan_ok=True), (
                score.__name__
            )


@pytest.mark.parametrize("count", range(1, 6))
def test_a_tie_is_the_mean_over_all_orders(count):
    """The slow loop shares the places of a tie; catches that this is not what breaking the tie at random gives."""
    positions = [(2, True), (1, True), (1, False), (1, False), (0, True)]
    chosen = []
    for order in itertools.permutations(range(5)):
        ranked = sorted(order, key=lambda place: -positions[place][0])
        chosen.append(sum(positions[place][1] for place in ranked[:count]))
    assert reference.expected_hits(positions, count) == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


@given(SIZES, SEEDS)
def test_chance_levels_are_exact(size, seed):
    """Over all places that the evidence could take the mean is the chance level; catches a level that only looks so."""
    attribution, evidence = draw((1, *size[1:]), seed)
    positions = attribution.numel()
    # The mean over all cyclic shifts of the map is that over all permutations: each value meets each position once.
    shifted = torch.stack([attribution.flatten().roll(shift) for shift in range(positions)]).reshape(-1, *size[1:])
    share = evidence_share(evidence).item()
    same = evidence.expand_as(shifted)
    levels = {relevance_mass: share, pointing_game: share, top_outside: 1 - share}
    if share > 0:
        levels[rank_accuracy] = share
    if 0 < share < 1:
        levels[roc_auc] = 0.5
    for score, level in levels.items():
        assert measured(score, shifted, same, 0.3).mean().item() == pytest.approx(level, abs=1e-9), score.__name__


@given(SIZES, SEEDS, TOPS)
def test_a_flat_map_scores_chance(size, seed, top):
    """Catches a dead model that is praised or blamed for the position at which a sort happens to begin."""
    _, evidence = draw(size, seed)
    share = evidence_share(evidence)
    for value in (0.0, 1.0, -1.0):
        flat = torch.full(size, value)
        for score in (relevance_mass, pointing_game):
            assert score(flat, evidence) == pytest.approx(share, abs=1e-12)
        assert top_outside(flat, evidence, top) == pytest.approx(1 - share, abs=1e-12)
        assert rank_accuracy(flat, evidence)[share > 0] == pytest.approx(share[share > 0], abs=1e-12)
        assert (roc_auc(flat, evidence)[(share > 0) & (share < 1)] == 0.5).all()


def test_values_by_hand():
    """Catches a slow loop that shares a mistake with the fast code."""
    attribution = torch.tensor([[[4.0, 3.0, -9.0, 1.0]]])
    evidence = torch.tensor([[[True, False, True, False]]])
    assert relevance_mass(attribution, evidence).tolist() == [0.5]
    assert rank_accuracy(attribution, evidence).tolist() == [0.5]
    assert pointing_game(attribution, evidence).tolist() == [1.0]
    assert roc_auc(attribution, evidence).tolist() == [0.5]
    assert [top_outside(attribution, evidence, top).item() for top in (0.1, 0.25, 0.5, 1)] == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("score", SCORES)
def test_nan_stays_with_its_image(score):
    """Catches a NaN that is ranked, and one that spoils its neighbours."""
    attribution, evidence = draw((3, 4, 4), 5)
    evidence[:, 0, 0], evidence[:, 0, 1] = True, False
    clean = measured(score, attribution, evidence, 0.3)
    attribution[1, 2, 2] = math.nan
    found = measured(score, attribution, evidence, 0.3)
    assert found.isnan().tolist() == [False, True, False]
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_evidence_that_measures_nothing_is_nan():
    """Catches a hit on an empty mask, and 0/0 passed on as a number."""
    attribution, empty = torch.rand(1, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool)
    assert rank_accuracy(attribution, empty).isnan().all()
    assert roc_auc(attribution, empty).isnan().all()
    assert roc_auc(attribution, ~empty).isnan().all()
    assert pointing_game(attribution, empty).tolist() == [0.0]


@pytest.mark.parametrize(
    ("attribution", "evidence", "message"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(2, 3, 4, dtype=torch.bool), r"must both be \(B, H, W\)"),
        (torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.bool), r"must both be \(B, H, W\)"),
        (torch.zeros(0, 3, 3), torch.zeros(0, 3, 3, dtype=torch.bool), r"must both be \(B, H, W\)"),
        (torch.zeros(2, 3, 3), torch.ones(2, 3, 3), "evidence must be bool"),
    ],
)
def test_bad_input_is_one_clear_error(attribution, evidence, message):
    """Catches broadcasting where an argument is at fault."""
    with pytest.raises(ValueError, match=message):
        relevance_mass(attribution, evidence)


@pytest.mark.parametrize("top", [0, -0.1, 1.1, math.nan])
def test_a_top_that_is_no_share_is_refused(top):
    """Catches a percentage given for a fraction."""
    with pytest.raises(ValueError, match=r"top must be a fraction in \(0, 1\]"):
        top_outside(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool), top)


# --- boxes -----------------------------------------------------------------------------------------------------------


@given(SIZES, SEEDS)
def test_a_box_covers_every_pixel_that_it_touches(size, seed):
    """Catches x for y, and an edge that is rounded the wrong way; overlap is asked of every pixel by itself."""
    count, height, width = size
    corners = torch.rand(count, 4, generator=generator(seed), dtype=torch.float64) * 2 - 0.5
    corners = (4 * corners * torch.tensor([width, height, width, height])).round() / 4  # often whole numbers
    low, high = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
    boxes = torch.cat([low.clamp(max=torch.tensor([width - 0.25, height - 0.25])), high.clamp(min=0.25)], dim=1)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 0.25)
    found = boxes_to_mask(boxes, (height, width))
    for y, x in itertools.product(range(height), range(width)):
        touched = [
            min(x1, x + 1) - max(x0, x) > 0 and min(y1, y + 1) - max(y0, y) > 0 for x0, y0, x1, y1 in boxes.tolist()
        ]
        assert bool(found[y, x]) == any(touched)


def test_boxes_of_coco_and_voc_by_hand():
    """Catches an off-by-one in the conversions that the docstring gives: columns 2 to 4, rows 1 to 2 of 4x6 pixels."""
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:3, 2:5] = True
    x, y, w, h = 2.0, 1.0, 3.0, 2.0  # COCO
    xmin, ymin, xmax, ymax = 3, 2, 5, 3  # Pascal VOC
    for box in ([x, y, x + w, y + h], [xmin - 1, ymin - 1, xmax, ymax]):
        assert torch.equal(boxes_to_mask([box], (4, 6)), expected)
    assert not boxes_to_mask([], (4, 6)).any()


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([1.0, 2.0, 3.0, 4.0], r"boxes must be \(N, 4\).*got shape \(4,\)"),
        ([[0, 0, 2, 2], [3, 2, 2, 3]], r"x0 < x1 and y0 < y1.*got \[3.0, 2.0, 2.0, 3.0\] in row 1"),
        ([[0, 0, math.nan, 2]], "in row 0"),
        ([[6, 0, 8, 2]], "an image of 6 pixels in width and 4 in height"),
    ],
)
def test_what_is_no_box_is_refused(boxes, message):
    """Catches COCO's width taken for an edge, and boxes of an image of another size, wherever that can be seen."""
    with pytest.raises(ValueError, match=message):
        boxes_to_mask(boxes, (4, 6))


# --- an independent implementation -----------------------------------------------------------------------------------

needs_quantus = pytest.mark.skipif(importlib.util.find_spec("quantus") is None, reason="Quantus is not installed")


def of_quantus(metric, attribution, evidence, **settings):
    import quantus

    measure = getattr(quantus, metric)(
        normalise=False, return_aggregate=False, disable_warnings=True, display_progressbar=False, **settings
    )
    batch = len(attribution)
    found = measure(
        model=None,
        x_batch=np.zeros((batch, 1, *attribution.shape[1:]), dtype=np.float32),
        y_batch=np.zeros(batch, dtype=int),
        a_batch=attribution[:, None].numpy(),
        s_batch=evidence[:, None].numpy(),
        channel_first=True,
        device="cpu",
    )
    return np.asarray(found, dtype=float).ravel()


@needs_quantus
@pytest.mark.parametrize("size", [(7, 6, 9), (5, 28, 28)])
@pytest.mark.filterwarnings("ignore")
def test_scores_equal_those_of_quantus(size):
    """Catches a definition of our own: on positive maps without ties Quantus must give the same numbers to 1e-6."""
    attribution = torch.rand(size, generator=generator(1), dtype=torch.float64) + 0.01
    evidence = torch.rand(size, generator=generator(2)) < 0.3
    top = 0.1
    count = math.floor(top * size[1] * size[2])
    pairs = {
        "RelevanceMassAccuracy": relevance_mass(attribution, evidence),
        "RelevanceRankAccuracy": rank_accuracy(attribution, evidence),
        "PointingGame": pointing_game(attribution, evidence),
        "AUC": roc_auc(attribution, evidence),
    }
    for metric, ours in pairs.items():
        assert ours.numpy() == pytest.approx(of_quantus(metric, attribution, evidence), abs=1e-6), metric
    inside = of_quantus("TopKIntersection", attribution, evidence, k=count)
    assert (1 - top_outside(attribution, evidence, top)).numpy() == pytest.approx(inside, abs=1e-6)


@needs_quantus
@pytest.mark.filterwarnings("ignore")
def test_where_quantus_differs():
    """Holds what the documentation says of the two; fails where a later release of Quantus comes round."""
    evidence = torch.tensor([[[True, False], [False, False]]])
    signed = torch.tensor([[[3.0, -1.0], [0.0, 0.0]]])
    assert relevance_mass(signed, evidence).tolist() == [1.0]
    assert of_quantus("RelevanceMassAccuracy", signed, evidence).tolist() == [1.5]
    # Two highest positions, one of them on the evidence: the first in order there, half a hit here.
    tied = torch.tensor([[[3.0, 3.0], [0.0, 0.0]]])
    assert pointing_game(tied, evidence).tolist() == [0.5]
    assert of_quantus("PointingGame", tied, evidence).tolist() == [1.0]
    assert rank_accuracy(tied, evidence).tolist() == [0.5]
    assert of_quantus("RelevanceRankAccuracy", tied, evidence).tolist() == [1.0]
    # A NaN that is stored as a bool.
    empty = torch.zeros_like(evidence)
    assert pointing_game(signed, empty).tolist() == [0.0]
    assert of_quantus("PointingGame", signed, empty).tolist() == [1.0]
