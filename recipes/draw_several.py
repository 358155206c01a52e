"""Draw the saliency map of each label of images that have several: does each map light up its own digit?

    python recipes/draw_several.py runs/several-standard runs/several-recommended [--output several.png]

Time: seconds. The folders are those of runs of train_several_digits.py; each run is a group of columns. Their own
record says which images they were trained on; --dataset names them where they have moved.

Above each map stands its label, and the block of that digit is outlined; below it the share of its 10 % most salient
pixels that lie in that block. Each map is drawn as a share of its own maximum. The images are the first test images
with --digits digits whose labels all models predict, and no others.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from smoot_hf.experiments.checkpoint import Checkpoint, read_checkpoint, recorded_images
from smoot_hf.experiments.figures import DPI, WIDTH
from smoot_hf.experiments.flags import OneLineParser
from smoot_hf.experiments.label_maps import label_saliency
from smoot_hf.functional.localisation import top_outside
from smoot_hf.markup import figure_text
from smoot_hf.models.logits import is_multi_label

_LONGEST_NAME = 24


class LabelMap(NamedTuple):
    """The map of one label of an image: its name, (H, W) saliency, and bool (H, W) where its object is."""

    label: str
    saliency: Tensor
    evidence: Tensor


def main(argv: Sequence[str] | None = None) -> Path:
    """Load, choose the images, draw; what a user can get wrong ends with one line and exit code 2."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="Folder of a training run; at most three.")
    parser.add_argument("--dataset", help="What they were trained on (default: what the first run's record says).")
    parser.add_argument("--names", nargs="+", help="What the runs are called (default: the names of their folders).")
    parser.add_argument("--count", type=int, default=4, help="How many images, one a row (default 4).")
    parser.add_argument("--digits", type=int, choices=(1, 2, 3), default=3, help="How many each has (default 3).")
    parser.add_argument("--output", type=Path, default=Path("runs/several.png"), help="Default: runs/several.png.")
    options = parser.parse_args(argv)
    names = options.names or [run.name for run in options.run]
    try:
        if options.count < 1:
            raise ValueError(f"--count must be at least 1, got {options.count}")
        if len(options.run) > 3 or len(names) != len(options.run):
            raise ValueError(f"give at most three runs and a name for each, got {len(options.run)} and {len(names)}")
        images = recorded_images(options.run[0], "test", options.dataset)
        if not images.is_multi_label or images.evidence is None:
            raise ValueError(f"{options.run[0]} was not trained on the planted set several")
        models = [read_checkpoint(str(run), "cpu") for run in options.run]
        rows = chosen(models, images, options.digits, options.count)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(dict(zip(names, models, strict=True)), images, rows, options.output)
    print(f"written to {options.output}")
    return options.output


def chosen(models: Sequence[Checkpoint], images: Any, digits: int, count: int) -> list[int]:
    """The first images that have so many digits, and whose labels every model predicts, and no others.

    Raises:
        ValueError: there is none, a model of exclusive classes, or one for images of another size.
    """
    labels = torch.from_numpy(images.labels)
    is_chosen = labels.sum(dim=1) == digits
    batch = images.__getitems__(range(len(images)))["pixel_values"]
    for model, pipeline in models:
        if not is_multi_label(model):
            raise ValueError("one of the models has exclusive classes: all must be trained on the planted set several")
        with torch.no_grad():
            logits = model(pixel_values=pipeline.prepare_evaluation(batch)).logits
        is_chosen &= ((logits > 0) == (labels > 0)).all(dim=1)
    rows = is_chosen.nonzero()[:count, 0].tolist()
    if not rows:
        raise ValueError(f"all models predict the labels of no test image with {digits} digits: train them longer")
    return rows


def label_maps(checkpoint: Checkpoint, images: Any, row: int) -> list[LabelMap]:
    """The map of every label of an image, in the order of the labels."""
    model, pipeline = checkpoint
    sample = images[row]
    labels = sample["labels"].nonzero()[:, 0]
    pixels = pipeline.normalize(sample["pixel_values"].expand(len(labels), -1, -1, -1))
    maps = label_saliency(model, pixels, labels, pipeline)
    return [
        LabelMap(images.label_names[label], one, sample["evidence"][label])
        for label, one in zip(labels.tolist(), maps, strict=True)
    ]


def draw(models: dict[str, Checkpoint], images: Any, rows: Sequence[int], path: Path) -> None:
    """A row for each image: the image, and for each model the maps of its labels."""
    maps = {name: [label_maps(one, images, row) for row in rows] for name, one in models.items()}
    labels = max(len(of_row) for of_row in next(iter(maps.values())))
    widths = [1.0] + ([0.18] + [1.0] * labels) * len(maps)
    side = WIDTH / sum(widths)
    figure = Figure(figsize=(WIDTH, (side + 0.36) * len(rows) + 0.5))
    grid = figure.add_gridspec(len(rows), len(widths), width_ratios=widths, wspace=0.06, hspace=0.36)
    for place, row in enumerate(rows):
        axes = figure.add_subplot(grid[place, 0])
        axes.imshow(images[row]["pixel_values"].permute(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.set_title("image", fontsize=11, pad=3)
        for group, of_rows in enumerate(maps.values()):
            for number, one in enumerate(of_rows[place]):
                axes = figure.add_subplot(grid[place, 2 + group * (labels + 1) + number])
                _show(axes, one)
    for group, name in enumerate(maps):
        left, right = (figure.axes[1 + group * labels + number].get_position() for number in (0, labels - 1))
        text = f"{figure_text(name, _LONGEST_NAME)}: map of each label"
        top = left.y1 + 0.32 / figure.get_size_inches()[1]
        figure.text((left.x0 + right.x1) / 2, top, text, ha="center", va="bottom", fontsize=11)
    note = "percent: how much of the 10 % most salient pixels lies in the outlined block of the label's own digit"
    figure.text(0.5, figure.axes[-1].get_position().y0 - 0.3 / figure.get_size_inches()[1], note, ha="center", va="top")
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


def _show(axes: Any, one: LabelMap) -> None:
    largest = float(one.saliency.max()) or 1.0
    axes.imshow(one.saliency / largest, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    rows, columns = one.evidence.nonzero().unbind(dim=1)
    corner, height, width = (
        (float(columns.min()) - 0.5, float(rows.min()) - 0.5),
        float(rows.max() - rows.min()) + 1,
        float(columns.max() - columns.min()) + 1,
    )
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#56B4E9", linewidth=2, clip_on=False))
    inside = 1 - float(top_outside(one.saliency[None], one.evidence[None], 0.1))
    axes.set_title(figure_text(one.label, _LONGEST_NAME), fontsize=11, pad=3)
    axes.set_xlabel(f"{100 * inside:.0f} %", fontsize=9, labelpad=2)
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    main()
