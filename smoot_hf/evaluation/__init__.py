"""Evaluation of the saliency of any image classifier: faithfulness, localisation, comparisons, sanity checks."""

from .attributions import attribute
from .comparison import PairedDifference, compare_faithfulness
from .convention import Convention
from .faithfulness import Curve, Faithfulness, evaluate_faithfulness
from .image_classes import ImageClasses, find_image_classes
from .intervals import mean_interval
from .localisation import Localisation, compare_localisation, evaluate_localisation, on_shared_images
from .metrics import metric_path
from .ranked_batches import NothingToMeasureError
from .referee import RefereeMatrix, referee_matrix
from .results import Measurement, Results, Row, load_results
from .sanity_check import WeightRandomization, randomized_weights_correlation

__all__ = [
    "Convention",
    "Curve",
    "Faithfulness",
    "ImageClasses",
    "Localisation",
    "Measurement",
    "NothingToMeasureError",
    "PairedDifference",
    "RefereeMatrix",
    "Results",
    "Row",
    "WeightRandomization",
    "attribute",
    "compare_faithfulness",
    "compare_localisation",
    "evaluate_faithfulness",
    "evaluate_localisation",
    "find_image_classes",
    "load_results",
    "mean_interval",
    "metric_path",
    "on_shared_images",
    "randomized_weights_correlation",
    "referee_matrix",
]
