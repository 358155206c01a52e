"""Overlays: photographs of anybody's, and over each the heat map of every attribution for what is predicted."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import one_hot

from ..evaluation.attributions import Method, attribute
from ..functional.perturbation import has_prediction
from ..markup import figure_text
from ..models.class_names import class_names
from ..models.logits import LogitsModel, is_multi_label
from ..models.state import model_device, model_dtype, untouched
from .checkpoint import Checkpoint
from .explanation import read_photograph
from .run import write_whole

_PREDICTIONS = 5
# Copies of a photograph in one forward pass: a small network takes 100 MB for each at 224x224 pixels.
_BATCH_SIZE = 8
# A heat map's colours end at this quantile of its values.
_BRIGHTEST = 0.99
# Opacity of the heat map where it is 0 and where it is brightest.
_LEAST_OPAQUE, _MOST_OPAQUE = 0.25, 0.75
_PANEL, _MOST_COLUMNS, _DPI = 3.0, 4, 120


class HeatMap(NamedTuple):
    """What an attribution says of one class: its values are (H, W).

    The title is that of its panel: the attribution, and of a multi-label model the label before it.
    """

    title: str
    values: Tensor


class Overlay(NamedTuple):
    """One photograph explained.

    Attributes:
        picture: uint8 (H, W, C), the photograph as the model gets it.
        predictions: the most probable classes with their probabilities, in falling order; of a multi-label model all
            labels of a probability above one half, or the one of the highest.
        maps: of every attribution for the first class, or for each of the labels of a multi-label model.
    """

    picture: np.ndarray
    predictions: list[tuple[str, float]]
    maps: list[HeatMap]


def write_overlays(
    checkpoint: Checkpoint, images: Sequence[Path], attributions: Sequence[Method], output: Path
) -> dict[Path, str]:
    """Explain image files, and write one PNG for each and `explanations.json`.

    Args:
        checkpoint: model and input pipeline.
        images: files.
        attributions: names.
        output: folder; is made.

    Returns:
        File -> reason, of those that cannot be read.

    Raises:
        ValueError: an attribution cannot explain the model, or the model's outputs hold a NaN.
    """
    output.mkdir(parents=True, exist_ok=True)
    failed: dict[Path, str] = {}
    entries: list[dict[str, Any]] = []
    has_several = is_multi_label(checkpoint.model)
    for image in images:
        try:
            pixels = read_photograph(image, len(checkpoint.pipeline.mean))
        except ValueError as error:
            failed[image] = str(error)
            continue
        overlay = explain_photograph(checkpoint, pixels, attributions)
        file = _free_name(image, {entry["file"] for entry in entries})
        draw_overlay(overlay, image.name).savefig(output / file, dpi=_DPI)
        said = overlay.predictions if has_several else overlay.predictions[:1]
        labels = ", ".join(f"{label}, {probability:.1%}" for label, probability in said)
        print(f"{image}: {labels}; {output / file}", flush=True)
        named = [{"label": label, "probability": probability} for label, probability in overlay.predictions]
        entries.append({"image": str(image), "file": file, "predictions": named})
    unread = [{"image": str(image), "reason": reason} for image, reason in failed.items()]
    content = {"attributions": list(attributions), "explained": entries, "not_read": unread}
    write_whole(output / "explanations.json", json.dumps(content, indent=2) + "\n")
    return failed


def _free_name(image: Path, taken: set[str]) -> str:
    """Files of one name in several folders are numbered; a photograph beside the results is not written over."""
    names = (f"{image.stem}{number}_explained.png" for number in ["", *(f"-{n}" for n in range(2, len(taken) + 2))])
    return next(name for name in names if name not in taken)


def explain_photograph(checkpoint: Checkpoint, pixels: Tensor, attributions: Sequence[Method]) -> Overlay:
    """Predict and explain one photograph; the maps have the resolution of the model's input.

    Args:
        checkpoint: model and input pipeline.
        pixels: uint8 (C, H, W), of any size.
        attributions: names.

    Raises:
        ValueError: an attribution cannot explain the model, or the model's outputs hold a NaN.
    """
    model, pipeline = checkpoint
    scorer, device = LogitsModel(model), model_device(model)
    with untouched(model):
        prepared = pipeline.prepare_evaluation(pixels[None].to(device))
        images = prepared.to(model_dtype(model) or prepared.dtype)
        with torch.no_grad():
            logits = scorer(images)
        if not bool(has_prediction(logits).all()):
            raise ValueError("the model's outputs hold a NaN or an infinity: it predicts nothing to explain")
        probabilities, classes = _predicted(logits[0].double(), scorer.is_multi_label)
        row = torch.zeros(1, dtype=torch.int64, device=device)

        labels = class_names(model.config)
        maps = []
        for label in classes if scorer.is_multi_label else classes[:1]:
            target = (one_hot(label, logits.shape[1]) if scorer.is_multi_label else label)[None]
            name = f"{figure_text(labels[int(label)], 28)}, " if scorer.is_multi_label else ""
            for method in attributions:
                values = attribute(scorer, images, target, row, method=method, batch_size=_BATCH_SIZE)
                maps.append(HeatMap(name + method.replace("_", " "), values[0].float().cpu()))
    mean, std = (torch.tensor(values)[:, None, None] for values in (pipeline.mean, pipeline.std))
    shown = ((prepared[0].cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    predictions = [
        (labels[index], value) for index, value in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]
    return Overlay(shown.permute(1, 2, 0).numpy(), predictions, maps)


def _predicted(logits: Tensor, has_several: bool) -> tuple[Tensor, Tensor]:
    """Probabilities and classes of `Overlay.predictions`, of logits (classes,)."""
    if not has_several:
        return logits.softmax(dim=0).topk(min(_PREDICTIONS, len(logits)))
    return logits.sigmoid().topk(max(1, int((logits > 0).sum())))


def draw_overlay(overlay: Overlay, name: str) -> Figure:
    """The photograph, and beside it the photograph in grey under each heat map.

    Args:
        overlay: what is drawn.
        name: of the photograph, for the title.
    """
    panels = 1 + len(overlay.maps)
    columns = min(panels, _MOST_COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(_PANEL * max(2, columns), _PANEL * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    photograph = overlay.picture.repeat(3, axis=2) if overlay.picture.shape[2] == 1 else overlay.picture
    pictures = [("photograph", photograph)]
    pictures += [(title, heat_over(overlay.picture, values)) for title, values in overlay.maps]
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, picture) in zip(grid.flat, pictures, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10)
    said = "; ".join(f"{figure_text(label, 28)} {100 * share:.0f} %" for label, share in overlay.predictions[:3])
    figure.suptitle(f"{figure_text(name, 40)}\n{said}", fontsize=11)
    return figure


def heat_over(picture: np.ndarray, values: Tensor) -> np.ndarray:
    """A heat map over a photograph in grey: float (H, W, 3) in [0, 1].

    Args:
        picture: uint8 (H, W, C).
        values: (H, W), at least 0.
    """
    grey = picture.mean(axis=2, keepdims=True) / 255
    brightest = float(values.flatten().quantile(_BRIGHTEST)) or float(values.max()) or 1.0
    share = (values / brightest).clamp(0, 1).numpy()
    opacity = (_LEAST_OPAQUE + (_MOST_OPAQUE - _LEAST_OPAQUE) * share)[..., None]
    return (1 - opacity) * grey + opacity * colormaps["inferno"](share)[..., :3]
