"""The verdict: whether what was measured of one training method differs from another's by more than the noise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypeVar

from ..evaluation.comparison import PairedDifference
from ..evaluation.intervals import mean_interval
from ..evaluation.results import Measurement, Row

# What the methods are compared by: metric -> what it is called, and which way is better.
QUANTITIES: dict[str, tuple[str, Literal["lower", "higher"]]] = {
    "outside_0.1": ("share of the top 10 % outside the evidence", "lower"),
    "relevance_mass": ("relevance mass on the evidence", "higher"),
    "gap": ("gap", "higher"),
    "deletion_auc": ("AUC", "lower"),
}

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Verdict:
    """One quantity of the first method minus that of the second, seed by seed.

    Attributes:
        first: a training method.
        second: another.
        metric: of `QUANTITIES`.
        convention: how it was measured, with its "description".
        by_seed: seed -> paired difference over the images of the two models of that seed; at least one.
    """

    first: str
    second: str
    metric: str
    convention: Mapping[str, Any]
    by_seed: Mapping[int, PairedDifference]

    @property
    def quantity(self) -> str:
        """What the metric is called."""
        return QUANTITIES[self.metric][0]

    @property
    def measurement(self) -> Measurement:
        """The differences, one per seed."""
        return Measurement({seed: paired.difference for seed, paired in self.by_seed.items()}, "percent")

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean difference over seeds, by Student's t.

        `None` for a single seed, and for differences that are all the same, which say nothing about their spread.
        """
        return mean_interval(list(self.measurement.values.values()))

    @property
    def outcome(self) -> Literal["lower", "higher", "not to be told apart", "unknown"]:
        """Of the first method, beyond the noise of the seeds.

        "unknown" with a single seed, and where the seeds differ by one and the same number, which leaves no interval.
        Where they do not differ at all, as when K never moved, the methods cannot be told apart.
        """
        differences = list(self.measurement.values.values())
        if self.interval is None:
            return "unknown" if len(differences) < 2 or any(differences) else "not to be told apart"
        low, high = self.interval
        return "lower" if high < 0 else "higher" if low > 0 else "not to be told apart"

    @property
    def pairs(self) -> str:
        """How many of the seeds' pairs of models the test images alone tell apart."""
        intervals = [paired.interval for paired in self.by_seed.values() if paired.interval is not None]
        lower, higher = sum(high < 0 for _, high in intervals), sum(low > 0 for low, _ in intervals)
        return f"{lower} lower, {higher} higher of {len(self.by_seed)}"

    @property
    def interval_text(self) -> str:
        """The interval in words."""
        return "–" if self.interval is None else f"{self.interval[0]:+.2f} to {self.interval[1]:+.2f}"

    def sentence(self) -> str:
        """In words, with the numbers that it rests on."""
        return (
            f"{self.quantity} of {self.first} minus {self.second}: {self.measurement.format()}, 95 % interval over "
            f"seeds {self.interval_text}: {self.outcome} (image by image: {self.pairs} pairs)"
        )

    def to_row(self) -> Row:
        """A row of `results.json`, the intervals over the images in its details."""
        details = {
            str(seed): {
                "interval": paired.interval and list(paired.interval),
                "lower": paired.lower,
                "higher": paired.higher,
                "n": paired.n,
            }
            for seed, paired in self.by_seed.items()
        }
        interval = self.interval and list(self.interval)
        return Row(
            f"{self.first} minus {self.second}: {self.metric}",
            {f"{self.metric}_difference": self.measurement},
            self.convention,
            {"interval_over_seeds": interval, "by_seed": details, "sentence": self.sentence()},
        )


def judge(
    measured: Mapping[str, Mapping[int, Measured]],
    metric: str,
    convention: Mapping[str, Any],
    compare: Callable[[Measured, Measured], PairedDifference],
) -> list[Verdict]:
    """Every later method against every earlier one, on the seeds that both have.

    Args:
        measured: method -> seed -> measurement, all made in the same way.
        metric: of `QUANTITIES`.
        convention: how it was measured.
        compare: the first minus the second of two measurements, image by image.
    """
    verdicts = []
    for second, first in combinations(measured, 2):
        seeds = sorted(measured[first].keys() & measured[second].keys())
        by_seed = {seed: compare(measured[first][seed], measured[second][seed]) for seed in seeds}
        if by_seed:
            verdicts.append(Verdict(first, second, metric, convention, by_seed))
    return verdicts
