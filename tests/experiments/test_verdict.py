"""The verdict of a comparison: beyond the noise of the seeds or not."""

import statistics

import pytest
import torch

from smoot_hf import Faithfulness, compare_faithfulness
from smoot_hf.evaluation.comparison import PairedDifference
from smoot_hf.evaluation.convention import DEFAULT
from smoot_hf.evaluation.faithfulness import Curve
from smoot_hf.experiments.verdict import QUANTITIES, judge


def measurement(areas, convention=DEFAULT):
    """What was measured of a model whose images have these areas under the deletion curve."""
    areas = torch.tensor(areas, dtype=torch.float64)
    curve = Curve(areas.mean().repeat(11), areas, None)
    index = torch.arange(len(areas))
    fractions = torch.linspace(0, 1, 11)
    return Faithfulness(
        convention, 90.0, fractions, curve, None, None, None, len(areas), 0, index, 0, dataset_fingerprint="test set"
    )


def of_areas(measured):
    return judge(measured, "deletion_auc", DEFAULT.to_dict(), compare_faithfulness)


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
    (verdict,) = of_areas(by_seed)
    assert (verdict.first, verdict.second) == ("smoot", "sgt")
    assert verdict.outcome == outcome
    assert verdict.measurement.mean == pytest.approx(sum(smoot) / len(smoot) - sum(sgt) / len(sgt))


def test_interval_is_students():
    """Fault: the normal's 1.96 for three seeds, which calls noise a result. By hand: 4.303 * 1 / sqrt(3) = 2.484."""
    by_seed = {"sgt": [10.0, 10.0, 10.0], "smoot": [9.0, 10.0, 11.0]}
    measured = {m: {s: measurement([v, v]) for s, v in enumerate(values)} for m, values in by_seed.items()}
    (verdict,) = of_areas(measured)
    assert verdict.interval == pytest.approx((-2.484, 2.484), abs=1e-3)


def test_interval_of_many_seeds_is_students():
    """Fault: a table of quantiles that ends: 2.042 for all from 31 seeds on. By hand: t(0.975, 60) is 2.0003."""
    values = [10.0 + (-1) ** seed for seed in range(61)]
    measured = {"sgt": {s: measurement([10.0, 10.0]) for s in range(61)}}
    measured["smoot"] = {s: measurement([v, v]) for s, v in enumerate(values)}
    (verdict,) = of_areas(measured)
    low, high = verdict.interval
    assert (high - low) / 2 == pytest.approx(2.0003 * statistics.stdev(values) / 61**0.5, rel=1e-5)


@pytest.mark.parametrize("metric", QUANTITIES)
def test_a_verdict_is_of_the_quantity_that_it_names(metric):
    """Fault: rows of two quantities that overwrite each other, or a sentence that names another quantity."""
    values = {"sgt": {0: 3.0, 1: 4.0}, "smoot": {0: 2.0, 1: 1.0}}

    def compare(a, b):
        return PairedDifference(difference=a - b, interval=None, lower=0.0, higher=0.0, n=1)

    (verdict,) = judge(values, metric, {"description": "as said"}, compare)
    row = verdict.to_row()
    assert row.name == f"smoot minus sgt: {metric}"
    assert row.metrics[f"{metric}_difference"].values == {0: -1.0, 1: -3.0}
    assert row.details["sentence"].startswith(f"{QUANTITIES[metric][0]} of smoot minus sgt: -2.00 ± 1.41 (n=2)")
    assert row.convention == {"description": "as said"}
