"""The report of a comparison: rows of results.json, tables, and one HTML file with nothing to load from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from ..evaluation import Convention, Localisation, RefereeMatrix
from ..evaluation.results import Measurement, Results, Row, faithfulness_row, left_out_notes, localisation_row
from ..markup import markdown_text
from .figures import Measured
from .flags import data_name
from .html_page import figure, html_table, pairs, paragraphs, sentences, write_page
from .run import BudgetHistory, Run
from .verdict import QUANTITIES, Verdict

COLUMNS = {
    "accuracy": "Accuracy (%)",
    "k_min": "Min(K)",
    "k_median": "Median(K)",
    "k_max": "Max(K)",
    "gap": "Gap (higher is better)",
    "deletion_auc": "AUC (lower is better)",
    "random_auc": "AUC, random order",
    "insertion_auc": "Insertion AUC (higher is better)",
}
LOCALISATION_COLUMNS = {
    "outside_0.1": "Top 10 % outside the evidence (lower is better)",
    "relevance_mass": "Relevance mass on the evidence (higher is better)",
}
# Where the paper gives an AUC: what it says, and of which run of ours it speaks.
PAPER = {
    "mnist": "The paper, on MNIST after 100 epochs: AUC 36.35 for standard training, 33.16 for SMOOT; K of SMOOT 234 / "
    "388 / 544 (minimum / median / maximum of 784 pixels). One run each, and not every part of its convention is "
    "stated: differences between methods compare better than the numbers themselves."
}
_LOCALISATION = (
    "It is known where the evidence for the label lies, and the saliency is judged by how much of it lies there: the "
    "share of the 10 % most salient positions that lie outside the evidence, and the share of the map's mass that lies "
    "on it. Nothing is removed for this, so that it does not matter how a model bears missing pixels. The images are "
    "those that all methods of a seed classify correctly. A random map is the control."
)
# Its row in the table of localisation.
RANDOM_MAP = "random map"
_CAPTIONS = {
    "curves": (
        "Deletion curves",
        "Images still classified as their label after the most salient positions were replaced. Lines: mean over the "
        "seeds, bands: one standard deviation over the seeds. Dashed: the same models, positions in random order, the "
        "control. Each panel is one convention; numbers of different panels do not compare.",
    ),
    "saliency": (
        "Saliency of the three methods on the same images",
        "The first test image of each class; below it the magnitude of the gradient of the label's logit. Where the "
        "evidence is known, it is outlined.",
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
    tables: Mapping[str, str],
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
        tables: heading -> HTML of a table.
        figures: heading, caption and PNG file of each.
        results: whose settings and environment are listed.
    """
    sections = {
        "What was compared, and how": paragraphs(introduction),
        "The answer": sentences(verdict),
        **tables,
        "Differences between the methods": evidence,
        **{heading: figure(heading, caption, picture) for heading, caption, picture in figures},
        "Settings": pairs(results.settings),
        "Versions": pairs(results.environment),
    }
    write_page(path, title, sections)


def localisation_rows(measured: Mapping[str, Mapping[int, Localisation]]) -> list[Row]:
    """Each method, and what a random map scores on the same images."""
    rows = [localisation_row(method, by_seed) for method, by_seed in measured.items()]
    for by_seed in list(measured.values())[:1]:
        scores = next(iter(by_seed.values())).scores
        control = {
            name: Measurement({seed: one.scores[name].control for seed, one in by_seed.items()}) for name in scores
        }
        rows.append(Row(RANDOM_MAP, control, rows[0].convention))
    return rows


def removal_rows(panels: Mapping[Convention, Measured], by_method: Mapping[str, Mapping[int, Run]]) -> list[Row]:
    """Each method by each convention, with its K."""
    rows = []
    for measured in panels.values():
        for method, by_seed in measured.items():
            row = faithfulness_row(method, by_seed)
            rows.append(replace(row, metrics={**row.metrics, **_budgets(by_method[method])}))
    return rows


def referee_rows(referees: Mapping[int, RefereeMatrix]) -> list[Row]:
    """Each method's map, judged by each method: gap and area."""
    rows = []
    first = next(iter(referees.values())) if referees else RefereeMatrix((), {})
    for (i, of), (j, asked) in product(enumerate(first.names), repeat=2):
        metrics = {
            "referee_gap": Measurement({seed: float(matrix.gap[i, j]) for seed, matrix in referees.items()}),
            "referee_auc": Measurement({seed: float(matrix.deletion_auc[i, j]) for seed, matrix in referees.items()}),
        }
        convention = first.measured[of][asked].convention.to_dict()
        rows.append(Row(f"map of {of}, {asked} asked", metrics, convention, {"map": of, "asked": asked}))
    return rows


def _budgets(by_seed: Mapping[int, Run]) -> dict[str, Measurement]:
    """K over the training set at the end, where every run has one."""
    budgets = {seed: run.record.k for seed, run in by_seed.items() if run.record.k is not None}
    if len(budgets) < len(by_seed):
        return {}
    return {
        name: Measurement({seed: k[name] for seed, k in budgets.items()}, "positions")
        for name in ("k_min", "k_median", "k_max")
    }


def training_row(method: str, by_seed: Mapping[int, Run], histories: Mapping[Path, BudgetHistory | None]) -> Row:
    """Training time, and K by epoch; the histograms stand in the runs' folders."""
    times = {seed: run.record.train_seconds for seed, run in by_seed.items()}
    seconds = {seed: time for seed, time in times.items() if time is not None}
    found = {str(seed): histories[run.folder] for seed, run in by_seed.items()}
    budgets = {seed: history.statistics() for seed, history in found.items() if history is not None}
    metrics = {"train_seconds": Measurement(seconds, "seconds")} if seconds else {}
    return Row(f"{method}: training", metrics, None, {"k_by_epoch": budgets} if budgets else {})


def comparison_table(results: Results, verdicts: Sequence[Verdict]) -> str:
    """The answer, the Markdown tables, and below them the differences between methods in words."""
    parts = ["\n".join(f"- {markdown_text(sentence)}" for sentence in conclusion(verdicts)) + "\n"]
    for columns, rows in (
        (LOCALISATION_COLUMNS, results.rows_with("outside_0.1")),
        (COLUMNS, results.rows_with("deletion_auc")),
    ):
        if rows:
            parts.append(replace(results, rows=rows).markdown_table(columns))
    judged = results.rows_with("referee_gap")
    if judged:
        heads, *lines = [list(map(markdown_text, line)) for line in referee_table(judged)]
        table = [heads, ["---"] * len(heads), *lines]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in table) + "\n")
        parts.append(markdown_text(referee_note(judged)) + "\n")
    notes = [*left_out_notes(results.rows), *(f"{_heading(row)}{sentence}" for row, sentence in _sentences(results))]
    return "\n".join(parts) + "\n" + "\n".join(f"- {markdown_text(note)}" for note in notes) + "\n"


def referee_table(rows: Sequence[Row]) -> list[list[str]]:
    """The referee matrix: its heads, then a line for the map of each method, with "gap (AUC)" by each that is asked."""
    names = list(dict.fromkeys(row.details["map"] for row in rows))
    cells = {(row.details["map"], row.details["asked"]): row.metrics for row in rows}

    def cell(of: str, asked: str) -> str:
        metrics = cells[of, asked]
        return f"{metrics['referee_gap'].format_value()} ({metrics['referee_auc'].format_value()})"

    lines = [[f"map of {of}", *(cell(of, asked) for asked in names)] for of in names]
    return [["", *(f"{asked} asked" for asked in names)], *lines]


def referee_note(rows: Sequence[Row]) -> str:
    """What the referee matrix says, and its convention."""
    convention = rows[0].convention or {}
    return (
        "Gap, and in brackets AUC, where the map of one method ranks the positions and another method is asked; on the "
        "diagonal stands each method's own. Compare the numbers of one column: there the same models are asked. "
        f"Convention: {convention['description']}; n={rows[0].metrics['referee_gap'].n}."
    )


def _sentences(results: Results) -> list[tuple[Row, str]]:
    return [(row, str(row.details["sentence"])) for row in results.rows if "sentence" in row.details]


def _heading(row: Row) -> str:
    """Of a sentence about a row: the fill and the preset, where something was removed."""
    if row.convention is None or "fill" not in row.convention:
        return ""
    return f"{row.convention['fill']} fill, gradient of the {str(row.convention['score']).replace('_', '-')}: "


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        # n has a column of its own.
        cells = [row.metrics[name].format_value() if name in row.metrics else "–" for name in columns]
        heading = "" if row.convention is None else str(row.convention["description"])
        groups.setdefault(heading, []).append([row.name, str(max(m.n for m in row.metrics.values())), *cells])
    return html_table(["", "n", *columns.values()], groups)


def _difference(verdict: Verdict) -> list[str]:
    return [
        f"{verdict.quantity}: {verdict.first} minus {verdict.second}",
        verdict.measurement.format_value(),
        str(len(verdict.by_seed)),
        verdict.interval_text,
        verdict.outcome,
        verdict.pairs,
    ]


def conclusion(verdicts: Sequence[Verdict]) -> list[str]:
    """For SMOOT against each other method and each quantity: whether it is better beyond the noise of the seeds."""
    sentences = []
    for metric, (quantity, better) in QUANTITIES.items():
        for second in ("sgt", "standard"):
            found = [v for v in verdicts if (v.metric, v.first, v.second) == (metric, "smoot", second)]
            known = [v for v in found if v.outcome != "unknown"]
            if known:
                question = f"Is SMOOT's {quantity} {better} than that of {second} beyond the noise of "
                sentences.append(f"{question}{len(known[0].by_seed)} seeds? {_answer(known)}")
    return sentences or ["One seed each, or no seed in common: nothing can be said about the methods."]


def _answer(known: Sequence[Verdict]) -> str:
    numbers = f"{known[0].measurement.format_value()}, 95 % interval {known[0].interval_text}"
    if len(known) == 1:
        is_told = known[0].outcome in ("lower", "higher")
        return f"It is {known[0].outcome if is_told else 'not to be told apart'}: {numbers}."
    count = {outcome: sum(v.outcome == outcome for v in known) for outcome in ("lower", "higher")}
    return (
        f"Under {count['lower']} of {len(known)} conventions it is lower, under {count['higher']} higher, under "
        f"{len(known) - sum(count.values())} not to be told apart. By the first convention of the table: {numbers}."
    )


def write_method_report(
    path: Path, results: Results, verdicts: Sequence[Verdict], pictures: Mapping[str, Path]
) -> None:
    """Write `report.html`."""
    settings = results.settings
    methods, seeds = ", ".join(settings["methods"]), ", ".join(map(str, settings["seeds"]))
    data = data_name(str(settings["dataset"]), settings["planted"])
    located = results.rows_with("outside_0.1")
    introduction = [
        f"Image classifiers trained on {data} by {methods}, seeds {seeds}, evaluated on "
        f"{settings['test_images']} test images. Standard training uses cross-entropy alone; SGT masks the same number "
        "of least salient pixels in every training image; SMOOT gives every training image a number K of its own.",
        *([_LOCALISATION] if located else []),
        "Faithfulness is measured by deletion: positions are replaced by a fill, those that the saliency ranks highest "
        "first, and the share of images still classified correctly is followed. The area under this curve (AUC) is "
        "small where the saliency points at what the model uses. The convention moves the number as much as the "
        "training method does, so each number stands under its convention, and only numbers of one convention compare. "
        "The control is the same model with the positions removed in random order: an AUC that is not below it says "
        "nothing, and where the control is lower too, part of a low AUC is a model that bears any removal less well. "
        "The gap, which is the area where the least salient positions go first minus this AUC, cancels that to first "
        "order. It is 0 for a random ranking.",
        "K is counted over the training images at the end of training, in pixels, or in cells where mask_cell is above "
        "1. Values are mean ± standard deviation over n seeds.",
    ]
    groups: dict[str, list[list[str]]] = {}
    for verdict in verdicts:
        groups.setdefault(str(verdict.convention["description"]), []).append(_difference(verdict))
    differences = html_table(
        ["Difference of", "Mean ± std", "n", "95 % interval over seeds", "Over the seeds", "Over the images, by pair"],
        groups,
    )
    note = (
        "Better is a lower AUC, a lower share outside the evidence, a higher gap and a higher relevance mass. Models "
        "of one seed start from the same weights and are compared image by image. The interval is Student's t over the "
        "seeds: it excludes zero where the difference is beyond the noise. By pair: in how many of the seeds the "
        "difference is beyond the noise of the test images, by the 95 % interval of the paired differences."
    )
    paper = PAPER.get(
        str(settings["recipe"]), "The paper gives no AUC for this data set to stand beside these numbers."
    )
    tables = {"Saliency on the evidence": _table(located, LOCALISATION_COLUMNS)} if located else {}
    removed = _table(results.rows_with("deletion_auc"), COLUMNS)
    tables["Removal of salient positions"] = removed + paragraphs([*left_out_notes(results.rows), paper])
    judged = results.rows_with("referee_gap")
    if judged:
        heads, *lines = referee_table(judged)
        tables["Every map, judged by every method"] = html_table(heads, {"Gap (AUC)": lines}) + paragraphs(
            [referee_note(judged)]
        )
    write_report(
        path,
        title=f"{methods} on {Path(data).name}: how faithful is the saliency?",
        introduction=introduction,
        verdict=conclusion(verdicts),
        evidence=differences + paragraphs([note]),
        tables=tables,
        figures=[(*_CAPTIONS[name], picture) for name, picture in pictures.items()],
        results=results,
    )
