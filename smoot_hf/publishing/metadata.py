"""The metadata of a model card: what the Hub reads of it, with every measured number in its `model-index`."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.utils import logging

from ..evaluation.results import Results

logger = logging.get_logger(__name__)

# What the card calls the metrics, in its tables as well.
COLUMNS = {
    "accuracy": "Accuracy (%)",
    "mean_average_precision": "Mean average precision (%)",
    "subset_accuracy": "Images with exactly the right labels (%)",
    "deletion_auc": "Deletion AUC (%, lower is better)",
    "random_auc": "The same in random order",
    "insertion_auc": "Insertion AUC (%, higher is better)",
    "gap": "Gap (higher is better)",
    "mean_average_precision_auc": "Deletion AUC of the mean average precision (%, lower is better)",
}
LOCALISATION = {
    "outside_0.1": "Top 10 % of the saliency outside the evidence (%, lower is better)",
    "relevance_mass": "Relevance mass on the evidence (%, higher is better)",
    "pointing_game": "Pointing game (%, higher is better)",
    "roc_auc": "ROC AUC of the saliency against the evidence (%, higher is better)",
}
TAGS = ("smoot", "saliency", "interpretability", "image-classification")
# Stated by the description as well, and in full in results.json.
_NOT_IN_METADATA = ("fractions", "end_points")


def metadata(results: Results, about: Mapping[str, Any], given: Mapping[str, Any], library: str) -> ModelCardData:
    """The head of the card; `model-index` holds every metric but the loss, for the Hub's leaderboards."""
    given_tags = [given["tags"]] if isinstance(given.get("tags"), str) else list(given.get("tags") or [])
    tasks = [given["tasks"]] if isinstance(given.get("tasks"), str) else list(given.get("tasks") or [])
    kind = [*TAGS, "multi-label-classification"] if about["is_multi_label"] else TAGS
    tags = list(dict.fromkeys([*kind, results.settings["method"], *given_tags, *tasks, "generated_from_trainer"]))
    evaluations = _evaluations(results, about)
    return ModelCardData(
        model_name=about["name"],
        library_name=library,
        pipeline_tag="image-classification",
        language=given.get("language"),
        license=given.get("license"),
        base_model=about["base_model_id"],
        datasets=[about["dataset_id"]] if about["dataset_id"] else None,
        tags=tags,
        metrics=list(dict.fromkeys(result.metric_type for result in evaluations)) or None,
        eval_results=evaluations or None,
    )


def _evaluations(results: Results, about: Mapping[str, Any]) -> list[EvalResult]:
    if about["dataset"] is None:
        logger.warning(
            "the card's metadata have no results, for nobody said of which data set they are: pass dataset='name', and "
            "dataset_tags='USER/NAME' where it is on the Hub, to push_to_hub or create_model_card"
        )
        return []
    common = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": about["dataset_id"] or about["dataset"],
        "dataset_name": about["dataset"],
        "dataset_config": about["dataset_config"],
        "dataset_revision": about["dataset_revision"],
    }
    first, *measured = results.rows
    found = [
        EvalResult(**common, metric_type=name, metric_name=name.replace("_", " ").capitalize(), metric_value=m.mean)
        for name, m in first.metrics.items()
        if m.unit == "as reported" and name != "loss"
    ]
    names = {name: COLUMNS[name] for name in ("deletion_auc", "insertion_auc", "mean_average_precision_auc")}
    names |= LOCALISATION
    for row in measured:
        found += [
            EvalResult(
                **common,
                metric_type=name,
                metric_name=title,
                metric_value=row.metrics[name].mean,
                metric_args={k: v for k, v in (row.convention or {}).items() if k not in _NOT_IN_METADATA},
            )
            for name, title in names.items()
            if name in row.metrics
        ]
    return found
