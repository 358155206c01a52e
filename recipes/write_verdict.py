"""Write the tables and figures of docs/verdict.md from the runs in recipes/campaigns/results/.

    python recipes/write_verdict.py [--maps FOLDER --source DATA]

Time: 20 seconds. The tables stand in the page between comments with their names and are replaced; the figures are
written into docs/figures/. --maps also draws the saliency maps of the same test images under several settings, with the
trained networks that a campaign has left in FOLDER; DATA is where its images are.

In every table a difference is paired by seed and stands with its 95 % interval by Student's t. It is bold where it is
beyond zero even after Bonferroni's correction for all the differences of its kind in the table.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file
from scipy.stats import spearmanr, t

from smoot_hf.evaluation.attributions import attribute
from smoot_hf.experiments.campaign_images import Data, make_splits
from smoot_hf.experiments.campaign_queue import WEIGHTS_NAME, read_campaign, read_export, result_path
from smoot_hf.experiments.campaign_run import make_network
from smoot_hf.experiments.campaign_summary import Paired, Result, group, paired, values_of
from smoot_hf.experiments.figures import DPI, STYLE, WIDTH
from smoot_hf.experiments.run import write_whole
from smoot_hf.models.logits import LogitsModel

ROOT = Path(__file__).parent.parent
PAGE, FIGURES, CAMPAIGNS = ROOT / "docs" / "verdict.md", ROOT / "docs" / "figures", Path(__file__).parent / "campaigns"
NULL = "outside_0.1"
MEASURES = (NULL, "accuracy", "gap")

# Campaign file and results of each set; the settings of its table.
CENTRAL = (
    "standard",
    "sgt signed",
    "smoot signed",
    "sgt",
    "smoot",
    "sgt random mask",
    "sgt adversarial, random mask",
    "sgt adversarial, most salient",
    "smoot adversarial, most salient",
    "fgsm 0.2",
)
# What the committed runs are called on the page.
SETS = {
    "forks-digits": "digits in blocks",
    "forks": "MNIST in blocks",
    "full-size": "MNIST in blocks, full size",
    "pair": "MNIST beside Fashion-MNIST",
    "plain-mnist": "MNIST",
    "cifar-block": "CIFAR-10 in blocks",
    "plain-cifar": "CIFAR-10",
}
# Settings that only photographs were trained with.
SHORT_STEPS = ("sgt adversarial 0.05, most salient",)


class Fork(NamedTuple):
    """A question to the campaign: one setting against another that differs in one thing."""

    question: str
    setting: str
    against: str


FORKS = (
    Fork("rank the signed gradient, not its magnitude", "sgt signed", "sgt"),
    Fork("the same with adaptive K", "smoot signed", "smoot"),
    Fork("random pixels, not the least salient", "sgt random mask", "sgt"),
    Fork("the same with adaptive K", "smoot random mask", "smoot"),
    Fork("the most salient pixels", "sgt most salient", "sgt"),
    Fork("least and most salient in turn (HLGM)", "sgt alternating", "sgt"),
    Fork("adaptive K, not a fixed one", "smoot", "sgt"),
    Fork("K shuffled between the images", "smoot shuffled K", "smoot"),
    Fork("K walks at random", "smoot random-walk K", "smoot"),
    Fork("mu = 30 pixels, not 10", "smoot mu 30", "smoot"),
    Fork("mu = 100 pixels", "smoot mu 100", "smoot"),
    Fork("K fixed at 25 %, not 50 %", "sgt K 25 %", "sgt"),
    Fork("K fixed at 75 %", "sgt K 75 %", "sgt"),
    Fork("K fixed at 90 %", "sgt K 90 %", "sgt"),
    Fork("25 % random pixels, not 50 %", "sgt random mask, K 25 %", "sgt random mask"),
    Fork("75 % random pixels", "sgt random mask, K 75 %", "sgt random mask"),
    Fork("gradient of the log-probability, not the logit", "smoot log-prob", "smoot"),
    Fork("KL through the masked prediction alone", "smoot kl masked", "smoot"),
    Fork("the same with a fixed K", "sgt kl masked", "sgt"),
    Fork("the same with random pixels", "sgt random mask, kl masked", "sgt random mask"),
    Fork("log-probability, and KL through the masked alone", "smoot log-prob, kl masked", "smoot"),
    Fork("saliency by a pass of its own in eval mode", "smoot eval pass", "smoot"),
    Fork("a dropout draw of its own for each view", "smoot independent dropout", "smoot"),
    Fork("saliency of the predicted class", "smoot predicted class", "smoot"),
    Fork("floor in Equation 4, not towards zero", "smoot floor", "smoot"),
    Fork("to the nearest in Equation 4", "smoot nearest", "smoot"),
    Fork("delta in the order of the clean output", "smoot delta by class", "smoot"),
    Fork("delta with the label first", "smoot delta by label", "smoot"),
    Fork("lambda = 0.1, not 1", "smoot lambda 0.1", "smoot"),
    Fork("lambda = 0.3", "smoot lambda 0.3", "smoot"),
    Fork("lambda = 3", "smoot lambda 3", "smoot"),
    Fork("lambda = 10", "smoot lambda 10", "smoot"),
    Fork("the channel's mean as fill, not noise", "smoot mean fill", "smoot"),
    Fork("the same with a fixed K", "sgt mean fill", "sgt"),
    Fork("another image as fill", "sgt other image's fill", "sgt"),
    Fork("another image as fill, random pixels", "sgt random mask, other image's fill", "sgt random mask"),
    Fork("cells of 2x2 pixels", "sgt cells of 2", "sgt"),
    Fork("cells of 4x4 pixels", "sgt cells of 4", "sgt"),
    Fork("cells of 2x2 pixels, random", "sgt random mask, cells of 2", "sgt random mask"),
    Fork("an adversarial step as fill", "sgt adversarial", "sgt"),
    Fork("the same at random pixels", "sgt adversarial, random mask", "sgt random mask"),
    Fork("the same at the most salient pixels", "sgt adversarial, most salient", "sgt most salient"),
    Fork(
        "adversarial: most salient pixels, not random", "sgt adversarial, most salient", "sgt adversarial, random mask"
    ),
    Fork("adversarial: the least salient, not random", "sgt adversarial", "sgt adversarial, random mask"),
    Fork("adversarial: all pixels, not random", "sgt adversarial, all pixels", "sgt adversarial, random mask"),
    Fork("adversarial: adaptive K", "smoot adversarial, most salient", "sgt adversarial, most salient"),
)
OUTSIDE = (
    "standard",
    "sgt",
    "sgt mask outside the evidence",
    "sgt random mask",
    "sgt K 25 %",
    "sgt mask outside the evidence, K 25 %",
    "sgt random mask, K 25 %",
)
LONG = (
    "standard",
    "smoot",
    "standard, 23 epochs",
    "standard, 50 epochs",
    "smoot, 50 epochs",
    "sgt random mask, 50 epochs",
    "sgt adversarial, most salient, 50 epochs",
    "fgsm 0.2, 50 epochs",
)
ADVERSARIAL = (
    "standard",
    "sgt random mask",
    "sgt adversarial",
    "sgt adversarial 0.5",
    "sgt adversarial, random mask",
    "sgt adversarial 0.5, random mask",
    "sgt adversarial 0.1, most salient",
    "sgt adversarial, most salient",
    "sgt adversarial 0.5, most salient",
    "sgt adversarial, all pixels",
    "sgt adversarial, most salient, one backward pass",
)
KNOWN_GOOD = ("standard", "fgsm 0.1", "fgsm 0.2", "fgsm 0.5", "gradient penalty 1", "sgt adversarial, most salient")
EPOCHS = ("standard", "sgt", "sgt signed", "sgt random mask", "sgt adversarial, most salient", "fgsm 0.2")
# A share of the samples or of the steps, and what it costs by docs/costs.md beside standard training.
SHARES = {
    f"{name}{suffix}": cost
    for name in ("sgt", "sgt adversarial, most salient")
    for suffix, cost in {
        "": 7 / 3, ", share 0.5": 5 / 3, ", share 0.25": 4 / 3, ", share 0.1": 3.4 / 3,
        ", every 2": 5 / 3, ", every 4": 4 / 3,
    }.items()
}  # fmt: skip
COLOURS = ("#555555", *(style[0] for style in STYLE.values()), "#8c564b", "#e377c2", "#17becf")

Runs = Mapping[str, Mapping[int, Result]]


def main(argv: Sequence[str] | None = None) -> None:
    """Write everything that there are results for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=Path, metavar="FOLDER", help="Output folder of the campaign forks.toml.")
    parser.add_argument("--source", help="Its images: a Hub id or a local directory.")
    options = parser.parse_args(argv)
    runs = {name: load(name) for name in SETS}
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables(runs).items():
        page = with_table(page, name, table)
    write_whole(PAGE, page)
    draw_forks(runs["forks-digits"], FIGURES / "verdict_forks.png")
    draw_epochs(runs["forks-digits"], FIGURES / "verdict_epochs.png")
    draw_sets(runs, FIGURES / "verdict_sets.png")
    draw_shares(load("share-digits"), FIGURES / "verdict_shares.png")
    draw_agreement(runs["forks-digits"], FIGURES / "verdict_agreement.png")
    if options.maps is not None:
        draw_maps(options.maps, options.source, FIGURES / "verdict_maps.png")


def load(name: str) -> Runs:
    """The runs of a campaign: setting -> seed -> result."""
    return group(read_export(CAMPAIGNS / "results" / f"{name}.jsonl"))


def tables(runs: Mapping[str, Runs]) -> dict[str, str]:
    """Every table of the page by its name."""
    digits = runs["forks-digits"]
    made = {name: settings_table(found, (*CENTRAL, *SHORT_STEPS)) for name, found in runs.items()}
    made["pair"] = settings_table(runs["pair"], (*CENTRAL, "sgt mask outside the evidence"))
    made["outside"] = settings_table(digits, OUTSIDE)
    made["long"] = settings_table(digits, LONG)
    made["adversarial"] = settings_table(digits, ADVERSARIAL)
    made["known-good"] = settings_table(digits, KNOWN_GOOD)
    made["questions"] = forks_table(digits)
    made["share-digits"] = settings_table(load("share-digits"), ("standard", *SHARES))
    made["roar-digits"] = roar_table(load("roar-digits"))
    made["saturation"] = saturation_table(load("saturation")["standard"])
    return made


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table between its two comments replaced.

    Raises:
        ValueError: the page has no such comments.
    """
    begin, end = f"<!-- table {name} -->\n", "<!-- end of table -->"
    found, count = re.subn(f"{re.escape(begin)}.*?{end}", lambda _: f"{begin}{table}\n{end}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{PAGE.name} must have one place for the table {name!r}, it has {count}")
    return found


def settings_table(runs: Runs, settings: Sequence[str]) -> str:
    """Levels of each setting, and its differences to standard training and to the random mask, as Markdown."""
    there = [name for name in settings if name in runs]
    measures = [measure for measure in MEASURES if values_of(runs["standard"], measure)]
    others = [("standard", measure) for measure in measures]
    if NULL in measures and "sgt random mask" in runs:
        others.insert(1, ("sgt random mask", NULL))
    heads = {NULL: "null share (%)", "accuracy": "accuracy (%)", "gap": "gap"}
    short = {NULL: "null share", "accuracy": "accuracy", "gap": "gap"}
    head = ["setting", "n", *(heads[m] for m in measures)]
    head += [f"{short[m]} minus {'random mask' if o == 'sgt random mask' else o}" for o, m in others]
    rows = [head, ["---"] * len(head)]
    for name in there:
        row = [name, str(len(runs[name])), *(spread(values_of(runs[name], measure)) for measure in measures)]
        for other, measure in others:
            found = difference(runs, name, other, measure) if name != other else None
            row.append("" if found is None else text(found, len(there) - 1))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def forks_table(runs: Runs) -> str:
    """Every fork that both settings of have been run, as Markdown."""
    there = [fork for fork in FORKS if fork.setting in runs and fork.against in runs]
    head = ["what is changed", "setting", "against", "null share", "accuracy", "gap"]
    rows = [head, ["---"] * len(head)]
    for fork in there:
        found = [difference(runs, fork.setting, fork.against, measure) for measure in MEASURES]
        cells = ["" if one is None else text(one, len(there)) for one in found]
        rows.append([fork.question, fork.setting, fork.against, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def roar_table(runs: Runs) -> str:
    """Test accuracy of a fresh network on the top and on the bottom of the maps, and their difference, as Markdown."""
    rows = [["setting", "n", "top (%)", "bottom (%)", "DiffROAR", "minus standard", "minus random mask"], ["---"] * 7]
    scores = {
        name: {seed: run["diff_roar"]["difference"] for seed, run in found.items()} for name, found in runs.items()
    }
    for name in (name for name in CENTRAL if name in runs):
        judged = [run["diff_roar"] for run in runs[name].values()]
        cells = [spread(dict(enumerate(one[part] for one in judged))) for part in ("top", "bottom", "difference")]
        others = [paired(scores[name], scores[other]) for other in ("standard", "sgt random mask") if other != name]
        found = ["" if one is None else text(one, len(runs) - 1) for one in others]
        found = ["", *found] if name == "standard" else [*found, ""] if name == "sgt random mask" else found
        rows.append([name, str(len(judged)), *cells, *found])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def saturation_table(runs: Mapping[int, Result]) -> str:
    """Deletion areas by the exact and by the plain float32 score, and how many images are saturated, as Markdown."""
    rows = [["measure", "n", "mean ± std"], ["---"] * 3]
    for name in next(iter(runs.values()))["tables"]:
        values = {seed: run["tables"][name] for seed, run in runs.items()}
        label = "saturated images (%)" if name == "saturated" else f"AUC, {name}"
        rows.append([label, str(len(values)), spread(values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def difference(runs: Runs, setting: str, against: str, measure: str) -> Paired | None:
    """Of two settings, paired by seed."""
    return paired(values_of(runs[setting], measure), values_of(runs[against], measure))


def spread(values: Mapping[int, float]) -> str:
    """Mean and standard deviation over the seeds."""
    numbers = list(values.values())
    return f"{np.mean(numbers):.1f}" + (f" ± {np.std(numbers, ddof=1):.1f}" if len(numbers) > 1 else "")


def text(found: Paired, comparisons: int) -> str:
    """A difference with its interval; bold where Bonferroni's correction leaves it beyond zero."""
    if found.interval is None or not found.std:
        return f"{found.mean:+.1f}"
    score = abs(found.mean) / (found.std / found.n**0.5)
    is_beyond = 2 * t.sf(score, found.n - 1) * comparisons < 0.05
    mean = f"**{found.mean:+.1f}**" if is_beyond else f"{found.mean:+.1f}"
    return f"{mean} ({found.interval[0]:+.1f} to {found.interval[1]:+.1f})"


def draw_forks(runs: Runs, path: Path) -> None:
    """Null share minus standard training's, with intervals, for every setting of ten epochs."""
    names = [name for name in runs if name != "standard" and "epochs" not in name]
    found = {name: difference(runs, name, "standard", NULL) for name in names}
    known = sorted((one.mean, name, one.interval) for name, one in found.items() if one is not None and one.interval)
    figure = Figure(figsize=(WIDTH, 0.19 * len(known) + 0.8), layout="constrained")
    axes = figure.subplots()
    for height, (mean, name, interval) in enumerate(known):
        colour = colour_of(name)
        axes.plot(interval, (height, height), color=colour, linewidth=1.5)
        axes.plot(mean, height, "o", color=colour, markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(known)), [name for _, name, _ in known], fontsize=7)
    axes.set_ylim(-1, len(known))
    axes.set_xlabel("null share of the top 10 % minus that of standard training, percentage points, 95 % interval")
    figure.savefig(path, dpi=DPI)


def draw_sets(runs: Mapping[str, Runs], path: Path) -> None:
    """Null share, accuracy and gap minus standard training's, with intervals, for the main settings on every set."""
    names = ("sgt signed", "sgt", "sgt random mask", "sgt adversarial, most salient")
    labels = {NULL: "null share (points)", "accuracy": "accuracy (points)", "gap": "gap (points)"}
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for row, by_setting in enumerate(runs.values()):
            for name in (name for name in names if name in by_setting):
                found = difference(by_setting, name, "standard", measure)
                if found is None or found.interval is None:
                    continue
                height = row + 0.17 * (names.index(name) - 1.5)
                label = name if (row, measure) == (0, NULL) else None
                axes.plot(found.interval, (height, height), color=colour_of(name), linewidth=1.5)
                axes.plot(found.mean, height, "o", color=colour_of(name), markersize=4, label=label)
        axes.set_xlabel(labels[measure])
        axes.set_yticks(range(len(runs)), [f"{SETS[one]}, n = {seeds(by_setting)}" for one, by_setting in runs.items()])
        axes.tick_params(axis="y", labelsize=7)
    panels[0].invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle("Minus standard training, paired by seed, 95 % intervals", fontsize=9)
    figure.savefig(path, dpi=DPI)


def seeds(by_setting: Runs) -> str:
    """Of the settings beside standard training: how many seeds, or from how many to how many."""
    counts = sorted(len(found) for name, found in by_setting.items() if name in CENTRAL and name != "standard")
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def colour_of(name: str) -> str:
    """By what replaces which pixels."""
    families = {"signed": 2, "adversarial": 3, "fgsm": 4, "penalty": 4, "random mask": 1, "outside": 5}
    return next((COLOURS[number] for word, number in families.items() if word in name), COLOURS[0])


def draw_epochs(runs: Runs, path: Path) -> None:
    """Null share and accuracy by epoch: mean over the seeds, and its standard error."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    for axes, measure, label in zip(
        figure.subplots(1, 2), (NULL, "accuracy"), ("null share of the top 10 % (%)", "accuracy (%)"), strict=True
    ):
        for name, colour in zip((name for name in EPOCHS if name in runs), COLOURS, strict=False):
            curves = np.array([[epoch.get(measure, np.nan) for epoch in run["history"]] for run in runs[name].values()])
            mean, error = np.nanmean(curves, axis=0), np.nanstd(curves, axis=0, ddof=1) / len(curves) ** 0.5
            epochs = range(1, len(mean) + 1)
            axes.plot(epochs, mean, color=colour, label=name)
            axes.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=DPI)


def draw_shares(runs: Runs, path: Path) -> None:
    """Null share and accuracy against cost: mean over the seeds, and its standard error."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    for axes, measure, label in zip(
        figure.subplots(1, 2), (NULL, "accuracy"), ("null share of the top 10 % (%)", "accuracy (%)"), strict=True
    ):
        for name, colour in (("sgt", COLOURS[0]), ("sgt adversarial, most salient", COLOURS[3])):
            for word, line in (("share", "o-"), ("every", "s--")):
                points = {"standard": 1.0} | {
                    one: cost for one, cost in SHARES.items() if one == name or one.startswith(f"{name}, {word}")
                }
                ordered = sorted((cost, list(values_of(runs[one], measure).values())) for one, cost in points.items())
                costs, values = zip(*ordered, strict=True)
                means = [np.mean(found) for found in values]
                errors = [np.std(found, ddof=1) / len(found) ** 0.5 for found in values]
                named = f"{name}, {'share of the samples' if word == 'share' else 'share of the steps'}"
                axes.errorbar(costs, means, errors, fmt=line, color=colour, markersize=4, linewidth=1, label=named)
        axes.set_xlabel("arithmetic / standard training's")
        axes.set_ylabel(label)
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=DPI)


def draw_agreement(runs: Runs, path: Path) -> None:
    """Each setting's mean deletion AUC and gap against its mean null share, with Spearman's correlation."""
    names = [name for name in runs if "epochs" not in name]
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    for axes, measure, label in zip(
        figure.subplots(1, 2), ("auc", "gap"), ("deletion AUC (lower is better)", "gap (higher is better)"), strict=True
    ):
        shares, values = (
            [float(np.mean(list(values_of(runs[name], one).values()))) for name in names] for one in (NULL, measure)
        )
        axes.scatter(shares, values, s=14, c=[colour_of(name) for name in names])
        mark_some(axes, dict(zip(names, zip(shares, values, strict=True), strict=True)))
        axes.set_xlabel("null share of the top 10 % (%), lower is better")
        axes.set_ylabel(label)
        axes.set_title(
            f"Spearman's correlation {spearmanr(shares, values).statistic:+.2f}, {len(names)} settings", fontsize=8
        )
    figure.savefig(path, dpi=DPI)


def mark_some(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the names of the settings that the text speaks of."""
    for name in ("standard", "sgt signed", "sgt", "sgt random mask", "sgt adversarial, most salient", "fgsm 0.5"):
        if name in points:
            axes.annotate(name, points[name], fontsize=6, xytext=(3, 3), textcoords="offset points")


def draw_maps(folder: Path, source: str, path: Path, images: int = 6) -> None:
    """Saliency of the first test images under several settings, by the networks of seed 0."""
    plans = {plan.name: plan for plan in read_campaign(CAMPAIGNS / "forks.toml") if plan.seed == 0}
    names = [name for name in CENTRAL if (result_path(plans[name], folder).with_name(WEIGHTS_NAME)).is_file()]
    splits = make_splits(Data(**{**plans["standard"].data, "source": source}), 0)
    shown, labels = splits.test.pixel_values[:images], splits.test.labels[:images]
    figure = Figure(figsize=(WIDTH, 0.62 * WIDTH), layout="constrained")
    grid = figure.subplots(images, len(names) + 1)
    for row in range(images):
        grid[row, 0].imshow(shown[row, 0], cmap="gray")
    grid[0, 0].set_title("image", fontsize=6)
    for column, name in enumerate(names, 1):
        network = make_network("small", splits)
        network.load_state_dict(load_file(result_path(plans[name], folder).with_name(WEIGHTS_NAME)))
        model = LogitsModel(network.eval(), splits.pipeline.resize)
        maps = attribute(model, splits.pipeline.normalize(shown), labels, torch.arange(images))
        grid[0, column].set_title(name.replace(", ", ",\n").replace(" mask", "\nmask"), fontsize=6)
        for row in range(images):
            grid[row, column].imshow(maps[row], cmap="magma")
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main()
