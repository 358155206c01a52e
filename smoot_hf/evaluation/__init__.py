"""How faithful the saliency of a classifier is, however it was trained."""

from .attributions import attribute
from .comparison import PairedDifference, compare_faithfulness
from .convention import Convention
from .faithfulness import Curve, Faithfulness, evaluate_faithfulness
from .image_classes import ImageClasses, find_image_classes
from .localisation import Localisation, compare_localisation, evaluate_localisation, on_shared_images
from .metrics import metric_path
from .results import Results, load_results
from .sanity_check import randomized_weights_correlation

__all__ = [
    "Convention",
    "Curve",
    "Faithfulness",
    "ImageClasses",
    "Localisation",
    "PairedDifference",
    "Results",
    "attribute",
    "compare_faithfulness",
    "compare_localisation",
    "evaluate_faithfulness",
    "evaluate_localisation",
    "find_image_classes",
    "load_results",
    "metric_path",
    "on_shared_images",
    "randomized_weights_correlation",
]
