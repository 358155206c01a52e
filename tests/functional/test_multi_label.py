"""Several labels an image: the functions equal their slow transcription, and hold at the edges."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf import functional as SF

LABELS, SEEDS = st.integers(1, 6), st.integers(0, 2**32 - 1)
MODES = st.sampled_from(["rank", "class", "label"])


def draw(seed, classes, batch=4):
    """Logits, masked logits, and labels of which the first image has none."""
    generator = torch.Generator().manual_seed(seed)
    logits, masked = 3 * torch.randn(2, batch, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (batch, classes), generator=generator).double()
    labels[0] = 0
    return logits, masked, labels


@given(LABELS, SEEDS)
def test_loss_and_divergence_equal_their_definitions(classes, seed):
    """Catches a mean for a sum, the half of a Bernoulli divergence, and its arguments the other way round."""
    logits, masked, labels = draw(seed, classes)
    loss, divergence = SF.multi_label_loss(logits, labels), SF.bernoulli_divergence(logits, masked)
    for b in range(len(logits)):
        z, other = logits[b].tolist(), masked[b].tolist()
        np.testing.assert_allclose(loss[b], reference.binary_cross_entropy(z, labels[b].tolist()), rtol=1e-10)
        np.testing.assert_allclose(divergence[b], reference.bernoulli_divergence(z, other), rtol=1e-7, atol=1e-14)


@given(LABELS, SEEDS, st.floats(0, 1), st.integers(1, 7), MODES)
def test_the_shift_equals_equations_1_to_3_of_sigmoid_outputs(classes, seed, alpha, top_n, mode):
    """Catches softmax outputs, n beyond the number of labels, and labels that do not come first."""
    logits, masked, labels = draw(seed, classes)
    delta = SF.multi_label_shift(logits, masked, alpha, top_n, mode, labels)
    for b in range(len(logits)):
        arguments = logits[b].tolist(), masked[b].tolist(), alpha, top_n, mode, labels[b].tolist()
        np.testing.assert_allclose(delta[b], reference.multi_label_shift(*arguments), atol=1e-12)


@given(LABELS, SEEDS, st.sampled_from(["logit", "log_prob"]))
def test_the_ranking_score_has_the_gradient_of_the_labels_scores_up_to_a_positive_factor(classes, seed, score):
    """Catches the scores of labels that the image does not have, and an image without labels that has no gradient."""
    logits, _, labels = draw(seed, classes)
    leaf = logits.clone().requires_grad_()
    target = SF.multi_label_target(leaf, labels)
    (gradient,) = torch.autograd.grad(SF.multi_label_ranking_score(leaf, target, score).sum(), leaf)
    for b in range(len(logits)):
        z = logits[b].tolist()
        weights = reference.multi_label_target(z, labels[b].tolist())
        assert target[b].tolist() == weights
        expected = [
            weight * (1.0 if score == "logit" else reference.sigmoid(-value))
            for weight, value in zip(weights, z, strict=True)
        ]
        np.testing.assert_allclose(gradient[b] / gradient[b].max(), np.array(expected) / max(expected), atol=1e-12)


def test_the_predicted_labels_are_those_above_one_half():
    """Catches a threshold of another value, and an image without a label above it."""
    logits = torch.tensor([[0.1, -0.1, 2.0], [-3.0, -1.0, -2.0]])
    assert SF.multi_label_target(logits).tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


def test_the_ranking_survives_labels_of_which_the_model_is_certain():
    """Catches 1 - p that is rounded to 0, so that the tie-break ranks the pixels."""
    logits = torch.tensor([[200.0, 201.0, 5.0]], requires_grad=True)
    score = SF.multi_label_ranking_score(logits, torch.tensor([[1.0, 1.0, 0.0]]), "log_prob")
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    np.testing.assert_allclose(gradient[0], [1.0, math.exp(-1.0), 0.0], rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, math.inf])
def test_the_divergence_of_equal_predictions_is_exactly_zero(scale):
    """Catches log(0) at saturated outputs, and two ways of computing the same log-sigmoid."""
    logits = scale * torch.tensor([[1.0, -1.0, 0.5]]) if scale else torch.zeros(1, 3)
    assert SF.bernoulli_divergence(logits, logits.clone()).tolist() == [0.0]


def test_the_loss_is_that_of_transformers_times_the_number_of_labels():
    """Catches another convention than the model's own."""
    logits, _, labels = draw(0, 5, batch=8)
    theirs = torch.nn.BCEWithLogitsLoss()(logits, labels)
    torch.testing.assert_close(SF.multi_label_loss(logits, labels).mean() / 5, theirs)


def test_the_shift_by_label_needs_labels():
    """Catches an order without labels that is taken for that of the labels."""
    with pytest.raises(ValueError, match="mode='label' needs labels"):
        SF.multi_label_shift(torch.zeros(1, 3), torch.zeros(1, 3), 0.8, 2, "label")


def test_half_precision_is_computed_in_float32():
    """Catches divergences that underflow in float16."""
    logits = torch.tensor([[8.0, -8.0]], dtype=torch.float16)
    masked = torch.tensor([[7.0, -7.0]], dtype=torch.float16)
    found = SF.bernoulli_divergence(logits, masked)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, reference.bernoulli_divergence([8.0, -8.0], [7.0, -7.0]), rtol=1e-4)
