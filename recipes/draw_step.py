"""Draw what SMOOT does to a few training images: image, saliency, masked pixels, masked image and K.

    python recipes/draw_step.py runs/digits-cnn-smoot --dataset digits --output step.png

Time: seconds. The run must have kept its training state (not --save_only_model), where K of every image is stored.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from smoot_hf import functional as SF
from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.data.decoded_images import DecodedImages, decode_images
from smoot_hf.experiments.checkpoint import load_budget, load_checkpoint

ROWS = ("image", "saliency", "least salient K", "masked")


def panels(run: Path, dataset: str, count: int) -> tuple[list[tuple[str, Tensor]], Tensor, list[str]]:
    """(name, (count, H, W, C) images in [0, 1] or (count, H, W) signed saliency) of each row; K; the labels' names."""
    data = DecodedImages(decode_images(load_image_dataset(dataset))["train"])
    try:
        k_of_all = load_budget(run, data).k
        model, pipeline = load_checkpoint(str(run), data, "cpu")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    rows = [int((torch.from_numpy(data.labels) == label).nonzero()[0, 0]) for label in range(count)]
    batch = data.__getitems__(rows)

    images = pipeline.normalize(batch["pixel_values"]).requires_grad_()
    score = SF.class_score(model(pixel_values=pipeline.resize(images)).logits, batch["labels"])
    saliency = SF.input_saliency(score, images)
    images, k = images.detach(), k_of_all[rows]
    is_masked = SF.least_salient_mask(saliency, k)
    noise = SF.counter_uniform(0, 0, torch.tensor(rows), tuple(images.shape[1:]))
    masked = torch.where(is_masked, SF.uniform_fill(images, is_masked, noise), images)
    mean, std = (torch.tensor(values)[:, None, None] for values in (pipeline.mean, pipeline.std))
    shown = [("image", images * std + mean), ("least salient K", is_masked.float()), ("masked", masked * std + mean)]
    pictures: dict[str, Any] = {name: value.clamp(0, 1).permute(0, 2, 3, 1) for name, value in shown}
    pictures["saliency"] = saliency
    return [(name, pictures[name]) for name in ROWS], k, [data.label_names[label] for label in batch["labels"].tolist()]


def draw(run: Path, dataset: str, count: int, output: Path) -> None:
    """Write the figure."""
    pictures, k, names = panels(run, dataset, count)
    pixels = pictures[0][1][0].shape[0] * pictures[0][1][0].shape[1]
    figure = Figure(figsize=(1.1 * count + 1, 1.1 * len(pictures) + 0.7))
    axes = figure.subplots(len(pictures), count)
    for row, (name, values) in zip(axes, pictures, strict=True):
        for column, axis in enumerate(row):
            if name == "saliency":
                limit = values[column].abs().max()
                axis.imshow(values[column], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            else:
                axis.imshow(values[column], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    for axis, budget in zip(axes[-1], k.tolist(), strict=True):
        axis.set_xlabel(f"K = {budget}\n({budget / pixels:.0%})", fontsize=8)
    figure.tight_layout(pad=0.4)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    print(f"written to {output}")


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="Folder of a training run with its checkpoint.")
    parser.add_argument("--dataset", default="digits", help="What it was trained on (default: digits).")
    parser.add_argument("--count", type=int, default=8, help="How many classes, one image each (default 8).")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/step.png"), help="The picture (default runs/step.png)."
    )
    arguments = parser.parse_args()
    draw(arguments.run, arguments.dataset, arguments.count, arguments.output)


if __name__ == "__main__":
    main()
