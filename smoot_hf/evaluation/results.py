"""Results: measured numbers with everything that they depend on, the file results.json, and tables of them."""

import json
import math
import platform
import reprlib
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from .. import __version__
from ..markup import markdown_text
from .faithfulness import Faithfulness
from .localisation import Localisation

logger = logging.get_logger(__name__)

SCHEMA_VERSION = 1
_DEEPEST = 50
# What the details count.
_COUNTS = {"n", "images", "undefined", "nan_skipped", "flat_skipped", "predictions", "nan_predictions"}
_COUNTS |= {"incorrect", "unmarked", "flat", "unlabelled"}

_TOP = {"schema_version": int, "task": str, "settings": dict, "environment": dict, "rows": list}
_ROW = {"name": str, "convention": dict | None, "metrics": dict, "details": dict}
_METRIC = {"unit": str, "values": dict, "mean": int | float, "std": int | float | None, "n": int}
_ENVIRONMENT = ("python", "torch", "transformers", "smoot_hf", "device", "commit")


@dataclass(frozen=True)
class Measurement:
    """One quantity, measured once per seed.

    Attributes:
        values: seed -> value, at least one.
        unit: of the values.

    Raises:
        ValueError: no value, or one that is not finite or so large that mean or spread are not.
    """

    values: Mapping[int, float]
    unit: str = "percent"

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values must hold at least one seed, got none")
        if not all(map(_is_finite, self.values.values())):
            raise ValueError(f"values must be finite, got {reprlib.repr(dict(self.values))}")
        try:
            is_finite = math.isfinite(self.mean) and math.isfinite(self.std or 0.0)
        except OverflowError:
            is_finite = False
        if not is_finite:
            raise ValueError(f"values must have a finite mean and spread, got {reprlib.repr(dict(self.values))}")

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; `None` for a single one, which says nothing about the spread."""
        return statistics.stdev(self.values.values()) if self.n > 1 else None

    def format(self, digits: int = 2) -> str:
        """Mean, spread and number of seeds: "98.12 ± 0.05 (n=3)", or "98.12 (n=1)"."""
        return f"{self.format_value(digits)} (n={self.n})"

    def format_value(self, digits: int = 2) -> str:
        """Mean and spread alone: "98.12 ± 0.05", or "98.12"."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"

    def to_dict(self) -> dict[str, Any]:
        """As in the schema."""
        values = {str(seed): float(value) for seed, value in self.values.items()}
        return {"unit": self.unit, "values": values, "mean": self.mean, "std": self.std, "n": self.n}


@dataclass(frozen=True)
class Row:
    """One line of a table: a method, with what was measured of it under one convention."""

    name: str
    metrics: Mapping[str, Measurement]
    convention: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As in the schema."""
        metrics = {name: measurement.to_dict() for name, measurement in self.metrics.items()}
        convention = None if self.convention is None else dict(self.convention)
        return {"name": self.name, "convention": convention, "metrics": metrics, "details": dict(self.details)}


@dataclass(frozen=True)
class Results:
    """What a run or an evaluation has measured: the content of results.json."""

    task: str
    settings: Mapping[str, Any]
    environment: Mapping[str, str | None]
    rows: Sequence[Row]

    def to_dict(self) -> dict[str, Any]:
        """As in the schema."""
        return {
            "schema_version": SCHEMA_VERSION,
            "task": self.task,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "rows": [row.to_dict() for row in self.rows],
        }

    def rows_with(self, metric: str) -> list[Row]:
        """The rows that hold a metric."""
        return [row for row in self.rows if metric in row.metrics]

    def save(self, path: str | Path) -> None:
        """Write results.json.

        Raises:
            ValueError: the content does not keep to the schema or is no JSON; the message names the place.
        """
        content = self.to_dict()
        validate(content)
        Path(path).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def markdown_table(
        self, columns: Mapping[str, str], digits: int = 2, cell: Callable[[Row, str], str] | None = None
    ) -> str:
        """A Markdown table, one line per row, and below it the conventions, numbered; "–" where a row lacks the metric.

        Args:
            columns: name of the metric -> heading, in the order of the table.
            digits: decimals.
            cell: what to write for a row and a metric that it has, in place of `Measurement.format(digits)`.
        """
        cell = cell or (lambda row, name: row.metrics[name].format(digits))
        notes: list[str] = []
        lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in self.rows:
            note = None if row.convention is None else str(row.convention.get("description", dict(row.convention)))
            if note is not None and note not in notes:
                notes.append(note)
            mark = "" if note is None else f" [{notes.index(note) + 1}]"
            cells = [cell(row, name) if name in row.metrics else "–" for name in columns]
            lines.append(f"| {markdown_text(row.name)}{mark} | " + " | ".join(cells) + " |")
        # A blank line ends the table; two spaces end a line.
        lines += ["", *(f"[{i}] {markdown_text(note)}  " for i, note in enumerate(notes, 1))] if notes else []
        return "\n".join(lines) + "\n"


def faithfulness_row(name: str, by_seed: Mapping[int, Faithfulness]) -> Row:
    """One line from one method's measurements, one per seed, all by the same convention.

    The metrics are `accuracy`, `deletion_auc` and, where measured, `insertion_auc`, `gap` and `random_auc`. Of a
    multi-label model `mean_average_precision` and `subset_accuracy` take the place of `accuracy`, and
    `mean_average_precision_auc` stands beside `deletion_auc`. The curves and their intervals over the images stand in
    the details, by seed.

    Raises:
        ValueError: no measurement, or more than one convention or data set.
    """
    conventions = {measured.convention for measured in by_seed.values()}
    if len(conventions) != 1:
        raise ValueError(f"row {name!r} must have one convention, got {len(conventions)}")
    fingerprints = {measured.dataset_fingerprint for measured in by_seed.values()}
    if len(fingerprints) != 1:
        raise ValueError(
            f"row {name!r} must be measured on one data set, got the fingerprints {sorted(map(str, fingerprints))}"
        )
    metrics = {}
    areas = ("deletion_auc", "insertion_auc", "gap", "random_auc")
    of_labels = ("mean_average_precision", "subset_accuracy", *areas, "mean_average_precision_auc")
    is_multi_label = next(iter(by_seed.values())).is_multi_label
    for metric in of_labels if is_multi_label else ("accuracy", *areas):
        values = {seed: getattr(measured, metric) for seed, measured in by_seed.items()}
        if None not in values.values():
            metrics[metric] = Measurement(values)
    details = {str(seed): measured.to_dict() for seed, measured in by_seed.items()}
    for detail in details.values():
        del detail["convention"]
    return Row(name, metrics, conventions.pop().to_dict(), {"by_seed": details})


def localisation_row(name: str, by_seed: Mapping[int, Localisation]) -> Row:
    """One line from one method's measurements of localisation, one per seed, all made in the same way.

    The metrics are `accuracy` (of a multi-label model `recall`) and the names of `Localisation.scores`; intervals,
    chance levels, random maps and counts stand in the details, by seed.

    Raises:
        ValueError: no measurement, or several ways of measuring or data sets.
    """
    ways = {(measured.description, measured.dataset_fingerprint) for measured in by_seed.values()}
    if len(ways) != 1:
        raise ValueError(f"row {name!r} must be measured in one way on one data set, got {sorted(ways)}")
    first = next(iter(by_seed.values()))
    name_of_accuracy = "accuracy" if first.recall is None else "recall"
    metrics = {name_of_accuracy: Measurement({seed: measured.accuracy for seed, measured in by_seed.items()})}
    for score in first.scores:
        metrics[score] = Measurement({seed: measured.scores[score].value for seed, measured in by_seed.items()})
    details = {str(seed): measured.to_dict() for seed, measured in by_seed.items()}
    return Row(name, metrics, {"description": first.description}, {"by_seed": details})


def left_out_notes(rows: Sequence[Row]) -> list[str]:
    """A sentence for everything that was left out of a number or counted as wrong.

    These are images left out because their attribution holds a NaN or is flat, predictions counted as wrong because
    they hold a NaN, and maps without a rank correlation.

    Args:
        rows: of faithfulness, with their measurements by seed in the details, and of image classes and random weights,
            with theirs as `smoot-hf evaluate` writes them. Other rows are passed over.
    """
    return [
        f"{row.name}{seed}{_fill(row.convention)}: {sentence}"
        for row in rows
        if row.convention is not None
        for seed, found in _measurements(row)
        for sentence in _sentences(found)
    ]


def _fill(convention: Mapping[str, Any]) -> str:
    return f", {convention['fill']} fill" if "fill" in convention else ""


def _measurements(row: Row) -> list[tuple[str, Mapping[str, Any]]]:
    """What a row has measured of images: by seed, or (image classes, random weights) once."""
    by_seed = [(f", seed {seed}", found) for seed, found in row.details.get("by_seed", {}).items()]
    return by_seed + [("", row.details[name]) for name in ("image_classes", "random_weights") if name in row.details]


_LEFT_OUT = {
    "nan_skipped": "attribution holds a NaN",
    "flat_skipped": "attribution has one value at all positions",
    "unlabelled": "row of labels is all 0",
    "unmarked": "evidence is nothing or the whole image",
}


def _sentences(found: Mapping[str, Any]) -> list[str]:
    sentences = []
    for count, reason in _LEFT_OUT.items():
        if found.get(count):
            sentences.append(f"{found[count]} images left out, whose {reason}; {found.get('n', '?')} measured.")
    if found.get("flat"):
        sentences.append(
            f"{found['flat']} images measured at chance level, whose attribution has one value throughout."
        )
    if found.get("nan_predictions"):
        sentences.append(
            f"{found['nan_predictions']} of {found.get('predictions', '?')} predictions hold a NaN or an infinity, and "
            "count as wrong."
        )
    if found.get("undefined"):
        sentences.append(
            f"{found['undefined']} of {found.get('images', '?')} maps have no rank correlation with random weights, "
            "because one of the two is constant or holds a NaN."
        )
    return sentences


def load_results(path: str | Path) -> Results:
    """Read results.json.

    A file of an older version may not say which data set was measured; a warning names its rows.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no JSON, is of another version, or does not keep to the schema; the message names the
            file and the place in it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    # Not JSON, not UTF-8, an integer of thousands of digits, or brackets without end.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from error
    try:
        validate(content)
    except ValueError as error:
        raise ValueError(f"{path} does not keep to the schema of results.json: {error}") from error
    rows = [
        Row(
            row["name"],
            {name: _measurement(m) for name, m in row["metrics"].items()},
            row["convention"],
            row["details"],
        )
        for row in content["rows"]
    ]
    unknown = [row.name for row in rows if _is_of_unknown_data(row)]
    if unknown:
        logger.warning(
            f"{path} does not say which data set {', '.join(map(repr, unknown))} was measured on: an older version "
            "wrote it. Measure again before comparing it with others image by image."
        )
    return Results(content["task"], content["settings"], content["environment"], rows)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _is_of_unknown_data(row: Row) -> bool:
    """Whether the row holds a deletion curve that does not name its data set."""
    measured = [found for found in row.details.get("by_seed", {}).values() if "deletion" in found]
    return any(found.get("dataset_fingerprint") is None for found in measured)


def _measurement(metric: Mapping[str, Any]) -> Measurement:
    return Measurement({int(seed): value for seed, value in metric["values"].items()}, metric["unit"])


def validate(content: Any) -> None:
    """Check the content of results.json against the schema.

    Raises:
        ValueError: the content does not keep to it; the message names the first place.
    """
    if isinstance(content, dict) and content.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        given = reprlib.repr(content["schema_version"])
        raise ValueError(f"results.json has schema_version {given}; this package reads {SCHEMA_VERSION}")
    _check_depth(content)
    _check_fields(content, _TOP, "results.json")
    for name in _ENVIRONMENT:
        value = content["environment"].get(name, ...)
        if not (isinstance(value, str) or (name == "commit" and value is None)):
            given = reprlib.repr(None if value is ... else value)
            raise ValueError(f"environment must name {name!r} as text, got {given}")
    for i, row in enumerate(content["rows"]):
        _check_fields(row, _ROW, f"rows[{i}]")
        for name, metric in row["metrics"].items():
            _check_metric(metric, f"rows[{i}].metrics[{reprlib.repr(name)}]")
        _check_details(row["details"], f"rows[{i}].details")
    keys = [(row["name"], json.dumps(row["convention"], sort_keys=True)) for row in content["rows"]]
    twice = [name for name, convention in keys if keys.count((name, convention)) > 1]
    if twice:
        raise ValueError(f"rows must be unique by name and convention, got {reprlib.repr(twice[0])} twice")


def _check_depth(content: Any) -> None:
    """Raise a ValueError where objects and lists stand in each other too deep to be written or compared."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"results.json must not be more than {_DEEPEST} objects and lists deep")


def _check_details(details: Mapping[str, Any], place: str) -> None:
    """What the tables and their notes read of the details."""
    found = {name: details[name] for name in ("by_seed", "image_classes", "random_weights") if name in details}
    for name, value in found.items():
        _check_object(value, f"{place}.{name}")
    for seed, value in found.pop("by_seed", {}).items():
        found[f"by_seed[{reprlib.repr(seed)}]"] = value
    for name, value in found.items():
        _check_object(value, f"{place}.{name}")
        for count in _COUNTS & value.keys():
            if not isinstance(value[count], int) or isinstance(value[count], bool) or not _is_finite(value[count]):
                raise ValueError(f"{place}.{name}.{count} must be int, got {reprlib.repr(value[count])}")


def _check_object(content: Any, place: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{place} must be an object, got {type(content).__name__}")


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (OverflowError, TypeError):
        return False


def _check_fields(content: Any, fields: Mapping[str, Any], place: str) -> None:
    _check_object(content, place)
    for name, kind in fields.items():
        if name not in content:
            raise ValueError(f"{place} must have {name!r}, got {reprlib.repr(sorted(content))}")
        value = content[name]
        is_number = isinstance(value, int | float)
        if not isinstance(value, kind) or isinstance(value, bool) or (is_number and not _is_finite(value)):
            raise ValueError(f"{place}.{name} must be {getattr(kind, '__name__', kind)}, got {reprlib.repr(value)}")


def _check_metric(metric: Any, place: str) -> None:
    _check_fields(metric, _METRIC, place)
    for seed, value in metric["values"].items():
        if not (_is_seed(seed) and _is_finite(value)):
            raise ValueError(
                f"{place}.values must map seeds to numbers, got {reprlib.repr(seed)}: {reprlib.repr(value)}"
            )
    try:
        expected = _measurement(metric).to_dict()
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    for name in ("mean", "std", "n"):
        given, true = metric[name], expected[name]
        if (given is None) != (true is None) or (given is not None and not math.isclose(given, true, rel_tol=1e-9)):
            raise ValueError(f"{place}.{name} must be {true}, which the values give, got {given}")


def _is_seed(text: str) -> bool:
    """Whether it is an integer as `str` writes it: "01" and "1" would be one seed."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 30 and str(int(text)) == text


def describe_environment(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Versions, the device that was computed on, and the commit of the package ("+changes" where files differ from it).

    `commit` is `None` where the package does not run from a git checkout.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": version("timm"),
        "datasets": version("datasets"),
        "smoot_hf": __version__,
        "device": f"{device.type}: {name}",
        "commit": _commit(Path(__file__)),
    }


def _commit(source: Path) -> str | None:
    git = ["git", "-C", str(source.parent)]
    # Installed below some other project's checkout, the file is not one of that project's.
    commands = ["ls-files", "--error-unmatch", source.name], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]
    try:
        runs = [subprocess.run([*git, *c], capture_output=True, text=True, check=True) for c in commands]
    except (OSError, subprocess.CalledProcessError):
        return None
    return runs[1].stdout.strip() + ("+changes" if runs[2].stdout.strip() else "")
