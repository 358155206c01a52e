"""The table of a campaign: every setting against one of them, paired by seed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..evaluation.intervals import mean_interval

# results.json of a run, as `campaign_queue` writes it.
Result = Mapping[str, Any]


class Paired(NamedTuple):
    """The difference of two settings over the seeds that both have.

    Attributes:
        mean: of the differences.
        std: their standard deviation; `None` for a single seed.
        n: how many seeds.
        interval: 95 % interval of the mean by Student's t; `None` for a single seed or equal differences.
    """

    mean: float
    std: float | None
    n: int
    interval: tuple[float, float] | None

    def text(self) -> str:
        """In words: mean, standard deviation, n, interval."""
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        ends = "" if self.interval is None else f", {self.interval[0]:+.2f} to {self.interval[1]:+.2f}"
        return f"{self.mean:+.2f}{spread} (n = {self.n}){ends}"


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Paired | None:
    """Values minus others, by seed; `None` where they share none."""
    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if not differences:
        return None
    std = statistics.stdev(differences) if len(differences) > 1 else None
    return Paired(statistics.fmean(differences), std, len(differences), mean_interval(differences))


def value_of(result: Result, measure: str) -> float | None:
    """A number of a run by the name of its column; `None` where it was not measured."""
    if measure in ("accuracy", "mean_average_precision"):
        return result.get(measure)
    if measure in ("gap", "auc"):
        return result["deletion"][measure] if "deletion" in result else None
    if measure == "diff_roar":
        return result["diff_roar"]["difference"] if "diff_roar" in result else None
    score = result.get("localisation", {}).get("scores", {}).get(measure)
    return None if score is None else score["value"]


def group(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Results by the name of their setting and their seed."""
    by_setting: dict[str, dict[int, Result]] = {}
    for result in results:
        by_setting.setdefault(result["settings"]["name"], {})[result["settings"]["seed"]] = result
    return by_setting


def values_of(runs: Mapping[int, Result], measure: str) -> dict[int, float]:
    """A measure of every seed that it was measured for, see `value_of`."""
    found = {seed: value_of(result, measure) for seed, result in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def summary(results: Sequence[Result], score: str, against: str) -> str:
    """A Markdown table: mean and standard deviation over seeds, and the difference to one setting, paired by seed.

    Args:
        results: of finished runs.
        score: the localisation score to show, for example "outside_0.1".
        against: the name of the setting that all are compared with.

    Raises:
        ValueError: no finished run, or none of the setting that is compared with.
    """
    by_setting = group(results)
    if against not in by_setting:
        raise ValueError(f"no finished run of the setting {against!r}: there are {', '.join(by_setting) or 'none'}")
    others = ("accuracy", "mean_average_precision", "gap", "diff_roar")
    measures = [name for name in (score, *others) if values_of(by_setting[against], name)]
    head = ["setting", *(f"{name}; minus {against}" for name in measures), "K min / median / max", "CPU s"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for name, runs in by_setting.items():
        cells = [name]
        for measure in measures:
            values = values_of(runs, measure)
            difference = None if name == against else paired(values, values_of(by_setting[against], measure))
            cells.append("; ".join([_spread(values), *([difference.text()] if difference else [])]))
        lines.append(" | ".join([*cells, _k(runs), f"{statistics.fmean(_seconds(run) for run in runs.values()):.0f}"]))
    compared = len(by_setting) - 1
    note = (
        "Differences are paired by seed, with their standard deviation, n, and 95 % interval by Student's t. Settings "
        f"compared with {against}: {compared}; about one interval in twenty excludes 0 by luck alone."
    )
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{note}"


def _spread(values: Mapping[int, float]) -> str:
    if not values:
        return "–"
    mean = statistics.fmean(values.values())
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {statistics.stdev(values.values()):.2f}"


def _k(runs: Mapping[int, Result]) -> str:
    """Least, median of the medians, and largest over the seeds."""
    found = [result["k"] for result in runs.values() if result["k"] is not None]
    if not found:
        return "–"
    low, high = min(k["k_min"] for k in found), max(k["k_max"] for k in found)
    return f"{low:g} / {statistics.median(k['k_median'] for k in found):g} / {high:g}"


def _seconds(result: Result) -> float:
    """Of the processor: what others on the machine do not lengthen."""
    return result["seconds"]["train_cpu"] + result["seconds"]["judge_cpu"]
