"""The fast functions equal the paper's slow transcription, and hold at the edges."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf import functional as SF
from smoot_hf.functional import masking

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 7))
SEEDS = st.integers(0, 2**32 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw_saliency(shape, seed, levels):
    """Few levels make ties the rule, as on images with untouched background."""
    return torch.randint(-levels, levels + 1, shape, generator=generator(seed)).double() / levels


# --- masking -----------------------------------------------------------------------------------------------------


@given(SIZES, SEEDS, st.integers(1, 4))
def test_mask_is_the_k_lowest_ranks_with_ties_by_position(size, seed, levels):
    """Catches a threshold (more than k on ties), an unstable sort and an off-by-one in k."""
    batch, _, height, width = size
    saliency = draw_saliency((batch, height, width), seed, levels)
    k = torch.randint(0, height * width + 1, (batch,), generator=generator(seed + 1))
    mask = SF.least_salient_mask(saliency, k)
    assert mask.shape == (batch, 1, height, width)
    assert mask.dtype == torch.bool
    for b in range(batch):
        assert mask[b, 0].tolist() == reference.least_salient_mask(saliency[b].tolist(), int(k[b]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_mask_has_exactly_k_positions_in_every_dtype(dtype, fraction):
    """Catches K = 0 masking one, K = H*W missing one, and constant saliency masking all or none."""
    saliency = torch.stack([torch.zeros(5, 7), torch.randn(5, 7, generator=generator(0)), torch.full((5, 7), 3.0)])
    k = torch.full((3,), int(35 * fraction), dtype=torch.int32)
    mask = SF.least_salient_mask(saliency.to(dtype), k)
    assert mask.sum((1, 2, 3)).tolist() == k.tolist()


SPECIAL = [math.nan, -math.nan, 0.0, -0.0, math.inf, -math.inf, 1e-7, -1e-7, 1e-42, -1e-42, 1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mask_of_special_values(dtype):
    """Catches -0.0 ranked before 0.0, a NaN of negative sign ranked first, and a subnormal taken for zero."""
    values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (36, 7, 5), generator=generator(0))].to(dtype)
    mask = SF.least_salient_mask(values, torch.arange(36))
    for k in range(36):
        assert mask[k, 0].tolist() == reference.least_salient_mask(values[k].tolist(), k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_mask_of_a_photograph(dtype, monkeypatch):
    """Catches a long row, which is sorted by the bits of its values, in another order than a short one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    drawn = torch.randint(len(SPECIAL), (2, 181, 182), generator=generator(1))
    values = torch.where(drawn < 6, torch.tensor(SPECIAL)[drawn], torch.randn(drawn.shape, generator=generator(2)))
    values = values.to(dtype) if dtype.is_floating_point else drawn.sub(5).to(dtype)
    k = torch.tensor([12_345, 32_000])
    mask = SF.least_salient_mask(values, k)
    for row in (0, 1):
        expected = reference.least_salient_mask(values[row].tolist(), int(k[row]))
        assert torch.equal(mask[row, 0], torch.tensor(expected))


def test_mask_with_a_budget_of_its_own_for_every_sample():
    """Catches a budget that is taken from the first sample or averaged."""
    k = torch.tensor([0, 1, 17, 35])
    assert SF.least_salient_mask(torch.zeros(4, 5, 7), k).sum((1, 2, 3)).tolist() == k.tolist()


def test_mask_does_not_depend_on_the_scale_of_the_saliency():
    """Catches arithmetic on the gradient before ranking: tiny and huge gradients must rank alike."""
    saliency = torch.randn(3, 6, 6, generator=generator(3), dtype=torch.float64)
    k = torch.tensor([5, 18, 30])
    expected = SF.least_salient_mask(saliency, k)
    for scale in (1e-300, 1e-30, 1e30, 1e300):
        assert torch.equal(SF.least_salient_mask(saliency * scale, k), expected)


def test_nan_saliency_is_masked_last():
    """Catches a NaN that takes the place of a low gradient."""
    saliency = torch.tensor([[[math.nan, 2.0], [1.0, math.nan]]])
    assert SF.least_salient_mask(saliency, torch.tensor([2])).tolist() == [[[[False, True], [True, False]]]]


# --- noise and fill ----------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(0, 1000), st.lists(st.integers(0, 2**40), min_size=1, max_size=4), SIZES)
def test_noise_equals_its_definition(seed, epoch, indices, size):
    """Catches a wrap-around, an arithmetic shift in place of a logical one, and a lost high half of the index."""
    shape = size[1:]
    noise = SF.counter_uniform(seed, epoch, torch.tensor(indices), shape)
    assert noise.shape == (len(indices), *shape)
    assert noise.dtype == torch.float32
    for row, index in zip(noise, indices, strict=True):
        assert row.flatten().tolist() == reference.counter_uniform(seed, epoch, index, math.prod(shape))


def test_noise_of_a_sample_is_the_same_in_every_batch():
    """Catches generator state: the batch, its order and its neighbours must not matter."""
    together = SF.counter_uniform(7, 3, torch.tensor([5, 2, 9]), (2, 4, 4))
    alone = SF.counter_uniform(7, 3, torch.tensor([2]), (2, 4, 4))
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("size", [1, 60, 119, 120, 1000])
def test_noise_does_not_depend_on_the_pieces_it_is_computed_in(size, monkeypatch):
    """Catches a piece that is left out, or that begins at another sample: pieces of one, two and all five samples."""
    monkeypatch.setattr(masking, "_PIECE", size)
    rows = torch.tensor([3, 2**33, 7, 0, 5])
    noise = SF.counter_uniform(7, 3, rows, (3, 4, 5))
    for found, index in zip(noise, rows.tolist(), strict=True):
        assert found.flatten().tolist() == reference.counter_uniform(7, 3, index, 60)
    assert SF.counter_uniform(7, 3, rows[:0], (3, 4, 5)).shape == (0, 3, 4, 5)


def test_noise_is_uniform_and_independent():
    """Catches a weak hash: mean, variance, every bit, and correlations over pixels, samples, epochs and seeds."""
    n = 400
    noise = SF.counter_uniform(0, 0, torch.arange(n), (3, 16, 16)).double().reshape(n, -1)
    size = noise.numel()
    assert abs(noise.mean() - 0.5) < 5 * math.sqrt(1 / 12 / size)
    assert abs(noise.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / size)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = torch.histc(noise, bins=256, min=0, max=1)
    chi_square = ((counts - size / 256) ** 2 / (size / 256)).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    bits = (noise * 2**24).long()
    for bit in range(24):
        assert abs(((bits >> bit) & 1).double().mean() - 0.5) < 5 * math.sqrt(0.25 / size)
    centred = noise - 0.5
    others = {
        "next pixel": centred.roll(-1, 1),
        "next sample": centred.roll(-1, 0),
        "next channel": centred.roll(-256, 1),
        "next epoch": SF.counter_uniform(0, 1, torch.arange(n), (3, 16, 16)).double().reshape(n, -1) - 0.5,
        "next seed": SF.counter_uniform(1, 0, torch.arange(n), (3, 16, 16)).double().reshape(n, -1) - 0.5,
        "index + 2**32": SF.counter_uniform(0, 0, torch.arange(n) + 2**32, (3, 16, 16)).double().reshape(n, -1) - 0.5,
    }
    for name, other in others.items():
        correlation = (centred * other).mean() * 12
        assert abs(correlation) < 5 / math.sqrt(size), name


@given(SIZES, SEEDS)
def test_fill_is_uniform_in_the_range_of_what_remains(size, seed):
    """Catches a range over all pixels, over all channels, or over the masked ones."""
    batch, channels, height, width = size
    images = torch.randn(size, generator=generator(seed), dtype=torch.float64)
    noise = torch.rand(size, generator=generator(seed + 1), dtype=torch.float64)
    k = torch.randint(0, height * width + 1, (batch,), generator=generator(seed + 2))
    mask = SF.least_salient_mask(images.mean(1), k)
    fill = SF.uniform_fill(images, mask, noise)
    for b in range(batch):
        for c in range(channels):
            expected = reference.uniform_fill(images[b, c].tolist(), mask[b, 0].tolist(), noise[b, c].tolist())
            np.testing.assert_allclose(fill[b, c].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fill_stays_finite_and_in_range_at_the_edges(dtype):
    """Catches an infinite range when nothing remains, and rounding or overflow beyond the extremes."""
    largest = torch.finfo(dtype).max
    images = torch.stack([torch.full((1, 3, 3), 2.0), torch.linspace(-1, 1, 9).reshape(1, 3, 3)]).to(dtype)
    extremes = torch.tensor([-largest, largest] * 4 + [0.0], dtype=dtype).reshape(1, 1, 3, 3)
    images = torch.cat([images, extremes])
    for k in (0, 4, 9):
        mask = SF.least_salient_mask(images.float().mean(1), torch.full((3,), k))
        for u in (0.0, 0.5, 1 - 2**-24):
            fill = SF.uniform_fill(images, mask, torch.full(images.shape, u))
            assert fill.dtype == dtype
            assert torch.isfinite(fill).all()
            assert (fill >= images.amin((2, 3), keepdim=True)).all()
            assert (fill <= images.amax((2, 3), keepdim=True)).all()
            assert (fill[0] == 2.0).all()


def test_mean_fill_is_per_image_and_channel():
    """Catches a mean over the batch."""
    images = torch.arange(16.0).reshape(2, 2, 2, 2)
    assert SF.mean_fill(images).flatten().tolist() == [1.5, 5.5, 9.5, 13.5]


def test_other_image_fill_takes_every_image_once_and_no_image_its_own():
    """Catches a fill that leaves an image as it is, or that mixes channels."""
    images = torch.arange(24.0).reshape(3, 2, 2, 2)
    fill = SF.other_image_fill(images)
    assert [fill[row].tolist() for row in range(3)] == [images[row].tolist() for row in (1, 2, 0)]
    assert torch.equal(SF.other_image_fill(images[:1]), images[:1])


def test_adversarial_fill_lowers_the_score():
    """Catches a step along the gradient, one of another length, and one that moves a pixel without a gradient."""
    images = torch.tensor([[[[0.5, -1.0, 2.0]]]], requires_grad=True)
    score = (images * torch.tensor([3.0, -0.1, 0.0])).sum(dim=(1, 2, 3))
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert SF.adversarial_fill(images.detach(), gradient, 0.25).flatten().tolist() == [0.25, -0.75, 2.0]


# --- saliency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_saliency_is_the_channel_mean_of_the_gradient(signed):
    """Catches a sum for a mean, a magnitude after the mean (channels cancel) and a batch-averaged score."""
    images = torch.randn(3, 2, 4, 5, generator=generator(1), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 4, 5, generator=generator(2), dtype=torch.float64)
    saliency = SF.input_saliency((weight * images).sum((1, 2, 3)), images, signed=signed)
    expected = weight if signed else weight.abs()
    torch.testing.assert_close(saliency, expected.mean(1))
    assert not saliency.requires_grad


def test_saliency_leaves_the_graph_for_the_loss():
    """Catches a freed graph and a gradient left on the images."""
    images = torch.ones(1, 1, 2, 2, requires_grad=True)
    score = (images**2).sum((1, 2, 3))
    SF.input_saliency(score, images)
    assert images.grad is None
    score.sum().backward()
    assert images.grad.flatten().tolist() == [2.0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_saliency_is_reduced_in_float32(dtype):
    """Catches a mean over channels that overflows in the images' dtype."""
    images = torch.zeros(1, 4, 1, 2, dtype=dtype, requires_grad=True)
    saliency = SF.input_saliency((images * 40000.0).sum((1, 2, 3)), images)
    assert saliency.dtype == torch.float32
    torch.testing.assert_close(saliency, torch.full((1, 1, 2), 40000.0), rtol=2**-7, atol=0)


def test_class_score_is_the_targets_output():
    """Catches a score of another class and log-probabilities that are not normalised."""
    logits = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    target = torch.tensor([1, 0])
    assert SF.class_score(logits, target).tolist() == [2.0, 3.0]
    expected = [-reference.cross_entropy([1, 2], 1), -reference.cross_entropy([3, 5], 0)]
    np.testing.assert_allclose(SF.class_score(logits, target, "log_prob"), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="'logit' or 'log_prob', got 'prob'"):
        SF.class_score(logits, target, "prob")


@given(st.integers(0, 2**32 - 1), st.sampled_from(["logit", "log_prob"]))
def test_ranking_score_has_the_gradient_of_the_class_score_up_to_a_positive_factor(seed, score):
    """Catches a factor that is negative, shared by the batch, or different from pixel to pixel."""
    images = torch.randn(4, 1, 3, 3, generator=generator(seed), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, generator=generator(seed + 1), dtype=torch.float64)
    target = torch.randint(5, (4,), generator=generator(seed + 2))
    logits = images.flatten(1) @ weight
    one = SF.input_saliency(SF.class_score(logits, target, score), images)
    other = SF.input_saliency(SF.ranking_score(logits, target, score), images)
    factor = (other / one).flatten(1)
    assert (factor > 0).all()
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=0)


def test_ranking_survives_half_precision_when_the_model_is_certain():
    """Catches the mask of a well-trained model under fp16 becoming the first K positions."""
    images = torch.randn(16, 1, 6, 6, generator=generator(0)).half().requires_grad_()
    weight = (torch.randn(36, 4, generator=generator(1)) * 4).half()
    logits = (images.flatten(1).float() @ weight.float()).half()  # rounded on the way, as under fp16
    target = logits.argmax(1)
    assert logits.float().softmax(1).max(1).values.median() > 0.9999

    def masks(score_of, upcast):
        view = images.detach().clone().float() if upcast else images.detach().clone()
        view.requires_grad_()
        outputs = view.flatten(1) @ (weight.float() if upcast else weight)
        saliency = SF.input_saliency(score_of(outputs, target, "log_prob"), view)
        return SF.least_salient_mask(saliency, torch.full((16,), 18))

    exact = masks(SF.class_score, upcast=True)
    ranked = (masks(SF.ranking_score, upcast=False) == exact).float().mean()
    vanished = (masks(SF.class_score, upcast=False) == exact).float().mean()
    assert ranked > 0.98
    assert vanished < 0.9


# --- objective ---------------------------------------------------------------------------------------------------

CLASSES = st.integers(2, 12)


@given(CLASSES, SEEDS, st.floats(0, 10), st.floats(0, 0.5))
def test_objective_equals_the_equations(classes, seed, kl_weight, label_smoothing):
    """Catches the traps of a KL divergence: argument order, log target, reduction, and the sign of Equation 6."""
    logits = 3 * torch.randn(4, classes, generator=generator(seed), dtype=torch.float64)
    masked = 3 * torch.randn(4, classes, generator=generator(seed + 1), dtype=torch.float64)
    labels = torch.randint(classes, (4,), generator=generator(seed + 2))
    parts = SF.masked_objective(logits, masked, labels, kl_weight, label_smoothing)
    for b in range(4):
        ce = reference.cross_entropy(logits[b].tolist(), int(labels[b]), label_smoothing)
        kl = reference.kl_divergence(logits[b].tolist(), masked[b].tolist())
        np.testing.assert_allclose([parts.ce[b], parts.kl[b], parts.total[b]], [ce, kl, ce + kl_weight * kl], atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_kl_of_equal_predictions_is_exactly_zero(scale):
    """Catches log(0) at saturated outputs and two ways of computing the same log-softmax."""
    logits = scale * torch.randn(5, 10, generator=generator(0))
    assert SF.kl_divergence(logits, logits.clone()).tolist() == [0.0] * 5


def test_a_class_that_is_ruled_out_adds_nothing_to_the_kl():
    """Catches the NaN of -inf minus -inf, in the value and in the gradient: a model may rule classes out."""
    both = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)]
    with_others = [logits.clone().requires_grad_() for logits in both]
    ruled_out = torch.tensor([False, False, True, False, True])
    kl = SF.kl_divergence(*(logits.masked_fill(ruled_out, -math.inf) for logits in with_others))
    alone = [logits[:, ~ruled_out].clone().requires_grad_() for logits in both]
    expected = SF.kl_divergence(*alone)
    torch.testing.assert_close(kl, expected)
    kl.sum().backward()
    expected.sum().backward()
    for one, two in zip(with_others, alone, strict=True):
        torch.testing.assert_close(one.grad[:, ~ruled_out], two.grad)
        assert one.grad[:, ruled_out].abs().max() == 0


def test_kl_is_finite_at_saturated_outputs():
    """Catches 0 * inf where a class has probability zero."""
    clean = torch.tensor([[1000.0, 0.0, -1000.0]])
    kl = SF.kl_divergence(clean, torch.tensor([[900.0, 0.0, -1000.0]]))
    assert torch.isfinite(kl).all()


@given(CLASSES, SEEDS, st.floats(0, 1), st.integers(1, 6), st.sampled_from(["rank", "class", "label"]))
def test_shift_equals_the_equations(classes, seed, alpha, top_n, mode):
    """Catches a sum for a mean, n beyond the number of classes, and the order of the wrong distribution."""
    logits = 2 * torch.randn(4, classes, generator=generator(seed), dtype=torch.float64)
    masked = 2 * torch.randn(4, classes, generator=generator(seed + 1), dtype=torch.float64)
    labels = torch.randint(classes, (4,), generator=generator(seed + 2))
    delta = SF.probability_shift(logits, masked, alpha, top_n, mode, labels)
    for b in range(4):
        expected = reference.probability_shift(
            logits[b].tolist(), masked[b].tolist(), alpha, top_n, mode, int(labels[b])
        )
        np.testing.assert_allclose(delta[b], expected, atol=1e-12)


def test_shift_with_two_classes_and_top_n_of_five():
    """Catches an index error: the second class stands for all the others."""
    logits, masked = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    change = 0.5 - reference.softmax([2, 0])[0]
    np.testing.assert_allclose(SF.probability_shift(logits, masked, 0.8, 5), [0.8 * change - 0.2 * change], rtol=1e-6)


def test_shift_of_a_confident_wrong_flip_is_positive_by_rank_and_negative_by_label():
    """The forks of the definition differ where they should."""
    logits, masked = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 0.0]])
    label = torch.tensor([0])
    assert SF.probability_shift(logits, masked, 1.0, 2) > 0
    assert SF.probability_shift(logits, masked, 1.0, 2, "class") < 0
    assert SF.probability_shift(logits, masked, 1.0, 2, "label", label) < 0


def test_shift_refuses_what_it_cannot_define():
    """One class has no distribution to rank; an unknown mode must not pass for another."""
    two = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="at least 2 classes"):
        SF.probability_shift(torch.zeros(1, 1), torch.zeros(1, 1), 0.8, 5)
    with pytest.raises(ValueError, match=r"mode must be .* got 'top'"):
        SF.probability_shift(two, two, 0.8, 5, "top")
    with pytest.raises(ValueError, match="needs labels"):
        SF.probability_shift(two, two, 0.8, 5, "label")


def test_half_precision_logits_are_computed_in_float32():
    """Catches a loss whose parts are rounded to eight bits."""
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    parts = SF.masked_objective(logits, logits, torch.tensor([0]), 1.0)
    assert parts.total.dtype == torch.float32
    np.testing.assert_allclose(parts.ce, [reference.cross_entropy([1, 2, 3], 0)], rtol=1e-6)


# --- budget ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    st.floats(0, 500),
    st.sampled_from(["floor", "trunc", "nearest"]),
)
def test_budget_update_equals_equation_4(deltas, step_size, rounding):
    """Catches a product in float32, rounding towards the wrong side, and a missing clip."""
    k = torch.full((len(deltas),), 392, dtype=torch.int32)
    new = SF.update_budget(k, torch.tensor(deltas, dtype=torch.float64), step_size, 156, 627, rounding)
    assert new.dtype == torch.int32
    assert new.tolist() == [reference.update_budget(392, delta, step_size, 156, 627, rounding) for delta in deltas]


def test_budget_update_rounds_tiny_deltas_as_documented():
    """The fork of design section 3: floor takes a pixel for a delta of -1e-5, truncation and rounding do not."""
    k, delta = torch.tensor([400]), torch.tensor([-1e-5])
    updated = {
        rounding: SF.update_budget(k, delta, 10.0, 0, 784, rounding).item()
        for rounding in ("floor", "trunc", "nearest")
    }
    assert updated == {"floor": 399, "trunc": 400, "nearest": 400}


def test_budget_does_not_move_on_what_is_not_finite():
    """Catches a NaN or an infinity written into K (an integer conversion of NaN is undefined)."""
    delta = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert SF.update_budget(torch.full((4,), 400), delta, 10.0, 0, 784).tolist() == [400, 400, 400, 410]


def test_budget_refuses_an_unknown_rounding():
    """A typo must not pass for the default."""
    with pytest.raises(ValueError, match="'floor', 'trunc', 'nearest', got 'ceil'"):
        SF.update_budget(torch.tensor([1]), torch.tensor([0.0]), 1.0, 0, 2, "ceil")
