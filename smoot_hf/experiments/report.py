"""The report of a comparison: rows of results.json, tables, and one HTML file with nothing to load from elsewhere."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..evaluation import Convention
from ..evaluation.results import Measurement, Results, Row, describe_environment, faithfulness_row, left_out_notes
from ..markup import markdown_text, one_line
from .figures import Measured
from .run import BudgetHistory, Run
from .verdict import Verdict

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 960px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 14px; margin: 1em 0; }
.wide { overflow-x: auto; }
th, td { padding: 4px 9px; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
th { vertical-align: bottom; white-space: normal; }
td.group { background: #f4f6f8; font-size: 13px; text-align: left; white-space: normal; }
.settings td { text-align: left; white-space: normal; }
.settings td:first-child { white-space: nowrap; vertical-align: top; }
img { max-width: 100%; } figure { margin: 1em 0; } figcaption, .note { color: #555; font-size: 14px; }
.verdict { border-left: 4px solid #0072b2; padding: 0.5em 1em 0.5em 2em; background: #f4f8fb; }
"""

COLUMNS = {
    "accuracy": "Accuracy (%)",
    "k_min": "Min(K)",
    "k_median": "Median(K)",
    "k_max": "Max(K)",
    "deletion_auc": "AUC (lower is better)",
    "random_auc": "AUC, random order",
    "insertion_auc": "Insertion AUC (higher is better)",
}
# Where the paper gives an AUC: what it says, and of which run of ours it speaks.
PAPER = {
    "mnist": "The paper, on MNIST after 100 epochs: AUC 36.35 for standard training, 33.16 for SMOOT; K of SMOOT 234 / "
    "388 / 544 (minimum / median / maximum of 784 pixels). One run each, and not every part of its convention is "
    "stated: differences between methods compare better than the numbers themselves."
}
_CAPTIONS = {
    "curves": (
        "Deletion curves",
        "Images still classified as their label after the most salient positions were replaced. Lines: mean over the "
        "seeds, bands: one standard deviation over the seeds. Dashed: the same models, positions in random order, the "
        "control. Each panel is one convention; numbers of different panels do not compare.",
    ),
    "saliency": (
        "Saliency of the three methods on the same images",
        "The first test image of each class; below it the magnitude of the gradient of the label's logit.",
    ),
    "k": (
        "K over the epochs",
        "How many training images have which K (number of masked positions) after each epoch of SMOOT.",
    ),
}


def write_report(
    path: Path,
    *,
    title: str,
    introduction: Sequence[str],
    verdict: Sequence[str],
    evidence: str,
    table: str,
    figures: Sequence[tuple[str, str, Path]],
    results: Results,
) -> None:
    """Write the file.

    Args:
        path: of the file.
        title: heading.
        introduction: paragraphs that say what was compared and how.
        verdict: sentences that answer the question of the comparison.
        evidence: HTML of what the verdict rests on.
        table: HTML of the main table.
        figures: heading, caption and PNG file of each.
        results: whose settings and environment are listed.
    """
    sections = {
        "What was compared, and how": paragraphs(introduction),
        "The answer": _list(verdict),
        "Table": table,
        "Differences between the methods": evidence,
        **{heading: _figure(heading, caption, picture) for heading, caption, picture in figures},
        "Settings": _pairs(results.settings),
        "Versions": _pairs(results.environment),
    }
    body = "\n".join(f"<h2>{_escaped(heading)}</h2>{content}" for heading, content in sections.items())
    head = f'<meta charset="utf-8"><title>{_escaped(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{_escaped(title)}</h1>\n{body}"
    path.write_text(f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n', "utf-8")


def html_table(heads: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """A table of given texts, in groups of lines with a heading each."""
    lines = ["".join(f"<th>{_escaped(text)}</th>" for text in heads)]
    for heading, group in groups.items():
        lines.append(f'<td class="group" colspan="{len(heads)}">{_escaped(heading)}</td>')
        lines += ["".join(f"<td>{_escaped(text)}</td>" for text in line) for line in group]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def paragraphs(texts: Sequence[str]) -> str:
    """One paragraph each."""
    return "".join(f"<p>{_escaped(text)}</p>" for text in texts)


def _escaped(text: str) -> str:
    """A text as HTML shows it, whatever a name in it holds."""
    return html.escape(one_line(text))


def _list(texts: Sequence[str]) -> str:
    return '<ul class="verdict">' + "".join(f"<li>{_escaped(text)}</li>" for text in texts) + "</ul>"


def _figure(heading: str, caption: str, picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="{_escaped(heading)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{_escaped(caption)}</figcaption></figure>"


def _pairs(values: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{_escaped(name)}</td><td>{_escaped(_text(value))}</td></tr>" for name, value in values.items()
    )
    return f'<table class="settings">{lines}</table>'


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def comparison_results(
    settings: Mapping[str, Any],
    panels: Mapping[Convention, Measured],
    verdicts: Mapping[Convention, Sequence[Verdict]],
    by_method: Mapping[str, Mapping[int, Run]],
    histories: Mapping[Path, BudgetHistory | None],
    device: torch.device,
) -> Results:
    """All rows: each method by each convention, the differences between methods, and each method's training."""
    rows = []
    for measured in panels.values():
        for method, by_seed in measured.items():
            row = faithfulness_row(method, by_seed)
            rows.append(replace(row, metrics={**row.metrics, **_budgets(by_method[method])}))
    for convention, found in verdicts.items():
        rows += [verdict.to_row(convention.to_dict()) for verdict in found]
    rows += [_training_row(method, by_seed, histories) for method, by_seed in by_method.items()]
    return Results("compare_methods", settings, describe_environment(device), rows)


def _budgets(by_seed: Mapping[int, Run]) -> dict[str, Measurement]:
    """K over the training set at the end, where every run has one."""
    budgets = {seed: run.record.k for seed, run in by_seed.items() if run.record.k is not None}
    if len(budgets) < len(by_seed):
        return {}
    return {
        name: Measurement({seed: k[name] for seed, k in budgets.items()}, "positions")
        for name in ("k_min", "k_median", "k_max")
    }


def _training_row(method: str, by_seed: Mapping[int, Run], histories: Mapping[Path, BudgetHistory | None]) -> Row:
    """Training time, and K by epoch; the histograms stand in the runs' folders."""
    times = {seed: run.record.train_seconds for seed, run in by_seed.items()}
    seconds = {seed: time for seed, time in times.items() if time is not None}
    found = {str(seed): histories[run.folder] for seed, run in by_seed.items()}
    budgets = {seed: history.statistics() for seed, history in found.items() if history is not None}
    metrics = {"train_seconds": Measurement(seconds, "seconds")} if seconds else {}
    return Row(f"{method}: training", metrics, None, {"k_by_epoch": budgets} if budgets else {})


def comparison_table(results: Results) -> str:
    """The Markdown table, and below it the differences between methods in words."""
    table = replace(results, rows=_measured_rows(results)).markdown_table(COLUMNS)
    lines = [f"- {markdown_text(note)}" for note in left_out_notes(results.rows)]
    lines += [
        f"- {row.convention['fill']} fill, {_preset(row)}: {markdown_text(sentence)}"
        for row, sentence in _sentences(results)
        if row.convention is not None
    ]
    return table + "\n" + "\n".join(lines) + "\n"


def _measured_rows(results: Results) -> list[Row]:
    return [row for row in results.rows if "deletion_auc" in row.metrics]


def _sentences(results: Results) -> list[tuple[Row, str]]:
    return [(row, str(row.details["sentence"])) for row in results.rows if "sentence" in row.details]


def _preset(row: Row) -> str:
    return "" if row.convention is None else f"gradient of the {str(row.convention['score']).replace('_', '-')}"


def _main_table(rows: Sequence[Row]) -> str:
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        # n has a column of its own.
        cells = [row.metrics[name].format_value() if name in row.metrics else "–" for name in COLUMNS]
        heading = "" if row.convention is None else str(row.convention["description"])
        groups.setdefault(heading, []).append([row.name, str(row.metrics["deletion_auc"].n), *cells])
    return html_table(["", "n", *COLUMNS.values()], groups)


def _difference(verdict: Verdict) -> tuple[str, str, str]:
    return f"{verdict.first} minus {verdict.second}", verdict.measurement.format_value(), str(len(verdict.by_seed))


def conclusion(verdicts: Mapping[Convention, Sequence[Verdict]]) -> list[str]:
    """For SMOOT against each other method: by how many of the conventions its AUC is lower beyond the noise."""
    sentences = []
    for second in ("sgt", "standard"):
        found = [v for several in verdicts.values() for v in several if (v.first, v.second) == ("smoot", second)]
        known = [v for v in found if v.outcome != "unknown"]
        if known:
            count = {outcome: sum(v.outcome == outcome for v in known) for outcome in ("lower", "higher")}
            same = len(known) - sum(count.values())
            sentences.append(
                f"Is SMOOT's AUC lower than that of {second} beyond the noise of {len(known[0].by_seed)} seeds? Under "
                f"{count['lower']} of {len(known)} conventions it is lower, under {count['higher']} higher, under "
                f"{same} not to be told apart. By the first convention of the table: "
                f"{known[0].measurement.format_value()}, 95 % interval {known[0].interval_text}."
            )
    return sentences or ["One seed each, or no seed in common: nothing can be said about the methods."]


def write_method_report(
    path: Path, results: Results, verdicts: Mapping[Convention, Sequence[Verdict]], pictures: Mapping[str, Path]
) -> None:
    """Write `report.html`."""
    settings = results.settings
    methods, seeds = ", ".join(settings["methods"]), ", ".join(map(str, settings["seeds"]))
    introduction = [
        f"Image classifiers trained on {settings['dataset']} by {methods}, seeds {seeds}, evaluated on "
        f"{settings['test_images']} test images. Standard training uses cross-entropy alone; SGT masks the same number "
        "of least salient pixels in every training image; SMOOT gives every training image a number K of its own.",
        "Faithfulness is measured by deletion: positions are replaced by a fill, those that the saliency ranks highest "
        "first, and the share of images still classified correctly is followed. The area under this curve (AUC) is "
        "small where the saliency points at what the model uses. The convention moves the number as much as the "
        "training method does, so each number stands under its convention, and only numbers of one convention compare. "
        "The control is the same model with the positions removed in random order: an AUC that is not below it says "
        "nothing, and where the control is lower too, part of a low AUC is a model that bears any removal less well.",
        "K is counted over the training images at the end of training, in pixels, or in cells where mask_cell is above "
        "1. Values are mean ± standard deviation over n seeds.",
    ]
    differences = html_table(
        ["AUC of", "Difference", "n", "95 % interval over seeds", "Over the seeds", "Over the images, by pair"],
        {
            convention.describe(): [[*_difference(v), v.interval_text, v.outcome, v.pairs] for v in found]
            for convention, found in verdicts.items()
        },
    )
    note = (
        "Difference of AUC, negative: the first is better; models of one seed start from the same weights and are "
        "compared image by image. The interval is Student's t over the seeds: it excludes zero where the difference is "
        "beyond the noise. By pair: in how many of the seeds the difference is beyond the noise of the test images, by "
        "the 95 % interval of the paired differences."
    )
    paper = PAPER.get(
        str(settings["recipe"]), "The paper gives no AUC for this data set to stand beside these numbers."
    )
    write_report(
        path,
        title=f"{methods} on {Path(str(settings['dataset'])).name}: how faithful is the saliency?",
        introduction=introduction,
        verdict=conclusion(verdicts),
        evidence=differences + paragraphs([note]),
        table=_main_table(_measured_rows(results)) + paragraphs([*left_out_notes(results.rows), paper]),
        figures=[(*_CAPTIONS[name], picture) for name, picture in pictures.items()],
        results=results,
    )
