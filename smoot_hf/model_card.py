"""The model card, its figures and results.json, written from a run and from nothing else.

What was not measured is not on the card. `HubTrainer.create_model_card` calls `write_model_card`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from .attributions import LogitsModel, attribute
from .card_figures import draw_budget, draw_curves, draw_saliency
from .card_text import card_text
from .environment import describe_environment
from .evaluation import Faithfulness
from .evaluation_data import data_batches, evenly_spread
from .fingerprint import dataset_fingerprint, hub_revision
from .functional.perturbation import has_prediction
from .model_state import untouched
from .published_processor import processor_agrees
from .results import Measurement, Results, Row, faithfulness_row
from .saving_trainer import first_line
from .training_args import changed_arguments

logger = logging.get_logger(__name__)

TAGS = ("smoot", "saliency", "interpretability", "image-classification")
FIGURES = "figures"
_SHOWN_IMAGES = 8
# Stated by the description as well, and in full in results.json.
_NOT_IN_METADATA = ("fractions", "end_points")
# Of an evaluation: how long it took, and when.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "step")


def write_model_card(trainer: Any, *, faithfulness: Sequence[Faithfulness] = (), **given: Any) -> None:
    """Write `README.md`, `figures/` and `results.json` into the trainer's output folder.

    Args:
        trainer: a `SmootTrainer`.
        faithfulness: of its model on its evaluation set, one for each convention.
        **given: the arguments of `HubTrainer.create_model_card`.
    """
    folder = Path(trainer.args.output_dir)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    is_peft = _library(folder) == "peft"
    results = run_results(trainer, faithfulness)
    results.save(folder / "results.json")
    about = _about(trainer, given)
    figures = _draw(trainer, faithfulness, folder / FIGURES)
    data = metadata(results, about, given, "peft" if is_peft else "transformers")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(results, about, figures)}").save(folder / "README.md")
    if is_peft:
        # As the Trainer does: PEFT adds what it knows of its adapter.
        trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(str(folder))


def run_results(trainer: Any, faithfulness: Sequence[Faithfulness] = ()) -> Results:
    """Everything that a run has measured, as the content of results.json.

    The first row has the metrics of the evaluation of the final weights, as `compute_metrics` reports them, and the
    statistics of K; the others a faithfulness measurement each.
    """
    args, budget = trainer.args, trainer.mask_budget
    metrics = {name: Measurement({args.seed: value}, "as reported") for name, value in final_metrics(trainer).items()}
    details: dict[str, Any] = {}
    if budget is not None:
        metrics |= {name: Measurement({args.seed: value}, "pixels") for name, value in budget.statistics().items()}
        height, width = budget.image_size
        details["k_histogram"] = {
            "image_size": [height, width],
            "lowest": budget.k_min,
            "counts": budget.histogram.tolist(),
        }
    rows = [Row(f"{args.method}, final weights", metrics, None, details)]
    rows += [faithfulness_row(args.method, {args.seed: found}) for found in faithfulness]
    settings = {
        "method": args.method,
        "seed": args.seed,
        **changed_arguments(args),
        **_beside_arguments(trainer),
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
    }
    return Results("train", settings, describe_environment(args.device), rows)


def _beside_arguments(trainer: Any) -> dict[str, Any]:
    """What decides the weights and stands in no argument: the optimizer in use, and the augmentation."""
    optimizer, pipeline = getattr(trainer.optimizer, "optimizer", trainer.optimizer), trainer.input_pipeline
    facts = {
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "crop_padding": getattr(pipeline, "crop_padding", None),
        "horizontal_flip": getattr(pipeline, "horizontal_flip", None),
    }
    return {name: value for name, value in facts.items() if value}


def final_metrics(trainer: Any) -> dict[str, float]:
    """Metrics of the last evaluation of the weights that the trainer holds now; empty where there was none.

    With `load_best_model_at_end` these are not the weights of the last step.
    """
    history, state = trainer.state.log_history, trainer.state
    ends = [i for i, entry in enumerate(history) if "train_runtime" in entry]
    later = [entry for entry in history[ends[-1] + 1 :] if _metrics_of(entry)] if ends else []
    if later:
        return _metrics_of(later[-1])
    step = state.global_step
    if trainer.args.load_best_model_at_end and ends and state.best_global_step:
        step = state.best_global_step
    at_step = [entry for entry in history if entry.get("step") == step and _metrics_of(entry)]
    return _metrics_of(at_step[-1]) if at_step else {}


def _metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an entry of the log, without the prefix of evaluations."""
    named = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.endswith(_NO_METRICS)
    }


def metadata(results: Results, about: Mapping[str, Any], given: Mapping[str, Any], library: str) -> ModelCardData:
    """The head of the card; `model-index` holds every metric but the loss, for the Hub's leaderboards."""
    given_tags = [given["tags"]] if isinstance(given.get("tags"), str) else list(given.get("tags") or [])
    tasks = [given["tasks"]] if isinstance(given.get("tasks"), str) else list(given.get("tasks") or [])
    tags = list(dict.fromkeys([*TAGS, results.settings["method"], *given_tags, *tasks, "generated_from_trainer"]))
    evaluations = _evaluations(results, about)
    return ModelCardData(
        model_name=about["name"],
        library_name=library,
        pipeline_tag="image-classification",
        language=given.get("language"),
        license=given.get("license"),
        base_model=about["base_model"],
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
    names = {
        "deletion_auc": "Deletion AUC (%, lower is better)",
        "insertion_auc": "Insertion AUC (%, higher is better)",
    }
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


def _about(trainer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says beside numbers: names, data, model."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    config = getattr(model, "config", None)
    name = given.get("model_name") or Path(args.output_dir).absolute().name
    origin = getattr(config, "_name_or_path", "") or None
    on_hub = hub_revision(trainer.train_dataset)
    dataset_id = _first(given.get("dataset_tags")) or (on_hub and on_hub[0])
    processor = trainer.processing_class
    return {
        "name": name,
        "repo": getattr(trainer, "hub_model_id", None) or args.hub_model_id or name,
        "base_model": given.get("finetuned_from") or (None if origin is None or Path(origin).is_dir() else origin),
        "is_finetuned": bool(given.get("finetuned_from") or origin),
        "dataset": _first(given.get("dataset")) or dataset_id,
        "dataset_id": dataset_id,
        "dataset_config": _first(given.get("dataset_args")),
        "dataset_revision": on_hub[1] if on_hub and on_hub[0] == dataset_id else None,
        "dataset_fingerprint": dataset_fingerprint(trainer.train_dataset),
        "train_images": _length(trainer.train_dataset),
        "eval_images": _length(trainer.eval_dataset),
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": [str(label) for _, label in sorted((getattr(config, "id2label", None) or {}).items())],
        "has_processor": hasattr(processor, "preprocess"),
        "processor_agrees": processor_agrees(trainer),
        "needs_code": bool(getattr(model, "_auto_class", None) or getattr(processor, "_auto_class", None)),
        "needs_timm": getattr(config, "model_type", None) == "timm_wrapper",
        "is_grey": getattr(config, "num_channels", 3) == 1,
    }


def _first(value: str | Sequence[str] | None) -> str | None:
    return value if value is None or isinstance(value, str) else next(iter(value), None)


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") and not isinstance(dataset, dict) else None


def _library(folder: Path) -> str | None:
    """What the card that is there already, written beside the weights, says of its library."""
    path = folder / "README.md"
    return ModelCard.load(path).data.get("library_name") if path.is_file() else None


def _draw(trainer: Any, faithfulness: Sequence[Faithfulness], folder: Path) -> dict[str, str]:
    """Draw what the run has: name of the figure -> path from the card. Figures of an earlier card are removed."""
    names = ("k_histogram", "curves", "saliency")
    for name in names:
        (folder / f"{name}.png").unlink(missing_ok=True)
    try:
        budget = trainer.mask_budget
        if budget is not None and budget.k_min < budget.k_max:
            draw_budget(budget, folder / "k_histogram.png")
        if faithfulness:
            draw_curves(faithfulness, folder / "curves.png")
            _draw_examples(trainer, folder / "saliency.png")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        logger.warning("the card has no figures, for matplotlib is not installed: pip install matplotlib, push again")
    return {name: f"{FIGURES}/{name}.png" for name in names if (folder / f"{name}.png").is_file()}


def _draw_examples(trainer: Any, path: Path) -> None:
    """Draw the saliency grid; where that cannot be done, for whatever reason the data give, the card goes without."""
    try:
        draw_saliency(*_examples(trainer), path)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        logger.warning(f"the card has no saliency grid: {first_line(error)}")


def _examples(trainer: Any) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Pictures, titles and saliency of some evaluation images, spread evenly over the set."""
    if isinstance(trainer.eval_dataset, dict):
        raise ValueError(f"eval_dataset is a dict of several sets, {list(trainer.eval_dataset)}")
    model, pipeline = trainer.model, trainer.input_pipeline
    scorer = LogitsModel(model, pipeline and pipeline.resize)
    with untouched(model):
        # The loader of the trainer's own evaluations: its rows, through its collator.
        loader = trainer.get_eval_dataloader()
        rows = evenly_spread(loader.dataset, _SHOWN_IMAGES)
        batches = data_batches(
            rows,
            model,
            input_pipeline=pipeline,
            data_collator=loader.collate_fn,
            label_name=trainer.label_names[0],
            batch_size=len(rows),
        )
        batch = next(iter(batches))
        with torch.no_grad():
            outputs = scorer(batch.images)
        predicted = outputs.argmax(dim=1).where(has_prediction(outputs), -1)
        maps = attribute(scorer, batch.images, batch.labels, batch.sample_idx, batch_size=len(rows))
    names = {**(getattr(getattr(model, "config", None), "id2label", None) or {}), -1: "no class (NaN)"}
    pairs = zip(batch.labels.tolist(), predicted.tolist(), strict=True)
    titles = [
        f"{names.get(label, label)}" + ("" if label == found else f"\npredicted {names.get(found, found)}")
        for label, found in pairs
    ]
    # Each picture over its own range: what normalisation did to it is not known without a pipeline.
    pictures = batch.images.float().cpu()
    low, high = pictures.amin(dim=(1, 2, 3), keepdim=True), pictures.amax(dim=(1, 2, 3), keepdim=True)
    return (pictures - low) / (high - low).clamp_min(1e-6), titles, maps.float().cpu()
