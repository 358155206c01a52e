"""Pure functions over tensors: no I/O, no model, no global random state."""

from .budget import update_budget
from .localisation import boxes_to_mask
from .masking import counter_uniform, least_salient_mask, masked_positions, mean_fill, uniform_fill
from .objective import ObjectiveParts, classification_loss, kl_divergence, masked_objective, probability_shift
from .perturbation import area_under_curve, deletion_curve, insertion_curve
from .removal import removal_fill
from .saliency import channel_mean, class_score, input_saliency, log_prob_derivative, ranking_score

__all__ = [
    "ObjectiveParts",
    "area_under_curve",
    "boxes_to_mask",
    "channel_mean",
    "class_score",
    "classification_loss",
    "counter_uniform",
    "deletion_curve",
    "input_saliency",
    "insertion_curve",
    "kl_divergence",
    "least_salient_mask",
    "log_prob_derivative",
    "masked_objective",
    "masked_positions",
    "mean_fill",
    "probability_shift",
    "ranking_score",
    "removal_fill",
    "uniform_fill",
    "update_budget",
]
