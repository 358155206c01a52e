"""The figures of a model card: the histogram of K, deletion curves, a grid of saliency maps.

matplotlib is imported when a figure is drawn, not before. The figures can be read at a width of 900 pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..evaluation.faithfulness import Faithfulness
from ..markup import figure_text

# Okabe and Ito's colours, told apart by every kind of colour vision; the markers say it once more.
_CURVES = {
    "deletion": ("most salient removed first", "#009E73", "o-"),
    "random": ("removed in random order (control)", "#555555", "--"),
    "least_salient_first": ("least salient removed first", "#E69F00", "s-"),
    "insertion": ("most salient restored first", "#0072B2", "^-"),
}
_WIDTH, _DPI = 9.0, 110
# Characters of a title above an image; more would run into its neighbours.
_LONGEST_LINE = 24


def draw_budget(budget: Any, path: Path) -> None:
    """How many training images have which K; dotted lines are the bounds."""
    figure = _figure(_WIDTH, 3.4)
    axes = figure.subplots()
    counts = budget.histogram.tolist()
    k = range(budget.k_min, budget.k_max + 1)
    axes.bar(k, counts, width=1.0, color="#009E73")
    axes.axvline(budget.k_min, color="#555555", linestyle=":", linewidth=1)
    axes.axvline(budget.k_max, color="#555555", linestyle=":", linewidth=1)
    axes.set_xlabel(f"K: masked {budget.unit} of {budget.positions}")
    axes.set_ylabel("training images")
    _save(figure, path)


def draw_curves(measured: Sequence[Faithfulness], path: Path) -> None:
    """What was measured, a panel for each convention; the legend has the area under each curve."""
    columns = min(2, len(measured))
    rows = math.ceil(len(measured) / columns)
    figure = _figure(_WIDTH if columns == 2 else 0.62 * _WIDTH, 4.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, found in zip(grid.flat, measured, strict=False):
        for name, (label, colour, line) in _CURVES.items():
            curve = getattr(found, name)
            if curve is not None:
                axes.plot(
                    (100 * found.fractions).tolist(), curve.values.tolist(), line, color=colour, markersize=4,
                    label=f"{label}: {curve.auc:.1f}",
                )  # fmt: skip
        convention = found.convention
        kind = {None: "", True: "signed ", False: "magnitude of "}[convention.signed]
        score = "" if convention.score is None else f" of the {convention.score.replace('_', '-')}"
        attribution = figure_text(convention.attribution)
        axes.set_title(f"{convention.fill} fill, ranked by {kind}{attribution}{score}", fontsize=9)
        axes.set_xlabel("positions removed or restored (%)")
        axes.set_ylabel("images correct (%)" if convention.measure == "accuracy" else "probability (%)")
        axes.set(xlim=(0, 100), ylim=(0, 102))
        axes.grid(alpha=0.25)
        # Under its panel, where it hides nothing.
        axes.legend(title="area under the curve", fontsize=8, title_fontsize=8, loc="upper center",
                    bbox_to_anchor=(0.5, -0.14), frameon=False)  # fmt: skip
    for axes in list(grid.flat)[len(measured) :]:
        axes.remove()
    _save(figure, path)


def draw_saliency(pictures: Tensor, titles: Sequence[Sequence[str]], maps: Tensor, path: Path) -> None:
    """Images, and below each its saliency as a share of its own maximum.

    Args:
        pictures: (n, C, H, W) in [0, 1]; other than three channels are shown in grey, by their mean.
        titles: lines of plain text above each image; a "$" in them begins no formula.
        maps: (n, H, W), at least 0.
        path: of the figure.
    """
    count = len(pictures)
    # A column for the colour bar, and room for the titles.
    figure = _figure(_WIDTH, _WIDTH / (count + 1) * 2 * pictures.shape[2] / pictures.shape[3] + 0.5)
    grid = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        picture = pictures[column].permute(1, 2, 0)
        picture = (picture if picture.shape[2] == 3 else picture.mean(dim=2)).numpy()
        grid[0, column].imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        title = "\n".join(figure_text(line, _LONGEST_LINE) for line in titles[column])
        grid[0, column].set_title(title, fontsize=9)
        largest = float(maps[column].max()) or 1.0
        shown = grid[1, column].imshow(
            (maps[column] / largest).numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest"
        )
    grid[0, 0].set_ylabel("image")
    grid[1, 0].set_ylabel("saliency")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=grid.ravel().tolist(), label="share of maximum", fraction=0.03, pad=0.015)
    _save(figure, path, tight=False)


def _figure(width: float, height: float) -> Any:
    # Without pyplot: no window, no global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI)


def _save(figure: Any, path: Path, tight: bool = True) -> None:
    if tight:
        figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
