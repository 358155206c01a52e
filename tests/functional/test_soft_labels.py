"""Soft labels: what the functions make of a distribution over the classes, and of one that is a single class."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf import functional as SF

CLASSES, SEEDS, SCORES = st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from(["logit", "log_prob"])


def draw(seed, classes, batch=4, scale=3.0):
    """Logits, masked logits and soft labels, of which some classes have no weight."""
    generator = torch.Generator().manual_seed(seed)
    logits, masked, weights = torch.randn(3, batch, classes, generator=generator, dtype=torch.float64)
    weights = weights.relu() + torch.nn.functional.one_hot(torch.arange(batch) % classes, classes)
    return scale * logits, scale * masked, weights / weights.sum(dim=1, keepdim=True)


@given(CLASSES, SEEDS, st.floats(0, 0.5))
def test_the_cross_entropy_is_the_mean_of_the_classes(classes, seed, label_smoothing):
    """Catches a sum over samples, weights that are lost, and smoothing of the wrong share."""
    logits, _, weights = draw(seed, classes)
    ce = SF.classification_loss(logits, weights, label_smoothing)
    for b in range(len(logits)):
        expected = reference.soft_cross_entropy(logits[b].tolist(), weights[b].tolist(), label_smoothing)
        np.testing.assert_allclose(ce[b], expected, rtol=1e-12)


@given(CLASSES, SEEDS, SCORES)
def test_the_ranking_score_has_the_gradient_of_the_weighted_score_up_to_a_positive_factor(classes, seed, score):
    """Catches the score of the largest weight alone, and a factor that is of the batch and not of the sample."""
    logits, _, weights = draw(seed, classes)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(SF.ranking_score(leaf, weights, score).sum(), leaf)
    for b in range(len(logits)):
        expected = np.array(reference.score_derivative(logits[b].tolist(), weights[b].tolist(), score))
        factor = gradient[b].abs().max().item() / np.abs(expected).max()
        assert factor > 0
        np.testing.assert_allclose(gradient[b], expected * factor, atol=1e-9)


@given(CLASSES, SEEDS)
def test_the_derivative_is_weight_minus_softmax(classes, seed):
    """Catches a derivative of the wrong sign, and one of the largest weight alone."""
    logits, _, weights = draw(seed, classes)
    derivative = SF.log_prob_derivative(logits, weights)
    for b in range(len(logits)):
        expected = reference.score_derivative(logits[b].tolist(), weights[b].tolist(), "log_prob")
        np.testing.assert_allclose(derivative[b], expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 40.0, 300.0])
def test_a_one_hot_label_is_the_hard_label_bit_for_bit(dtype, scale):
    """Catches a confident model, for which w - p is rounded to 0 where the sum of the others' p is not."""
    logits = (scale * torch.randn(64, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    hard = torch.cat([logits.argmax(dim=1)[:32], torch.arange(32) % 5])
    soft = torch.nn.functional.one_hot(hard, 5).to(torch.float32)

    def of(labels):
        leaf = logits.clone().requires_grad_()
        ce = SF.classification_loss(leaf, labels)
        found = [ce, *torch.autograd.grad(ce.mean(), leaf), SF.log_prob_derivative(logits, labels)]
        for score in ("logit", "log_prob"):
            found += torch.autograd.grad(SF.ranking_score(leaf, labels, score).sum(), leaf)
        return [*found, SF.probability_shift(logits, logits.flip(0), 0.8, 3, "label", labels)]

    for one, other in zip(of(hard), of(soft), strict=True):
        assert torch.equal(one, other)


def test_rows_are_told_apart():
    """Catches one-hot and mixed labels of a batch that are all taken for one kind."""
    logits, _, weights = draw(3, 4)
    weights[:2] = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    for score in ("logit", "log_prob"):
        leaf = logits.clone().requires_grad_()
        (together,) = torch.autograd.grad(SF.ranking_score(leaf, weights, score).sum(), leaf)
        (alone,) = torch.autograd.grad(SF.ranking_score(leaf, torch.tensor([0, 1, 0, 0]), score).sum(), leaf)
        assert torch.equal(together[1], alone[1])
        assert not torch.equal(together[0], alone[0])


def test_a_class_of_no_weight_may_be_ruled_out():
    """Catches the NaN of 0 times -inf, in the value and in the gradient."""
    logits = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    ce = SF.classification_loss(logits, torch.tensor([[0.25, 0.75, 0.0]]))
    np.testing.assert_allclose(ce.item(), reference.soft_cross_entropy([1.0, 2.0], [0.25, 0.75]), rtol=1e-6)
    ce.sum().backward()
    assert logits.grad.isfinite().all()


def test_the_label_of_the_shift_is_that_of_the_largest_weight():
    """Catches the weights of all classes taken for the order, which rank by label has one class first."""
    logits, masked = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 5.0, 2.0]])
    soft = torch.tensor([[0.0, 0.1, 0.3, 0.6]])
    hard = SF.probability_shift(logits, masked, 0.8, 3, "label", torch.tensor([3]))
    assert torch.equal(SF.probability_shift(logits, masked, 0.8, 3, "label", soft), hard)


@pytest.mark.parametrize("function", [SF.classification_loss, SF.multi_label_loss])
@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (4, 2)])
def test_weights_of_another_shape_are_refused(shape, function):
    """Catches weights that are broadcast over the classes or the batch."""
    with pytest.raises(ValueError, match=r"labels of .* do not fit logits of \(4, 3\)"):
        function(torch.zeros(4, 3), torch.ones(shape))
