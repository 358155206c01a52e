"""Where an image has several labels: the saliency map of each, and in whose block of the planted set it lies."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import InputPipeline
from ..evaluation.attributions import attribute
from ..functional.localisation import relevance_mass, top_outside
from ..models.logits import LogitsModel, config_value
from ..models.state import untouched

# The parts of an image of the planted set `several`, for each of its labels.
PARTS = ("own", "others", "null")
_TOP = 0.1
_BATCH = 256


def label_saliency(model: nn.Module, images: Tensor, labels: Tensor, pipeline: InputPipeline) -> Tensor:
    """The saliency of one label of each image: the magnitude of its logit's gradient, channel mean.

    Args:
        model: a multi-label classifier, in eval mode.
        images: float (B, C, H, W), normalised.
        labels: int64 (B,), the label of each image that is explained.
        pipeline: resizes the images to the model's input.

    Returns:
        (B, H, W), detached.
    """
    scorer = LogitsModel(model, pipeline.resize)
    target = F.one_hot(labels, config_value(model, "num_labels"))
    return attribute(scorer, images, target, torch.arange(len(labels)), signed=False)


def parts_of(evidence: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Which positions belong to a label's own object, to an object of another label, and to none.

    Args:
        evidence: bool (B, classes, H, W).
        labels: int64 (B,), the label of each image that is meant.

    Returns:
        "own", "others" and "null": bool (B, H, W), of which one is `True` at every position.
    """
    own, any_label = evidence[torch.arange(len(labels)), labels], evidence.any(dim=1)
    return {"own": own, "others": any_label & ~own, "null": ~any_label}


def shares_by_part(model: nn.Module, images: Any, pipeline: InputPipeline) -> dict[str, dict[str, float]]:
    """How much of each label's saliency lies in which part of the image: the mean over all labels of all images.

    Labels that the model does not find are measured too, so that every model is measured on the same ones. A map of one
    value everywhere has the shares of the areas.

    Args:
        model: a multi-label classifier.
        images: the planted set `several`, `PlantedImages` or `DecodedImages`.
        pipeline: normalises its images.

    Returns:
        For each of `PARTS` the percentages "PART_0.1", of the 10 % most salient positions, and "PART_mass", of the
        map's mass; and "outside_0.1", of the top 10 % that are not in the label's own block. Each is a dict of "value"
        and "chance", that of a random order of the positions.
    """
    image, label = torch.as_tensor(images.labels).nonzero(as_tuple=True)
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {}
    with untouched(model):
        for rows, labels in zip(image.split(_BATCH), label.split(_BATCH), strict=True):
            batch = images.__getitems__(rows.tolist())
            maps = label_saliency(
                model, pipeline.normalize(batch["pixel_values"].to(device)), labels.to(device), pipeline
            ).cpu()
            for part, mask in parts_of(batch["evidence"], labels).items():
                found.setdefault(f"{part}_{_TOP}", []).append(1 - top_outside(maps, mask, _TOP))
                found.setdefault(f"{part}_mass", []).append(relevance_mass(maps, mask))
                found.setdefault(part, []).append(mask.flatten(1).double().mean(dim=1))
    percent = {name: 100 * float(torch.cat(values).mean()) for name, values in found.items()}
    scores = {
        f"{part}_{kind}": {"value": percent[f"{part}_{kind}"], "chance": percent[part]}
        for part in PARTS
        for kind in (str(_TOP), "mass")
    }
    own = scores[f"own_{_TOP}"]
    return scores | {f"outside_{_TOP}": {name: 100 - value for name, value in own.items()}}
