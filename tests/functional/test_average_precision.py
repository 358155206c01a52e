"""Mean average precision: by hand, against the slow loop, and against scikit-learn."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from smoot_hf import functional as SF


def random_case(points, n, classes, seed):
    """Outputs of few values, so that ties are common, and labels."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randint(-3, 4, (points, n, classes), generator=generator).double()
    return outputs, torch.randint(0, 2, (n, classes), generator=generator)


def test_by_hand():
    """Catches precision at the wrong rank, and a mean over all images in the place of those that have the label.

    The first label's images are at ranks 1 and 3: (1/1 + 2/3) / 2. The second's two share one output with a third.
    """
    outputs = torch.tensor([[4.0, 1.0, 0.0], [3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    labels = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    found = SF.average_precision(outputs, labels)
    assert found[:2].tolist() == pytest.approx([5 / 6, 2 / 3], abs=1e-15)
    assert math.isnan(found[2])
    assert float(SF.mean_average_precision(outputs, labels)) == pytest.approx(0.75, abs=1e-15)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_equals_the_slow_loop_and_scikit_learn(points, n, classes, seed):
    """Catches ties that are broken by position, labels that do not occur, and a dimension that is mixed up."""
    outputs, labels = random_case(points, n, classes, seed)
    found = SF.mean_average_precision(outputs, labels)
    assert found.shape == (points,)
    assert found.dtype == torch.float64
    for point in range(points):
        expected = reference.mean_average_precision(outputs[point].tolist(), labels.tolist())
        assert float(found[point]) == pytest.approx(expected, abs=1e-12, nan_ok=True)
        for one in range(classes):
            if labels[:, one].any():
                theirs = average_precision_score(labels[:, one].numpy(), outputs[point, :, one].numpy())
                ours = SF.average_precision(outputs[point], labels)[one]
                assert float(ours) == pytest.approx(theirs, abs=1e-12)


def test_a_nan_is_the_lowest_output():
    """Catches an image without a prediction that ranks first, as torch sorts a NaN."""
    outputs = torch.tensor([[torch.nan], [-1.0], [2.0]])
    assert float(SF.average_precision(outputs, torch.tensor([[1], [0], [0]]))) == pytest.approx(1 / 3)
