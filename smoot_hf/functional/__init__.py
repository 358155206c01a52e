"""Pure functions over tensors: no I/O, no model, no global random state."""

from .average_precision import average_precision, mean_average_precision
from .budget import update_budget
from .cells import cell_grid, cell_sum, spread_cells
from .localisation import boxes_to_mask
from .masking import (
    adversarial_fill,
    counter_uniform,
    least_salient_mask,
    masked_positions,
    mean_fill,
    other_image_fill,
    uniform_fill,
)
from .multi_label import (
    bernoulli_divergence,
    multi_label_loss,
    multi_label_ranking_score,
    multi_label_score,
    multi_label_shift,
    multi_label_target,
)
from .objective import ObjectiveParts, classification_loss, kl_divergence, masked_objective, probability_shift
from .perturbation import area_under_curve, deletion_curve, insertion_curve
from .removal import removal_fill
from .saliency import channel_mean, class_score, input_saliency, log_prob_derivative, ranking_score

__all__ = [
    "ObjectiveParts",
    "adversarial_fill",
    "area_under_curve",
    "average_precision",
    "bernoulli_divergence",
    "boxes_to_mask",
    "cell_grid",
    "cell_sum",
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
    "mean_average_precision",
    "mean_fill",
    "multi_label_loss",
    "multi_label_ranking_score",
    "multi_label_score",
    "multi_label_shift",
    "multi_label_target",
    "other_image_fill",
    "probability_shift",
    "ranking_score",
    "removal_fill",
    "spread_cells",
    "uniform_fill",
    "update_budget",
]
