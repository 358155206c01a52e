"""The problem that a model is trained for: exclusive classes, or several labels for an image."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .. import functional as SF
from ..models.logits import is_multi_label


class Problem(NamedTuple):
    """What Equations 1 to 6 are for a problem; each takes logits (B, classes) and gives (B,).

    Attributes:
        loss: of logits, labels and a label smoothing factor.
        divergence: of clean and masked logits, in the unit of the loss.
        shift: delta of clean and masked logits, alpha, n, the mode and the labels.
        ranking_score: of logits, labels (`None`: those predicted) and the name of the score; its gradient ranks pixels.
        loss_gives_saliency: whether the gradient of the loss is minus that of the score `"log_prob"`.
    """

    loss: Callable[[Tensor, Tensor, float], Tensor]
    divergence: Callable[[Tensor, Tensor], Tensor]
    shift: Callable[[Tensor, Tensor, float, int, str, Tensor], Tensor]
    ranking_score: Callable[[Tensor, Tensor | None, str], Tensor]
    loss_gives_saliency: bool


def _class_ranking_score(logits: Tensor, labels: Tensor | None, score: str) -> Tensor:
    return SF.ranking_score(logits, logits.argmax(dim=1) if labels is None else labels, score)


def _label_ranking_score(logits: Tensor, labels: Tensor | None, score: str) -> Tensor:
    return SF.multi_label_ranking_score(logits, SF.multi_label_target(logits, labels), score)


def _mean_over_labels(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    if label_smoothing:
        raise ValueError(f"label_smoothing_factor={label_smoothing} is for exclusive classes: set it to 0")
    # The mean, as transformers has it. So the divergence is one too, and lambda weighs as in Equation 5.
    return SF.multi_label_loss(logits, labels) / logits.shape[1]


def _mean_divergence(logits: Tensor, masked_logits: Tensor) -> Tensor:
    return SF.bernoulli_divergence(logits, masked_logits) / logits.shape[1]


# Softmax outputs; labels int64 (B,), or soft ones (B, classes).
SINGLE_LABEL = Problem(
    SF.classification_loss, SF.kl_divergence, SF.probability_shift, _class_ranking_score, loss_gives_saliency=True
)
# Sigmoid outputs; labels (B, classes) in [0, 1]. The labels that an image lacks are in its loss, not in its score.
MULTI_LABEL = Problem(
    _mean_over_labels, _mean_divergence, SF.multi_label_shift, _label_ranking_score, loss_gives_saliency=False
)


def problem_of(model: nn.Module) -> Problem:
    """The problem by the configuration of the model, also where DDP or torch.compile wraps it."""
    return MULTI_LABEL if is_multi_label(model) else SINGLE_LABEL
