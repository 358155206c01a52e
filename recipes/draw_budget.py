"""Draw which training images can lose most of their pixels: those of lowest and highest K per class, and K by class.

    python recipes/draw_budget.py runs/digits-cnn-smoot [--output budget.png]

Time: seconds. The folder is that of a run of `smoot-hf train`, or one of its checkpoints; it must have kept its
training state (not --save_only_model), where K of every image is stored. The run's own record says which images it was
trained on; --dataset names them where they have moved, or where there is no record.

The classes stand in the order of their median K. Where there are more than --classes, half of those drawn are the
lowest and half the highest. Of images of equal K the first in the data set is drawn: at a bound there are many.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from smoot_hf import MaskBudget
from smoot_hf.data.decoded_images import DecodedImages
from smoot_hf.experiments.budget_by_class import ClassBudget, by_class, chosen, extremes
from smoot_hf.experiments.checkpoint import load_budget, recorded_images
from smoot_hf.experiments.figures import DPI, STYLE, WIDTH
from smoot_hf.experiments.flags import OneLineParser
from smoot_hf.markup import figure_text

_MOST_BARS = 48
# Characters of a name beside its row.
_LONGEST_NAME = 24
_COLOUR = STYLE["smoot"][0]


def main(argv: Sequence[str] | None = None) -> Path:
    """Read K and images, draw, print K by class; what a user can get wrong ends with one line and exit code 2."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder of a training run, or of one of its checkpoints.")
    parser.add_argument("--dataset", help="What it was trained on (default: what the run's record says).")
    parser.add_argument("--count", type=int, default=4, help="Lowest and highest images of a class (default 4 each).")
    parser.add_argument("--classes", type=int, default=10, help="At most so many classes (default 10).")
    parser.add_argument("--output", type=Path, default=Path("runs/budget.png"), help="Default: runs/budget.png.")
    options = parser.parse_args(argv)
    try:
        for name in ("count", "classes"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
        images = recorded_images(options.run, "train", options.dataset)
        budget = load_budget(options.run, images)
        if budget.k_min == budget.k_max:
            raise ValueError(f"{options.run} was trained with one K for all images, {budget.k_min}: there is no order")
        found = by_class(budget, images)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(chosen(found, options.classes), images, budget, options.count, options.output)
    print(table(found))
    print(f"written to {options.output}")
    return options.output


def table(found: Sequence[ClassBudget]) -> str:
    """K by class in plain text."""
    lines = [f"{'class':<20}{'images':>8}{'K min':>8}{'median':>8}{'max':>8}"]
    for one in found:
        lines.append(f"{one.label:<20}{len(one.k):>8}{one.k[0]:>8}{np.median(one.k):>8g}{one.k[-1]:>8}")
    return "\n".join(lines)


def draw(found: Sequence[ClassBudget], images: DecodedImages, budget: MaskBudget, count: int, path: Path) -> None:
    """One row per class: the images of lowest K, how many images have which K, the images of highest K."""
    side = WIDTH / (2 * count + 4.7)
    figure = Figure(figsize=(WIDTH, (side + 0.17) * len(found) + 0.8))
    ratios = [1.0] * count + [0.2, 4.0, 0.2] + [1.0] * count
    grid = figure.add_gridspec(len(found), len(ratios), width_ratios=ratios, wspace=0.08, hspace=0.3)
    ks = np.concatenate([one.k for one in found])
    edges = bar_edges(int(ks.min()), int(ks.max()))
    for row, one in enumerate(found):
        low, high = extremes(one, count)
        for first, places in ((0, low), (count + 3, high)):
            for column in range(count):
                axes = figure.add_subplot(grid[row, first + column])
                if column < len(places):
                    _show(axes, images, one, int(places[column]))
                else:
                    axes.set_axis_off()
        figure.axes[row * (2 * count + 1)].set_ylabel(
            figure_text(one.label, 24), rotation=0, ha="right", va="center", fontsize=11
        )
        _distribution(figure, grid[row, count + 1], one, edges, is_last=row == len(found) - 1)
    _heads(figure, count, f"K: masked {budget.unit} of {budget.positions}")
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def bar_edges(lowest: int, highest: int) -> np.ndarray:
    """Edges of the bars, halfway between whole numbers: one bar for each K, or for as many as keep them visible."""
    width = -(-(highest - lowest + 1) // _MOST_BARS)
    return np.arange(lowest, highest + 1 + width, width) - 0.5


def _show(axes: Axes, images: DecodedImages, one: ClassBudget, place: int) -> None:
    pixels = images[int(one.sample_idx[place])]["pixel_values"].permute(1, 2, 0).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(f"{one.k[place]}", fontsize=9, pad=2)
    axes.set(xticks=[], yticks=[])


def _distribution(figure: Figure, place: SubplotSpec, one: ClassBudget, edges: np.ndarray, is_last: bool) -> None:
    axes = figure.add_subplot(place)
    axes.hist(one.k, bins=edges.tolist(), color=_COLOUR)
    axes.axvline(float(np.median(one.k)), color="black", linewidth=1.2)
    axes.set(yticks=[], xlim=(edges[0], edges[-1]))
    axes.tick_params(labelbottom=is_last, labelsize=9)
    axes.spines[["top", "left", "right"]].set_visible(False)


def _heads(figure: Figure, count: int, unit: str) -> None:
    """A head over each of the three parts, and the unit under the middle one."""
    middle = 2 * count
    parts = {"lowest K": (0, count - 1), "highest K": (count, middle - 1), "all (line: median)": (middle, middle)}
    top = figure.axes[middle].get_position().y1 + 0.25 / figure.get_size_inches()[1]
    for text, (first, last) in parts.items():
        left, right = figure.axes[first].get_position().x0, figure.axes[last].get_position().x1
        figure.text((left + right) / 2, top, text, ha="center", va="bottom", fontsize=11)
    figure.axes[-1].set_xlabel(unit, fontsize=10)


if __name__ == "__main__":
    main()
