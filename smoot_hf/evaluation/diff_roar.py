"""DiffROAR: does a map's top hold more of what a fresh network can learn from than its bottom (arXiv 2102.12781)?

A network judges the maps of another: it is trained anew on images of which only the most salient positions are left,
and once more on images of which only the least salient ones are; the difference of their test accuracies is positive
where the map is right, and near 0 for a random one. The judge never meets a kind of removal that it was not trained
on, so the number says nothing of how the judged model bears removal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from ..functional.removal import Order, removal_ranks, removed_counts
from ..models.logits import LogitsModel, refuse_multi_label
from ..models.state import untouched
from .attributions import Method, attribute

# Normalised images (N, C, H, W) and labels int64 (N,).
LabelledImages = tuple[Tensor, Tensor]

_BATCH = 256


@dataclass(frozen=True)
class DiffRoar:
    """Test accuracy, in percent, of the judge on the top and on the bottom of the maps.

    Attributes:
        top: trained and tested on the most salient positions alone.
        bottom: on the least salient ones.
        kept: the fraction of the positions that was left.
    """

    top: float
    bottom: float
    kept: float

    @property
    def difference(self) -> float:
        """Top minus bottom; higher is better, 0 is a random map."""
        return self.top - self.bottom


def diff_roar(
    model: nn.Module,
    train_judge: Callable[[Tensor, Tensor], nn.Module],
    train: LabelledImages,
    test: LabelledImages,
    kept: float,
    *,
    method: Method = "gradient",
    seed: int = 0,
) -> DiffRoar:
    """Judge a model's maps by what a fresh network learns from their top and from their bottom.

    Args:
        model: whose maps of the labels are judged, by magnitude; left as it is found.
        train_judge: trains a fresh network on images and labels and returns it. It must begin with the same weights at
            every call, so that the judge is the same for both halves and for every model that is compared.
        train: images at the model's size, normalised, and labels.
        test: the same.
        kept: fraction of the positions that is left, in (0, 1), floored; the others become 0, which after the usual
            normalisation is the mean of the training set.
        method: of `attributions.attribute`; `"random"` is the control.
        seed: of the noise of attributions.

    Returns:
        Both accuracies; two trainings of the judge are run for them.

    Raises:
        ValueError: `kept` outside its range, an unknown method, or a multi-label model.
    """
    refuse_multi_label(model, "DiffROAR trains a judge on")
    if not 0 < kept < 1:
        raise ValueError(f"kept must be a fraction in (0, 1), got {kept}")
    maps = [_maps(model, *split, method, seed) for split in (train, test)]
    accuracies = []
    for order in get_args(Order):  # the most salient first
        shown, tested = (only(images, m, kept, order) for (images, _), m in zip((train, test), maps, strict=True))
        accuracies.append(_accuracy(train_judge(shown, train[1]), tested, test[1]))
    return DiffRoar(top=accuracies[0], bottom=accuracies[1], kept=kept)


def only(images: Tensor, maps: Tensor, kept: float, order: Order) -> Tensor:
    """Images of which nothing is left but the positions that go first: (N, C, H, W), (N, H, W) -> (N, C, H, W)."""
    ranks = removal_ranks(maps, order)
    count = removed_counts((0.0, kept), ranks[0].numel())[1]
    return torch.where((ranks < count)[:, None], images, 0.0)


def _maps(model: nn.Module, images: Tensor, labels: Tensor, method: Method, seed: int) -> Tensor:
    """(N, H, W)."""
    scorer, rows = LogitsModel(model), torch.arange(len(images), device=images.device)
    with untouched(model):
        parts = [
            attribute(scorer, images[some], labels[some], some, method=method, seed=seed) for some in rows.split(_BATCH)
        ]
    return torch.cat(parts)


def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    scorer = LogitsModel(network)
    with untouched(network), torch.no_grad():
        predicted = torch.cat([scorer(some).argmax(dim=1) for some in images.split(_BATCH)])
    return 100 * float((predicted == labels).double().mean())
