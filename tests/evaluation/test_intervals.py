"""Intervals of a mean: by hand, and how often they cover the truth."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from smoot_hf.evaluation.intervals import mean_interval

SAMPLES = 2000


def normal(generator, n):
    return generator.normal(size=n)


def exponential(generator, n):
    return generator.exponential(size=n)


def areas(generator, n):
    """Areas, in percent, of images that become wrong at any of eleven steps with the same probability."""
    return 10 * np.maximum(generator.integers(0, 11, n) - 0.5, 0)


# What is drawn, its mean, its bounds, n, and the coverage in percent that must be reached: three standard errors of
# 2,000 samples (0.5 points) below that of the docstring's table.
COVERAGE = {
    "normal, 3": (normal, 0, None, 3, 93.5),
    "normal, 5": (normal, 0, None, 5, 93.5),
    "normal, 10": (normal, 0, None, 10, 93.5),
    "normal, 200": (normal, 0, None, 200, 93.4),
    "areas, 5": (areas, 500 / 11, (0, 100), 5, 91.5),
    "areas, 20": (areas, 500 / 11, (0, 100), 20, 93.5),
    "exponential, 20": (exponential, 1, None, 20, 90),
}


@pytest.mark.parametrize("case", COVERAGE)
def test_intervals_cover_at_small_n(case):
    """Fault: a 95 % interval that covers 83 % of the time at n = 5, as that of the percentile bootstrap does."""
    draw, mean, bounds, n, least = COVERAGE[case]
    generator = np.random.default_rng(0)
    found = [mean_interval(draw(generator, n), bounds) for _ in range(SAMPLES)]
    assert None not in found
    coverage = 100 * sum(low <= mean <= high for low, high in found) / SAMPLES
    # Wide enough is easy: the interval must not be wider than it claims.
    assert least <= coverage <= 96.5


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20, 50])
def test_binary_intervals_cover_at_every_n_and_share(n):
    """Fault: five right of five give an interval without width, and 24 % of the intervals cover a share of 95 %.

    Exact, not simulated: a share p is covered with the sum of the probabilities of those counts whose interval holds p.
    """
    ends = [mean_interval([1.0] * hits + [0.0] * (n - hits), (0, 1)) for hits in range(n + 1)]
    for share in np.linspace(0.005, 0.995, 199):
        covers = [low <= share <= high for low, high in ends]
        assert stats.binom.pmf(np.arange(n + 1), n, share)[covers].sum() >= 0.95 - 1e-12
    for hits, (low, high) in enumerate(ends):
        exact = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
        assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_numbers_are_students_and_clopper_pearsons():
    """Fault: the normal's 1.96, a spread over n instead of n - 1, or ends that leave what is possible.

    By hand: 9, 10, 11 have the standard deviation 1, and t(0.975, 2) = 4.3027; five hits of five have the lower end
    0.025 ** (1 / 5).
    """
    half = 4.302652729 / math.sqrt(3)
    assert mean_interval([9.0, 10.0, 11.0]) == pytest.approx((10 - half, 10 + half), abs=1e-8)
    assert mean_interval(torch.tensor([9.0, 10.0, 11.0]), (8.0, 100.0)) == pytest.approx((8.0, 10 + half), abs=1e-6)
    assert mean_interval([100.0] * 5, (0, 100)) == pytest.approx((100 * 0.025**0.2, 100), abs=1e-8)
    assert mean_interval([0.0] * 5, (0, 100)) == pytest.approx((0, 100 - 100 * 0.025**0.2), abs=1e-8)
    one_of_four = stats.beta.ppf(0.025, 1, 4), stats.beta.ppf(0.975, 2, 3)
    assert mean_interval([-1.0, -1.0, 1.0, -1.0], (-1, 1)) == pytest.approx([2 * p - 1 for p in one_of_four], abs=1e-8)


@pytest.mark.parametrize(
    "values", [[], [1.0], [37.5] * 4, [0.1 + 0.2, 0.3, 0.3], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]], ids=str
)
def test_no_interval_where_nothing_is_known_of_the_spread(values):
    """Fault: an interval without width, which calls any difference real, or one of NaN."""
    assert mean_interval(values) is None
    assert mean_interval(values, (-100, 100)) is None


def test_what_is_no_sample_within_its_bounds_is_refused():
    """Fault: fractions taken for percent, and bounds turned round."""
    with pytest.raises(ValueError, match=r"values must lie within \(0, 1\), got 0.5 to 2.0"):
        mean_interval([0.5, 2.0], (0, 1))
    with pytest.raises(ValueError, match=r"bounds must rise, got \(1, 0\)"):
        mean_interval([0.5, 0.7], (1, 0))
    with pytest.raises(ValueError, match=r"values must be \(n,\), got shape \(1, 2\)"):
        mean_interval([[0.5, 0.7]])
