"""The verdict of a comparison: beyond the noise of the seeds or not."""

import statistics

import pytest
import torch

from smoot_hf import Faithfulness
from smoot_hf.evaluation.convention import DEFAULT
from smoot_hf.evaluation.faithfulness import Curve
from smoot_hf.experiments.verdict import judge


def measurement(areas, convention=DEFAULT):
    """What was measured of a model whose images have these areas under the deletion curve."""
    areas = torch.tensor(areas, dtype=torch.float64)
    curve = Curve(areas.mean().repeat(11), areas, None)
    index = torch.arange(len(areas))
    fractions = torch.linspace(0, 1, 11)
    return Faithfulness(
        convention, 90.0, fractions, curve, None, None, None, len(areas), 0, index, 0, dataset_fingerprint="test set"
    )


@pytest.mark.parametrize(
    ("smoot", "sgt", "outcome"),
    [
        ([10.0, 11.0, 12.0], [20.0, 21.5, 21.9], "lower"),
        ([20.0, 21.5, 21.9], [10.0, 11.0, 12.0], "higher"),
        ([10.0, 20.0, 30.0], [12.0, 19.0, 32.0], "not to be told apart"),
        ([10.0], [20.0], "unknown"),
        ([10.0, 20.0], [10.0, 20.0], "not to be told apart"),
        ([10.0, 20.0], [15.0, 25.0], "unknown"),
    ],
)
def test_verdict_is_beyond_the_noise_of_the_seeds_or_not(smoot, sgt, outcome):
    """Fault: a difference called real because the images agree although the seeds do not; or its sign turned round."""
    by_seed = {
        name: {seed: measurement([value - 1, value + 1]) for seed, value in enumerate(values)}
        for name, values in (("sgt", sgt), ("smoot", smoot))
    }
    (verdict,) = judge(by_seed)
    assert (verdict.first, verdict.second) == ("smoot", "sgt")
    assert verdict.outcome == outcome
    assert verdict.measurement.mean == pytest.approx(sum(smoot) / len(smoot) - sum(sgt) / len(sgt))


def test_interval_is_students():
    """Fault: the normal's 1.96 for three seeds, which calls noise a result. By hand: 4.303 * 1 / sqrt(3) = 2.484."""
    by_seed = {"sgt": [10.0, 10.0, 10.0], "smoot": [9.0, 10.0, 11.0]}
    measured = {m: {s: measurement([v, v]) for s, v in enumerate(values)} for m, values in by_seed.items()}
    (verdict,) = judge(measured)
    assert verdict.interval == pytest.approx((-2.484, 2.484), abs=1e-3)


def test_interval_of_many_seeds_is_students():
    """Fault: a table of quantiles that ends: 2.042 for all from 31 seeds on. By hand: t(0.975, 60) is 2.0003."""
    values = [10.0 + (-1) ** seed for seed in range(61)]
    measured = {"sgt": {s: measurement([10.0, 10.0]) for s in range(61)}}
    measured["smoot"] = {s: measurement([v, v]) for s, v in enumerate(values)}
    (verdict,) = judge(measured)
    low, high = verdict.interval
    assert (high - low) / 2 == pytest.approx(2.0003 * statistics.stdev(values) / 61**0.5, rel=1e-5)
