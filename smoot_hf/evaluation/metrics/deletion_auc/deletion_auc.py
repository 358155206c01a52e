"""Deletion AUC: the area under a classifier's curve while the most salient pixels are removed."""

from typing import Any

import datasets
import evaluate

from smoot_hf.evaluation.metrics import mean_area

_DESCRIPTION = """\
Deletion AUC measures the faithfulness of a saliency map. The most salient pixels of each image are removed step by step
and the classifier's accuracy (or the probability of one class) is followed: a map that points at what the classifier
uses makes the curve fall early. The metric is the area under that curve by the trapezoid rule. Lower is better.
"""

_CITATION = """\
@inproceedings{petsiuk2018rise,
  title = {{RISE}: Randomized Input Sampling for Explanation of Black-box Models},
  author = {Petsiuk, Vitali and Das, Abir and Saenko, Kate},
  booktitle = {British Machine Vision Conference},
  year = {2018}
}
"""

_KWARGS_DESCRIPTION = """\
Args:
    predictions: one curve per image, each a list of S+1 values: correctness (0 or 1), or a probability.
    fractions: the S+1 true fractions of removed positions, rising.
Returns:
    deletion_auc: mean area over the images, in the unit of the values; not divided by the span of the fractions.
Examples:
    >>> metric = evaluate.load(metric_path("deletion_auc"))
    >>> metric.compute(predictions=[[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]], fractions=[0.0, 0.5, 1.0])
    {'deletion_auc': 0.375}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DeletionAUC(evaluate.Metric):
    """Mean area under deletion curves; lower is better."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, predictions: Any, fractions: Any) -> dict[str, float]:
        return {"deletion_auc": mean_area(predictions, fractions)}
