"""Evaluation of the saliency of any image classifier: faithfulness, comparisons, sanity checks, results."""

from .attributions import attribute
from .comparison import PairedDifference, compare_faithfulness
from .convention import Convention
from .faithfulness import Curve, Faithfulness, evaluate_faithfulness
from .image_classes import ImageClasses, find_image_classes
from .intervals import mean_interval
from .metrics import metric_path
from .ranked_batches import NothingToMeasureError
from .results import Measurement, Results, Row, load_results
from .sanity_check import WeightRandomization, randomized_weights_correlation

__all__ = [
    "Convention",
    "Curve",
    "Faithfulness",
    "ImageClasses",
    "Measurement",
    "NothingToMeasureError",
    "PairedDifference",
    "Results",
    "Row",
    "WeightRandomization",
    "attribute",
    "compare_faithfulness",
    "evaluate_faithfulness",
    "find_image_classes",
    "load_results",
    "mean_interval",
    "metric_path",
    "randomized_weights_correlation",
]
