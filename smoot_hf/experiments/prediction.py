"""What a model predicts for the test images, and how often that is right."""

import numpy as np
import torch
from transformers import EvalPrediction

from .. import functional as SF


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy; where an image has several labels, mean average precision as well.

    Args:
        prediction: its `label_ids` are classes (n,), or several labels (n, classes) of 0 and 1.

    Returns:
        "accuracy", the share of images that are right, see `is_right`; "mean_average_precision" in [0, 1].
    """
    labels = prediction.label_ids
    found = {"accuracy": float(is_right(predicted(prediction), labels).mean())}
    if labels.ndim == 2:
        precision = SF.mean_average_precision(torch.from_numpy(_logits(prediction)), torch.from_numpy(labels))
        found["mean_average_precision"] = float(precision)
    return found


def predicted(prediction: EvalPrediction) -> np.ndarray:
    """The class of the highest logit, int64 (n,); -1 where the logits hold a NaN.

    Of several labels int64 (n, classes): 1 where the sigmoid output is above one half, else 0; -1 for a NaN.
    """
    logits = _logits(prediction)
    if prediction.label_ids.ndim == 2:
        return np.where(np.isnan(logits), -1, logits > 0)
    return np.where(np.isnan(logits).any(axis=-1), -1, logits.argmax(axis=-1))


def is_right(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the class of each image is predicted; of several labels all of them, and no other: bool (n,)."""
    right = predicted == labels
    return right if right.ndim == 1 else right.all(axis=1)


def _logits(prediction: EvalPrediction) -> np.ndarray:
    outputs = prediction.predictions
    # Some models have further outputs; the logits of the class come first.
    return outputs[0] if isinstance(outputs, tuple) else outputs
