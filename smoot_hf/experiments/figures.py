"""Figures of faithfulness: curves, saliency grids, K over epochs, images of class I and II. Readable at 900 pixels.

They are drawn without pyplot, which would choose a window system for the whole process.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..evaluation import Convention, Faithfulness
from ..evaluation.faithfulness import Curve
from ..evaluation.image_classes import ImageClasses
from ..evaluation.results import Measurement
from ..markup import figure_text
from .run import BudgetHistory

logger = logging.getLogger(__name__)

# Okabe and Ito's colours, told apart by every kind of colour vision; the markers say it once more.
STYLE = {"standard": ("#0072B2", "o"), "sgt": ("#E69F00", "s"), "smoot": ("#009E73", "^")}
_MORE_STYLES = (("#CC79A7", "D"), ("#56B4E9", "v"), ("#D55E00", "P"), ("#000000", "X"), ("#F0E442", "*"))
# What a panel of a single line shows beside deletion and its control: curve -> label, colour, line style.
_FURTHER = {
    "least_salient_first": ("least salient first", "#56B4E9", ":"),
    "insertion": ("insertion", "#000000", "-."),
}
WIDTH, DPI = 9.0, 150
# Characters of a name beside an image; more would run into its neighbours.
_LONGEST_LINE = 24
# A legend under its panel, where it hides nothing.
_BELOW: dict[str, Any] = {
    "fontsize": 8,
    "title_fontsize": 8,
    "ncols": 2,
    "loc": "upper center",
    "bbox_to_anchor": (0.46, -0.15),
    "frameon": False,
}

# name of a line -> seed -> measurement
Measured = Mapping[str, Mapping[int, Faithfulness]]


def style(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every line; a training method has the same ones in every figure."""
    others = [name for name in names if name not in STYLE]
    more = {name: _MORE_STYLES[i % len(_MORE_STYLES)] for i, name in enumerate(others)}
    return {name: STYLE.get(name) or more[name] for name in names}


def short(convention: Convention) -> str:
    """The convention in two lines, for the head of a panel."""
    first, last = (f"{100 * fraction:g}" for fraction in convention.end_points)
    score = "" if convention.score is None else f" of the {convention.score.replace('_', '-')}"
    kind = {None: "", True: "signed ", False: "magnitude of "}[convention.signed]
    area = "trapezoid" if convention.normalisation == "none" else "trapezoid / span"
    return (
        f"{convention.fill} fill, {first} to {last} % in {len(convention.fractions) - 1} steps, {area}\n"
        f"ranked by {kind}{figure_text(convention.attribution)}{score}, {convention.target}"
    )


def draw_curves(panels: Mapping[Convention, Measured], path: Path) -> None:
    """Deletion curves, one panel per convention: mean over the seeds with a band of one standard deviation.

    Dashed lines are the control: the same models, the positions removed in random order. A single line leaves room for
    the other two curves, least salient first and insertion, where they were measured.
    """
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(WIDTH, 4.8 * rows))
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for axes, (convention, measured) in zip(grid.flat, panels.items(), strict=False):
        styles = style(list(measured))
        for name, found in measured.items():
            colour, marker = styles[name]
            _band(axes, found, "deletion", figure_text(name), color=colour, marker=marker, markersize=4)
        for name, found in measured.items():
            _band(
                axes,
                found,
                "random",
                f"{figure_text(name)}, random",
                color=styles[name][0],
                linestyle="--",
                linewidth=1,
            )
        is_single = len(measured) == 1
        for curve, (label, colour, line) in _FURTHER.items() if is_single else ():
            _band(axes, next(iter(measured.values())), curve, label, color=colour, linestyle=line, linewidth=1.5)
        axes.set_title(short(convention), fontsize=9)
        axes.set_xlabel("positions removed" + (" or put back" if is_single else "") + ", most salient first (%)")
        axes.set_ylabel("images still correct (%)" if convention.measure == "accuracy" else "probability (%)")
        axes.set(xlim=(0, 100), ylim=(0, 102))
        axes.grid(alpha=0.25)
        axes.tick_params(labelleft=True)
        n = min(len(found) for found in measured.values())
        spread = "[95 % interval over the images]" if n == 1 else "± std over the seeds"
        models = "one model" if n == 1 else f"n={n}"
        title = f"area under the curve {spread}, {models}\n(dashed: random order, the control)"
        # An interval takes the width of two columns.
        axes.legend(title=title, **{**_BELOW, "ncols": 1 if n == 1 else 2})
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    _save(figure, path)


def _band(axes: Axes, found: Mapping[int, Faithfulness], curve: str, name: str, **line: Any) -> None:
    """One curve of all seeds, by the name of its field; nothing where it was not measured."""
    curves: list[Curve] = [getattr(run, curve) for run in found.values() if getattr(run, curve) is not None]
    if not curves:
        return
    x = 100 * next(iter(found.values())).fractions
    values = torch.stack([one.values for one in curves])
    mean = values.mean(dim=0)
    axes.plot(x, mean, label=f"{name}: {_area(curves)}", **line)
    if len(curves) > 1:
        spread = values.std(dim=0)
        axes.fill_between(x, mean - spread, mean + spread, color=line["color"], alpha=0.2, linewidth=0)


def _area(curves: Sequence[Curve]) -> str:
    auc = Measurement(dict(enumerate(curve.auc for curve in curves)))
    if auc.std is not None:
        return f"{auc.mean:.1f} ± {auc.std:.1f}"
    interval = curves[0].interval
    return f"{auc.mean:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def draw_saliency_grid(
    images: Tensor,
    labels: Sequence[str],
    maps: Mapping[str, Tensor],
    seed: int,
    path: Path,
    evidence: Tensor | None = None,
) -> None:
    """The same test images, and below each the saliency of every method.

    Args:
        images: (n, H, W, C) in [0, 1].
        labels: of the images.
        maps: method -> (n, H, W), at least 0; each map is drawn as a share of its own maximum.
        seed: of the models.
        path: of the figure.
        evidence: bool (n, H, W), outlined in every picture; `None` where nobody knows it.
    """
    count, side = len(images), images.shape[1] / images.shape[2]
    figure = Figure(figsize=(WIDTH, side * WIDTH / (count + 1.6) * (1 + len(maps)) + 0.5))
    # Not squeezed: a data set may have a single class.
    grid = figure.subplots(1 + len(maps), count, squeeze=False)
    for column in range(count):
        grid[0, column].imshow(images[column], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        grid[0, column].set_title(figure_text(labels[column], _LONGEST_LINE), fontsize=10)
    for row, values in zip(grid[1:], maps.values(), strict=True):
        for column, axes in enumerate(row):
            largest = float(values[column].max()) or 1.0
            shown = axes.imshow(values[column] / largest, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    for row, name in zip(grid, ["image", *maps], strict=True):
        row[0].set_ylabel(figure_text(name, _LONGEST_LINE), fontsize=11, color=STYLE.get(name, ("black",))[0])
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for column, mask in enumerate(() if evidence is None else evidence):
        for axes in grid[:, column]:
            axes.add_collection(_outline(mask))
    figure.colorbar(shown, ax=grid.ravel().tolist(), label="share of the map's maximum", fraction=0.03, pad=0.015)
    outlined = "" if evidence is None else ", the evidence outlined"
    title = f"Test images and their saliency (magnitude of the label's gradient), seed {seed}{outlined}"
    figure.suptitle(title, fontsize=10)
    _save(figure, path, tight=False)


def _outline(mask: Tensor) -> LineCollection:
    """The edges between the pixels of a mask, bool (H, W), and the others, for a picture that `imshow` draws."""
    padded = np.pad(mask.numpy(), 1)
    low, left = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    top, right = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    level = [((x - 0.5, y - 0.5), (x + 0.5, y - 0.5)) for y, x in zip(low, left, strict=True)]
    upright = [((x - 0.5, y - 0.5), (x - 0.5, y + 0.5)) for y, x in zip(top, right, strict=True)]
    return LineCollection([*level, *upright], colors="#56B4E9", linewidths=1.8, clip_on=False)


def draw_budgets(histories: Mapping[str, BudgetHistory], path: Path) -> None:
    """K over epochs: share of the training images at every K, all runs together, with minimum, median and maximum.

    Args:
        histories: run -> its history; all of the same images and bounds.
        path: of the figure.
    """
    first = next(iter(histories.values()))
    epochs = first.epochs[: min(len(history.epochs) for history in histories.values())]
    counts = np.sum([history.counts[: len(epochs)] for history in histories.values()], axis=0)
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    levels = first.k_min + np.arange(shares.shape[1])
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    edges = np.append(levels - 0.5, levels[-1] + 0.5)
    sides = np.append(np.array(epochs) - 0.5, epochs[-1] + 0.5)
    shown = np.ma.masked_less_equal(shares.T, 0)
    mesh = axes.pcolormesh(sides, edges, shown, cmap="cividis", norm=LogNorm(vmin=shares[shares > 0].min(), vmax=100))
    statistics = BudgetHistory(first.pixels, first.k_min, epochs, counts.tolist()).statistics()
    for name, line in (("max", "--"), ("median", "-"), ("min", ":")):
        label = f"{name} of all, {statistics[name][-1]:g} at the end"
        axes.plot(epochs, statistics[name], line, color="#D55E00", linewidth=1.8, label=label)
    axes.set_xlabel("epochs completed")
    axes.set_ylabel(f"K: masked positions of {first.pixels}")
    axes.set_title(f"K of the training images of {', '.join(map(figure_text, histories))}", fontsize=10)
    used = levels[counts.any(axis=0)]
    axes.set(xlim=(sides[0], sides[-1]), ylim=(used[0] - 1, used[-1] + 1 + (used[-1] - used[0]) / 4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=9, loc="upper left", ncols=3)
    figure.colorbar(mesh, label="training images (%)", pad=0.015, format="%g")
    _save(figure, path)


class Example(NamedTuple):
    """A test image for the figure of the image classes: picture (H, W, C) in [0, 1], and row in `ImageClasses`."""

    picture: Tensor
    label: str
    row: int


def draw_image_classes(found: ImageClasses, examples: Mapping[str, Example], path: Path) -> None:
    """The label's probability of an example image of each class while it is masked (the paper's Figure 1).

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("there is no example, neither a right image of class I nor an image of class II")
    figure = Figure(figsize=(WIDTH, 4.2))
    grid = figure.subplots(1, len(examples), sharey=True, squeeze=False)
    for axes, (name, example) in zip(grid.flat, examples.items(), strict=True):
        x, y = 100 * found.fractions, found.probability[example.row]
        is_correct = found.is_correct[example.row]
        axes.plot(x, 100 * y, color="#0072B2", zorder=2)
        for mask, filled, label in (
            (is_correct, "#0072B2", "classified as its label"),
            (~is_correct, "white", "not so"),
        ):
            axes.scatter(x[mask], 100 * y[mask], edgecolors="#0072B2", c=filled, s=36, zorder=3, label=label)
        floor = 100 * float(found.floor[example.row])
        axes.axhline(floor, color="#D55E00", linestyle=":", linewidth=1.2, label="without evidence")
        shown = figure_text(example.label, _LONGEST_LINE)
        axes.set_title(f"{name}: test image {int(found.sample_idx[example.row])}, label {shown}", fontsize=10)
        axes.set_xlabel("positions masked, most salient first (%)")
        axes.set_ylabel("probability of the label (%)")
        axes.tick_params(labelleft=True)
        axes.set(xlim=(-2, 102), ylim=(-3, 103))
        axes.grid(alpha=0.25)
        axes.legend(**_BELOW)
        inset = axes.inset_axes((0.7, 0.66, 0.3, 0.3))
        inset.imshow(example.picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        inset.set(xticks=[], yticks=[])
    figure.suptitle(short(found.convention).replace("\n", "; "), fontsize=8.5)
    _save(figure, path)


def try_to_draw(draw: Callable[[Path], None], path: Path) -> bool:
    """Draw a figure into a file; one that cannot be drawn is a warning, for the numbers are written without it.

    Args:
        draw: gets the path.
        path: of the file; one of an earlier call is removed, so that it does not stand beside other numbers.

    Returns:
        Whether it was drawn.
    """
    path.unlink(missing_ok=True)
    try:
        draw(path)
    except Exception as error:  # matplotlib raises whatever it meets
        logger.warning("%s is not drawn: %s", path, str(error) or type(error).__name__)
        return False
    return True


def _save(figure: Figure, path: Path, tight: bool = True) -> None:
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
