"""Deletion and insertion curves: equal to a slow loop, to values worked out by hand and to an independent metric."""

import contextlib
import importlib.util
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf.functional import least_salient_mask
from smoot_hf.functional.perturbation import (
    area_under_curve,
    deletion_curve,
    has_prediction,
    insertion_curve,
    measure_outputs,
    perturbed_outputs,
)
from smoot_hf.functional.removal import (
    blur_fill,
    even_fractions,
    removal_fill,
    removal_ranks,
    removed_counts,
)

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 7))
FILLS = ["corner", "mean", "zero", "uniform", "blur"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def pixel_sum(images):
    """Two classes: the sum of all pixels, and zero."""
    total = images.sum(dim=(1, 2, 3))
    return torch.stack([total, torch.zeros_like(total)], dim=1)


def linear_score(shape, classes, seed):
    weight = torch.randn(math.prod(shape), classes, generator=generator(seed), dtype=torch.float64)
    return lambda images: images.double().flatten(1) @ weight


def draw(size, seed, levels=3):
    """Images and an attribution with few levels, so that ties are the rule."""
    batch, channels, height, width = size
    images = torch.randn(batch, channels, height, width, generator=generator(seed), dtype=torch.float64)
    attribution = torch.randint(-levels, levels + 1, (batch, height, width), generator=generator(seed + 1)).double()
    return images, attribution


# --- the slow definition ---------------------------------------------------------------------------------------------


def slow_order(attribution, order):
    """Positions (row, column), the first to be removed first: NaN last, ties row by row."""
    sign = -1 if order == "most_salient_first" else 1
    positions = [(r, c) for r in range(len(attribution)) for c in range(len(attribution[0]))]
    return sorted(positions, key=lambda rc: (math.isnan(attribution[rc[0]][rc[1]]), sign * attribution[rc[0]][rc[1]]))


def slow_curve(score, image, attribution, target, fractions, fill, order, measure, insert=False):
    """One sample, one step and one pixel at a time, in float64."""
    order = slow_order(attribution.tolist(), order)
    values = []
    for fraction in fractions:
        chosen = order[: math.floor(round(fraction * len(order), 9))]
        perturbed = fill.clone() if insert else image.clone()
        for row, column in chosen:
            perturbed[:, row, column] = image[:, row, column] if insert else fill[:, row, column]
        outputs = score(perturbed[None])[0].tolist()
        if measure == "accuracy":
            values.append(float(outputs.index(max(outputs)) == target))
        elif measure == "probability":
            values.append(math.exp(outputs[target]) / sum(math.exp(value) for value in outputs))
        else:
            values.append(outputs[target])
    return values


def slow_area(fractions, values):
    return sum((fractions[i] - fractions[i - 1]) * (values[i] + values[i - 1]) / 2 for i in range(1, len(values)))


@given(
    SIZES,
    SEEDS,
    st.sampled_from(["most_salient_first", "least_salient_first", "insertion"]),
    st.sampled_from(["accuracy", "probability", "output"]),
    st.sampled_from(["corner", "mean", "zero", "uniform"]),
    st.integers(1, 5),
    st.integers(1, 30),
)
def test_curves_equal_the_slow_loop(size, seed, order, measure, fill_name, steps, chunk_size):
    """Catches: order turned round, ties split, off-by-one counts, samples or steps swapped in the flat batch."""
    images, attribution = draw(size, seed)
    score = linear_score(size[1:], 3, seed + 2)
    target = torch.randint(0, 3, (size[0],), generator=generator(seed + 3))
    noise = torch.rand(images.shape, generator=generator(seed + 4), dtype=torch.float64)
    fill = removal_fill(images, fill_name, noise)
    fractions = even_fractions(steps)
    insert = order == "insertion"
    arguments = (score, images, attribution, target, fractions, fill)
    if insert:
        curves = insertion_curve(*arguments, measure=measure, chunk_size=chunk_size)
    else:
        curves = deletion_curve(*arguments, order=order, measure=measure, chunk_size=chunk_size)
    assert curves.shape == (size[0], steps + 1)
    for b in range(size[0]):
        slow = slow_curve(
            score,
            images[b],
            attribution[b],
            int(target[b]),
            fractions,
            fill.expand_as(images)[b],
            "most_salient_first" if insert else order,
            measure,
            insert,
        )
        torch.testing.assert_close(curves[b], torch.tensor(slow, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(SIZES, SEEDS, st.integers(1, 4), st.booleans())
def test_ranks_are_a_stable_permutation_with_nan_last(size, seed, levels, most_first):
    """Catches an unstable sort, ties reversed by `descending`, and NaN ranked as the most salient."""
    _, attribution = draw(size, seed, levels)
    attribution[torch.rand(attribution.shape, generator=generator(seed)) < 0.2] = math.nan
    order = "most_salient_first" if most_first else "least_salient_first"
    ranks = removal_ranks(attribution, order)
    for b in range(size[0]):
        for turn, (row, column) in enumerate(slow_order(attribution[b].tolist(), order)):
            assert ranks[b, row, column] == turn


# float8_e5m2 and float8_e4m3fn hold so few values that ties are the rule; the others get their extreme values.
REAL_DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


@st.composite
def maps_of_any_dtype(draw):
    """An attribution (1, H, W) of a real type whose values, from a small pool with the extremes, tie often."""
    dtype = draw(st.sampled_from(REAL_DTYPES))
    if dtype == torch.bool:
        pool = [False, True]
    elif dtype.is_floating_point:
        low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
        pool = [low, -1.5, -0.0, 0.0, 0.125, 2.0, high, math.nan]
    else:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        # Neighbours at the ends: as float32, or float64 for 64 bits, they would be one.
        pool = [low, low + 1, 0, 1, 2, high // 2, high // 2 + 1, high - 1, high]
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = st.lists(st.sampled_from(pool), min_size=width, max_size=width)
    values = draw(st.lists(rows, min_size=height, max_size=height))
    if dtype.is_floating_point:
        return torch.tensor([values], dtype=torch.float64).to(dtype)
    return torch.tensor([values], dtype=dtype)


@given(maps_of_any_dtype(), st.integers(0, 16))
def test_attributions_of_every_real_dtype_rank_as_their_values(attribution, k):
    """Fault: -attribution of unsigned integers wraps, so that 0 is removed first; booleans have no minus at all."""
    values = attribution[0].tolist()
    for order in ("most_salient_first", "least_salient_first"):
        ranks = removal_ranks(attribution, order)
        for turn, (row, column) in enumerate(slow_order(values, order)):
            assert ranks[0, row, column] == turn
    mask = least_salient_mask(attribution, torch.tensor([k]))
    assert mask[0, 0].tolist() == reference.least_salient_mask(values, k)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_curves_of_an_attribution_of_every_real_dtype(dtype):
    """Fault: a heat map or a segmentation as it comes gives other curves than the same numbers in float64."""
    images = torch.randn(3, 2, 4, 4, generator=generator(0))
    numbers = torch.randint(0, 2 if dtype == torch.bool else 5, (3, 4, 4), generator=generator(1))
    fixed = (torch.tensor([0, 1, 0]), even_fractions(4), torch.zeros(1))
    for curve in (deletion_curve, insertion_curve):
        found = curve(pixel_sum, images, numbers.to(dtype), *fixed, measure="output")
        assert torch.equal(found, curve(pixel_sum, images, numbers.double(), *fixed, measure="output"))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_attributions_are_refused(dtype):
    """Fault: an error from deep inside torch, where the attribution is of a type that has no order."""
    attribution = torch.zeros(1, 2, 2, dtype=dtype)
    fixed = (torch.tensor([0]), [0.0, 1.0], torch.zeros(1))
    for curve in (deletion_curve, insertion_curve):
        with pytest.raises(ValueError, match=f"attribution must hold real numbers, got {dtype}"):
            curve(pixel_sum, torch.zeros(1, 1, 2, 2), attribution, *fixed)
    with pytest.raises(ValueError, match="only real numbers can be ranked"):
        removal_ranks(attribution)
    with pytest.raises(ValueError, match="only real numbers can be ranked"):
        least_salient_mask(attribution, torch.tensor([1]))


# --- by hand -------------------------------------------------------------------------------------------------------


def test_pixel_sum_by_hand():
    """Catches any error of order, step, end point or area at once: every number is worked out on paper.

    Pixels 1, 2, 3, 4 ranked by their value; removed by zero. Deletion leaves 10, 6, 3, 1, 0; insertion 0, 4, 7, 9, 10;
    least salient first leaves 10, 9, 7, 4, 0. Areas 0.25 * (sum - half the end points).
    """
    images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    target = torch.tensor([0])
    fractions = even_fractions(4)
    fill = removal_fill(images, "zero")
    arguments = (pixel_sum, images, images[:, 0], target, fractions, fill)
    deletion = deletion_curve(*arguments, measure="output")
    insertion = insertion_curve(*arguments, measure="output")
    least = deletion_curve(*arguments, measure="output", order="least_salient_first")
    assert deletion.tolist() == [[10, 6, 3, 1, 0]]
    assert insertion.tolist() == [[0, 4, 7, 9, 10]]
    assert least.tolist() == [[10, 9, 7, 4, 0]]
    x = torch.tensor(fractions)
    for curve, area in ((deletion, 3.75), (insertion, 6.25), (least, 6.25)):
        assert area_under_curve(x, curve).item() == pytest.approx(area, abs=1e-6)
    # Class 0 (the sum) wins while the sum is above zero, and on a tie as the first: always correct.
    assert deletion_curve(*arguments, measure="accuracy").tolist() == [[1, 1, 1, 1, 1]]
    other = (pixel_sum, images, images[:, 0], torch.tensor([1]), fractions, fill)
    assert deletion_curve(*other, measure="accuracy").tolist() == [[0, 0, 0, 0, 0]]
    probability = deletion_curve(*arguments, measure="probability")[0]
    by_hand = [1 / (1 + math.exp(-total)) for total in (10, 6, 3, 1, 0)]
    torch.testing.assert_close(probability, torch.tensor(by_hand), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("fill", "value"), [("corner", [5.0, 1.0]), ("mean", [2.0, 2.5]), ("zero", [0.0, 0.0])])
def test_constant_fills_by_hand(fill, value):
    """Catches a fill taken over the batch or over all channels instead of per image and channel."""
    images = torch.tensor([[[[5.0, 1.0], [1.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]]], [[[9.0] * 2] * 2, [[7.0] * 2] * 2]])
    assert removal_fill(images, fill)[0, :, 0, 0].tolist() == value


def test_uniform_fill_spans_each_images_own_range():
    """Catches a range taken over the batch: the second image is constant and must stay so."""
    images = torch.stack([torch.arange(16.0).reshape(1, 4, 4), torch.full((1, 4, 4), 7.0)])
    noise = torch.linspace(0, 1, 32).reshape(2, 1, 4, 4)
    fill = removal_fill(images, "uniform", noise)
    torch.testing.assert_close(fill[0], 15 * noise[0])
    assert fill[1].eq(7).all()


def test_blur_keeps_constants_and_equals_the_separable_sum():
    """Catches a kernel that does not sum to one, dark edges (zero padding), and rows and columns swapped."""
    constant = torch.full((2, 3, 5, 9), 4.0)
    torch.testing.assert_close(blur_fill(constant, 1.5), constant)
    point = torch.zeros(1, 1, 9, 13)
    point[0, 0, 4, 6] = 1.0
    blurred = blur_fill(point, 0.8)[0, 0]
    row = [math.exp(-0.5 * (offset / 0.8) ** 2) for offset in range(-3, 4)]
    row = torch.tensor(row) / sum(row)
    torch.testing.assert_close(blurred[1:8, 3:10], row[:, None] * row[None, :])
    assert blurred.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_counts_are_exact_floors():
    """Catches float products that fall short of the integer (0.29 * 100) and rounding instead of floor."""
    assert removed_counts([0.0, 0.29, 0.57, 1.0], 100) == [0, 29, 57, 100]
    assert removed_counts(even_fractions(9, 0.9), 784) == [0, 78, 156, 235, 313, 392, 470, 548, 627, 705]
    assert removed_counts([k / 784 for k in range(785)], 784) == list(range(785))
    assert removed_counts([k / 50176 for k in range(0, 50177, 7)], 50176) == list(range(0, 50177, 7))


def test_paper_fractions():
    """Catches a last step that is lost: 0 to 90 % by 10 are ten points."""
    assert even_fractions(9, 0.9) == pytest.approx([0.1 * i for i in range(10)])
    assert even_fractions(10) == pytest.approx([0.1 * i for i in range(11)])
    assert even_fractions(3, 0.7, 0.1) == (0.1, 0.3, 0.5, 0.7)


@given(st.integers(2, 9), SEEDS)
def test_area_equals_the_slow_trapezoid(points, seed):
    """Catches an area that takes the steps to be equal: true fractions are not."""
    fractions = torch.rand(points, generator=generator(seed), dtype=torch.float64).cumsum(0)
    values = torch.randn(3, points, generator=generator(seed + 1), dtype=torch.float64)
    area = area_under_curve(fractions, values)
    for b in range(3):
        assert area[b].item() == pytest.approx(slow_area(fractions.tolist(), values[b].tolist()), abs=1e-12)


# --- an independent implementation ---------------------------------------------------------------------------------


class GivenAttribution:
    """An extractor in torch-cam's protocol that hands out a given map."""

    def __init__(self, model, attribution):
        self.model, self.attribution = model, attribution

    def __call__(self, class_idx=None, scores=None, normalized=True, **kwargs):
        return [self.attribution]

    def fuse_cams(self, cams):
        return cams[0]

    def _hooks_off(self):
        return contextlib.nullcontext()


@pytest.mark.skipif(importlib.util.find_spec("torchcam") is None, reason="torch-cam is not installed")
@pytest.mark.parametrize(("side", "steps"), [(8, 4), (28, 8), (28, 10)])
def test_area_equals_torchcams(side, steps):
    """Catches a definition of our own: same map, steps, fill and softmax must give torch-cam's numbers to 1e-5."""
    from torchcam.metrics import DeletionInsertionMetric

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(5))
    images = torch.randn(6, 3, side, side, generator=generator(1))
    model.eval()(images)
    attribution = torch.randint(0, 6, (6, side, side), generator=generator(2)).float()
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    metric = DeletionInsertionMetric(
        GivenAttribution(model, attribution), lambda logits: logits.softmax(-1), steps=steps, batch_size=16
    )
    metric.update(images, target.tolist())
    positions = side * side
    # torch-cam rounds the step up to whole positions; where steps divides H*W its fractions are the even ones.
    counts = [*range(0, positions, math.ceil(positions / steps)), positions]
    fractions = [count / positions for count in counts]
    arguments = (model, images, attribution, target, fractions, removal_fill(images, "zero"))
    deletion = area_under_curve(torch.tensor(fractions), deletion_curve(*arguments, measure="probability"))
    insertion = area_under_curve(torch.tensor(fractions), insertion_curve(*arguments, measure="probability"))
    assert deletion.mean().item() == pytest.approx(metric.summary()["deletion_auc"], abs=1e-5)
    assert insertion.mean().item() == pytest.approx(metric.summary()["insertion_auc"], abs=1e-5)


# --- cost, chunks, dtypes -----------------------------------------------------------------------------------------


def test_forward_passes_are_the_floor():
    """Catches a clean pass per step, or a chunk size that is not kept."""
    sizes = []

    def counting(images):
        sizes.append(len(images))
        return pixel_sum(images)

    images, attribution = draw((5, 1, 4, 4), 0)
    target = torch.zeros(5, dtype=torch.long)
    fill = removal_fill(images, "zero")
    deletion_curve(counting, images, attribution, target, even_fractions(4), fill, chunk_size=8)
    assert sizes == [8, 8, 8, 1]
    sizes.clear()
    known = {0: pixel_sum(images), 16: pixel_sum(torch.zeros_like(images))}
    deletion_curve(counting, images, attribution, target, even_fractions(4), fill, chunk_size=8, known=known)
    insertion_curve(counting, images, attribution, target, even_fractions(4), fill, chunk_size=8, known=known)
    assert sizes == [8, 7] * 2


def test_known_outputs_change_nothing():
    """Catches the clean image and the fill put at each other's end."""
    images, attribution = draw((3, 2, 4, 4), 5)
    score = linear_score((2, 4, 4), 3, 6)
    fill = removal_fill(images, "mean")
    known = {0: score(images), 16: score(fill.expand_as(images))}
    arguments = (score, images, attribution, torch.tensor([0, 1, 2]), even_fractions(5), fill)
    for curve in (deletion_curve, insertion_curve):
        plain = curve(*arguments, measure="output")
        torch.testing.assert_close(curve(*arguments, measure="output", known=known), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fill", FILLS)
def test_dtype_reaches_the_model_and_values_are_at_least_float32(dtype, fill):
    """Catches a fill or mask that promotes half-precision images before the model sees them."""
    seen = set()

    def score(images):
        seen.add(images.dtype)
        return pixel_sum(images)

    images = torch.randn(2, 3, 8, 8, generator=generator(0)).to(dtype)
    made = removal_fill(images, fill, torch.rand(images.shape, generator=generator(1)))
    curve = deletion_curve(score, images, images[:, 0], torch.tensor([0, 1]), even_fractions(2), made)
    assert seen == {dtype}
    assert curve.dtype == torch.promote_types(dtype, torch.float32)


def test_inputs_are_left_as_found():
    """Catches masking in place, and a graph kept through the perturbed passes."""
    images, attribution = draw((2, 1, 4, 4), 1)
    images.requires_grad_(True)
    before = images.detach().clone(), attribution.clone()
    curve = deletion_curve(
        pixel_sum, images, attribution, torch.tensor([0, 0]), even_fractions(3), removal_fill(images, "corner")
    )
    assert not curve.requires_grad
    assert torch.equal(images, before[0])
    assert torch.equal(attribution, before[1])


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attribution": torch.zeros(2, 3, 4)}, r"attribution must have shape \(2, 4, 4\)"),
        ({"attribution": torch.zeros(2, 1, 4, 4)}, "attribution must have shape"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "target must have shape"),
        ({"fractions": [0.0]}, "fractions must hold at least 2"),
        ({"fractions": [0.0, 1.5]}, r"fractions must lie in \[0, 1\]"),
        ({"fractions": [0.0, math.nan]}, r"fractions must lie in \[0, 1\]"),
        ({"fractions": [0.5, 0.5]}, "fractions must rise"),
        ({"order": "descending"}, "order must be one of"),
        ({"measure": "loss"}, "measure must be one of"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"score": lambda images: images.sum((1, 2, 3), keepdim=True)[:, :, 0, 0]}, "at least 2 classes"),
        ({"score": lambda images: images.sum((1, 2, 3))}, "score must return"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    """Catches a wrong number, or an error from deep inside torch, where an argument is at fault."""
    arguments = {
        "score": pixel_sum,
        "images": torch.zeros(2, 1, 4, 4),
        "attribution": torch.zeros(2, 4, 4),
        "target": torch.zeros(2, dtype=torch.long),
        "fractions": even_fractions(2),
        "fill": torch.zeros(1),
    }
    with pytest.raises(ValueError, match=message):
        deletion_curve(**{**arguments, **change})


def test_bad_arguments_of_the_parts():
    """Catches silent defaults: steps 0, a last fraction of 0, noise left out, unmatched curves, no image."""
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        even_fractions(0)
    for last, first in ((0.0, 0.0), (1.5, 0.0), (0.5, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match=r"last must be in \(first, 1\]"):
            even_fractions(3, last, first)
    with pytest.raises(ValueError, match="needs noise"):
        removal_fill(torch.zeros(1, 1, 2, 2), "uniform")
    with pytest.raises(ValueError, match="fill must be one of"):
        removal_fill(torch.zeros(1, 1, 2, 2), "black")
    with pytest.raises(ValueError, match="fractions must be"):
        area_under_curve(torch.tensor([0.0, 1.0]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least one image"):
        deletion_curve(
            pixel_sum, torch.zeros(0, 1, 4, 4), torch.zeros(0, 4, 4), torch.zeros(0).long(), [0.0, 1.0], torch.zeros(1)
        )


def test_core_keeps_samples_and_steps_apart():
    """Catches (S, B) read as (B, S): sample and step are told apart by their outputs."""
    images = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 100.0)])
    ranks = removal_ranks(torch.zeros(2, 2, 2))
    outputs = perturbed_outputs(pixel_sum, images, torch.zeros(1), ranks, [0, 1, 3], chunk_size=4)
    assert outputs[..., 0].tolist() == [[4, 3, 1], [400, 300, 100]]
    assert measure_outputs(outputs, torch.tensor([0, 1]), "output").tolist() == [[4, 3, 1], [0, 0, 0]]


def test_outputs_that_predict_no_class_are_wrong():
    """Catches the argmax of NaN, which is its place, and a softmax of NaN: by hand, for every kind of broken output."""
    nan, inf = math.nan, math.inf
    rows = {
        (nan, nan, nan): False,
        (nan, 1.0, 2.0): False,
        (5.0, nan, 2.0): False,
        (inf, 1.0, 2.0): False,
        (inf, inf, 0.0): False,
        (-inf, -inf, -inf): False,
        (3.0, -inf, 2.0): True,
        (3.0, 1.0, 2.0): True,
    }
    outputs = torch.tensor(list(rows))[:, None]
    predicts = torch.tensor(list(rows.values()))
    assert torch.equal(has_prediction(outputs)[:, 0], predicts)
    # Exactly those have a softmax.
    assert torch.equal(outputs.softmax(dim=-1).isfinite().all(dim=-1)[:, 0], predicts)
    target = torch.zeros(len(rows), dtype=torch.int64)
    assert measure_outputs(outputs, target, "accuracy")[:, 0].tolist() == predicts.float().tolist()
    probability = measure_outputs(outputs, target, "probability")[:, 0]
    assert probability[:6].tolist() == [0.0] * 6
    torch.testing.assert_close(probability[6:], outputs[6:, 0].softmax(dim=-1)[:, 0])
