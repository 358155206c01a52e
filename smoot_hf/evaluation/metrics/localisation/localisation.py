"""Localisation: where a saliency map lies, against a mask of the evidence."""

from typing import Any

import datasets
import evaluate

from smoot_hf.evaluation.metrics import mean_localisation

_DESCRIPTION = """\
Localisation measures how much of a saliency map lies where the evidence for the label is known to lie: on a
segmentation, a box, or a planted object. Nothing is removed from the image.
"""

_CITATION = """\
@article{arras2022clevr,
  title = {{CLEVR-XAI}: A Benchmark Dataset for the Ground Truth Evaluation of Neural Network Explanations},
  author = {Arras, Leila and Osman, Ahmed and Samek, Wojciech},
  journal = {Information Fusion},
  year = {2022}
}
"""

_KWARGS_DESCRIPTION = """\
Args:
    predictions: one map per image, H rows of W values; higher is more important.
    references: one mask per image, H rows of W booleans, true where the evidence lies; neither empty nor everything.
    top: fraction of the positions whose share outside the evidence is measured, default 0.1.
Returns:
    relevance_mass, rank_accuracy, pointing_game, roc_auc: means over the images in [0, 1]; higher is better.
    outside: mean share of the top positions outside the evidence, in [0, 1]; lower is better.
Examples:
    >>> metric = evaluate.load(metric_path("localisation"))
    >>> metric.compute(predictions=[[[3.0, 1.0]]], references=[[[True, False]]], top=0.5)["relevance_mass"]
    0.75
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Localisation(evaluate.Metric):
    """Mean localisation scores of saliency maps."""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        masks = datasets.Sequence(datasets.Sequence(datasets.Value("bool")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": rows, "references": masks}),
        )

    def _compute(self, predictions: Any, references: Any, top: float = 0.1) -> dict[str, float]:
        return mean_localisation(predictions, references, top)
