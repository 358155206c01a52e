"""What is measured of a trained network of a campaign."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from .. import functional as SF
from ..evaluation import evaluate_faithfulness, evaluate_localisation
from ..evaluation.convention import resolve_convention
from .campaign_images import Data, Splits
from .label_maps import shares_by_part


def judge(model: nn.Module, splits: Splits, data: Data) -> dict[str, Any]:
    """What is measured of a trained network; see `run`."""
    if data.planted == "several":
        return _judge_several(model, splits)
    result: dict[str, Any] = {}
    if data.planted == "plain":
        result["accuracy"] = _accuracy(model, splits)
    else:
        found = evaluate_localisation(model, splits.test, input_pipeline=splits.pipeline).to_dict()
        result |= {"accuracy": found.pop("accuracy"), "localisation": found}
    if data.gap_samples:
        some = Subset(splits.test, range(min(data.gap_samples, len(splits.test))))
        curves = evaluate_faithfulness(
            model, some, curves=("least_salient_first",), input_pipeline=splits.pipeline
        ).to_dict()
        result["deletion"] = {name: curves[name] for name in ("gap", "gap_interval", "n", "convention")}
        result["deletion"]["auc"] = curves["deletion"]["auc"]
    if data.tables:
        result["tables"] = paper_tables(model, splits, data)
    return result


def _judge_several(model: nn.Module, splits: Splits) -> dict[str, Any]:
    """Of several labels: the share of images with all of them right, mean average precision, the parts of the maps."""
    logits, labels = _test_logits(model, splits, None)
    return {
        "accuracy": 100 * float(((logits > 0) == (labels > 0)).all(dim=1).double().mean()),
        "mean_average_precision": 100 * float(SF.mean_average_precision(logits, labels)),
        "localisation": {"scores": shares_by_part(model, splits.test, splits.pipeline)},
    }


def paper_tables(model: nn.Module, splits: Splits, data: Data) -> dict[str, float]:
    """Deletion areas in percent by both presets and two fills, and by the score that rounds p_y to 1.

    The last, "paper corner float32", ranks by the gradient of a plain float32 log-softmax: where p_y is rounded to 1 it
    has no share of the label. "saturated" is the percentage of the images whose p_y is rounded to 1.
    """
    some = Subset(splits.test, range(min(data.gap_samples, len(splits.test))))
    areas = {
        f"{preset} {fill}": evaluate_faithfulness(
            model, some, convention=resolve_convention(preset, fill=fill), curves=(), input_pipeline=splits.pipeline
        ).deletion_auc
        for preset in ("paper", "default")
        for fill in ("corner", "mean")
    }
    areas["paper corner float32"] = evaluate_faithfulness(
        model, some, _float32_log_prob_map, convention="paper", curves=(), input_pipeline=splits.pipeline
    ).deletion_auc
    return areas | {"saturated": saturated_share(model, splits, data.gap_samples)}


def _float32_log_prob_map(model: Callable[[Tensor], Tensor], images: Tensor, target: Tensor) -> Tensor:
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.nll_loss(model(leaf).log_softmax(1), target, reduction="sum"), leaf)
    return SF.channel_mean(gradient, signed=False)


def saturated_share(model: nn.Module, splits: Splits, count: int) -> float:
    """Percentage of the first `count` test images whose softmax output of the label is 1 in float32."""
    outputs, labels = _test_logits(model, splits, count)
    return 100 * float((outputs.softmax(1).gather(1, labels[:, None]) == 1).double().mean())


def measure_briefly(model: nn.Module, splits: Splits, data: Data) -> dict[str, float]:
    """Accuracy, saturated share and, where there is evidence, the null share of the top 10 %, on some test images."""
    count = min(data.history_samples, len(splits.test))
    found = {
        "saturated": saturated_share(model, splits, count),
        "accuracy": _accuracy(model, splits, count),
    }
    # In the first epochs it may be that no image is classified correctly, and then there is nothing to localise.
    if data.planted == "plain" or not found["accuracy"]:
        return found
    some = Subset(splits.test, range(count))
    local = evaluate_localisation(model, some, top=(0.1,), input_pipeline=splits.pipeline)
    return found | {"outside_0.1": local.outside[0.1].value}


def _accuracy(model: nn.Module, splits: Splits, count: int | None = None) -> float:
    logits, labels = _test_logits(model, splits, count)
    return 100 * float((logits.argmax(dim=1) == labels).double().mean())


@torch.no_grad()
def _test_logits(model: nn.Module, splits: Splits, count: int | None) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) of the first `count` test images, and their labels."""
    model.eval()
    device = next(model.parameters()).device
    images, labels = splits.test.pixel_values[:count], splits.test.labels[:count].to(device)
    batches = (splits.pipeline.normalize(batch.to(device)) for batch in images.split(256))
    return torch.cat([model(pixel_values=batch).logits for batch in batches]), labels
