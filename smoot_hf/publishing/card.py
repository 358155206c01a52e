"""The model card: `README.md` with its metadata and figures, and results.json, all written from a run."""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..data.image_processor import processor_agrees
from ..errors import first_line, writing
from ..evaluation.attributions import attribute
from ..evaluation.faithfulness import Faithfulness
from ..evaluation.localisation import Localisation
from ..evaluation.ranked_batches import DataBatch, check_labels, data_batches, evenly_spread, has_index
from ..evaluation.results import (
    Measurement,
    Results,
    Row,
    describe_environment,
    faithfulness_row,
    left_out_notes,
    localisation_row,
)
from ..fingerprint import dataset_fingerprint, hub_revision
from ..functional.perturbation import has_prediction
from ..markup import markdown_code, markdown_link, markdown_text, one_line
from ..models.logits import LogitsModel, is_multi_label
from ..models.state import is_run_together, untouched
from .figures import draw_budget, draw_curves, draw_saliency
from .files import FIGURE_NAMES, FIGURES
from .metadata import COLUMNS, LOCALISATION, metadata

logger = logging.get_logger(__name__)

_SHOWN_IMAGES = 8
# Key of an entry of the log whose evaluation was of other data than the trainer's evaluation set.
OF_OTHER_DATA = "of_other_data"
# Of an evaluation: how long it took, and when.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "step")


class Examples(NamedTuple):
    """Evaluation images: pictures (n, C, H, W) in [0, 1], lines of text above each, saliency (n, H, W) at least 0."""

    pictures: torch.Tensor
    titles: list[list[str]]
    maps: torch.Tensor


def write_model_card(
    trainer: Any, *, faithfulness: Sequence[Faithfulness] = (), localisation: Localisation | None = None, **given: Any
) -> None:
    """Write `README.md`, `figures/` and `results.json` into the trainer's output folder.

    A figure that cannot be drawn, because there is no evaluation set or no matplotlib, is left out with a warning.

    Args:
        trainer: a `SmootTrainer`.
        faithfulness: of its model on its evaluation set, one for each convention.
        localisation: of its model on its evaluation set, where that says where the evidence is.
        **given: the arguments of `SmootTrainer.create_model_card`.

    Raises:
        SaveError: the folder cannot be written to. Errors of the model or of the data are not changed.
    """
    folder = Path(trainer.args.output_dir)
    is_peft = _is_adapter(trainer)
    about = _about(trainer, given)
    results = run_results(trainer, faithfulness, localisation)
    examples = _examples(trainer) if faithfulness else None
    with writing(str(folder)):
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        results.save(folder / "results.json")
        figures = _draw(trainer.mask_budget, faithfulness, examples, folder / FIGURES)
    data = metadata(results, about, given, "peft" if is_peft else "transformers")
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(results, about, figures)}")
    with writing(str(folder)):
        card.save(folder / "README.md")
        if is_peft:
            # As the Trainer does: PEFT adds what it knows of its adapter.
            trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(str(folder))


def check_card_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that `create_model_card` does not take, before anything is done.

    Args:
        function: the trainer's own.
        given: the arguments of a push.

    Raises:
        TypeError: the function does not take one of the arguments.
    """
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [name for name in given if name not in parameters]
    if unknown:
        raise TypeError(
            f"push_to_hub and create_model_card take no {', '.join(map(repr, unknown))}: the card takes "
            f"{', '.join(parameters)}"
        )


def run_results(
    trainer: Any, faithfulness: Sequence[Faithfulness] = (), localisation: Localisation | None = None
) -> Results:
    """Everything that a run has measured, as the content of results.json.

    The first row has the metrics of the evaluation of the final weights, as `compute_metrics` reports them, and the
    statistics of K; the others a faithfulness measurement each, and the last the localisation, where it was measured.
    """
    args, budget = trainer.args, trainer.mask_budget
    metrics = {name: Measurement({args.seed: value}, "as reported") for name, value in final_metrics(trainer).items()}
    details: dict[str, Any] = {}
    if budget is not None:
        metrics |= {name: Measurement({args.seed: value}, budget.unit) for name, value in budget.statistics().items()}
        height, width = budget.image_size
        details["k_histogram"] = {
            "image_size": [height, width],
            "positions": budget.positions,
            "lowest": budget.k_min,
            "counts": budget.histogram.tolist(),
        }
    rows = [Row(f"{args.method}, final weights", metrics, None, details)]
    rows += [faithfulness_row(args.method, {args.seed: found}) for found in faithfulness]
    if localisation is not None:
        rows.append(localisation_row(args.method, {args.seed: localisation}))
    settings = {
        "method": args.method,
        "seed": args.seed,
        **args.changed_from_defaults(),
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
        "mix": None if getattr(pipeline, "mix", None) is None else repr(pipeline.mix),
    }
    return {name: value for name, value in facts.items() if value}


def final_metrics(trainer: Any) -> dict[str, float]:
    """Metrics of the evaluation set for the weights that the trainer holds now; empty where it was not evaluated.

    Evaluations of other data do not count, see `SmootTrainer.evaluate`; of several evaluation sets each one does. With
    `load_best_model_at_end` the weights are not those of the last step.
    """
    state = trainer.state
    history = [entry for entry in state.log_history if OF_OTHER_DATA not in entry]
    ends = [i for i, entry in enumerate(history) if "train_runtime" in entry]
    later = _newest(history[ends[-1] + 1 :]) if ends else {}
    if later:
        return later
    step = state.global_step
    if trainer.args.load_best_model_at_end and ends and state.best_global_step:
        step = state.best_global_step
    return _newest([entry for entry in history if entry.get("step") == step])


def _newest(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The newest value of each metric: every one of several evaluation sets has an entry of its own."""
    return {name: value for entry in entries for name, value in _metrics_of(entry).items()}


def _metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an entry of the log, without the prefix of evaluations."""
    named = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.endswith(_NO_METRICS)
    }


def _about(trainer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says beside numbers: names, data, model."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    config = getattr(model, "config", None)
    name = given.get("model_name") or Path(args.output_dir).absolute().name
    origin = getattr(config, "_name_or_path", "") or None
    base_model = given.get("finetuned_from") or (None if Path(origin or ".").is_dir() else _hub_id(origin))
    on_hub = hub_revision(trainer.train_dataset)
    dataset_id = _hub_id(_first(given.get("dataset_tags")) or (on_hub and on_hub[0]))
    processor = trainer.processing_class
    return {
        "name": name,
        "repo": getattr(trainer, "hub_model_id", None) or args.hub_model_id or name,
        "base_model": base_model,
        "base_model_id": _hub_id(base_model),
        "is_finetuned": bool(given.get("finetuned_from") or origin),
        "dataset": _first(given.get("dataset")) or _first(given.get("dataset_tags")) or dataset_id,
        "dataset_id": dataset_id,
        "dataset_config": _first(given.get("dataset_args")),
        "dataset_revision": on_hub[1] if on_hub and on_hub[0] == dataset_id else None,
        "dataset_fingerprint": dataset_fingerprint(trainer.train_dataset),
        "train_images": _length(trainer.train_dataset),
        "eval_images": _length(trainer.eval_dataset),
        "has_eval_sets": is_eval_sets(trainer.eval_dataset),
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": [str(label) for _, label in sorted((getattr(config, "id2label", None) or {}).items())],
        "has_processor": hasattr(processor, "preprocess"),
        "processor_agrees": processor_agrees(trainer),
        "needs_code": bool(getattr(model, "_auto_class", None) or getattr(processor, "_auto_class", None)),
        "needs_timm": getattr(config, "model_type", None) == "timm_wrapper",
        "is_multi_label": is_multi_label(model),
        "is_grey": getattr(config, "num_channels", 3) == 1,
    }


def _first(value: str | Sequence[str] | None) -> str | None:
    return value if value is None or isinstance(value, str) else next(iter(value), None)


def is_eval_sets(dataset: Any) -> bool:
    """Whether a trainer's `eval_dataset` is several sets by name, as the Trainer takes them."""
    return isinstance(dataset, dict)


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") and not is_eval_sets(dataset) else None


def _is_adapter(trainer: Any) -> bool:
    """Whether the model is saved as an adapter, which PEFT alone can load."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return hasattr(model, "peft_config") and hasattr(model, "create_or_update_model_card")


def _hub_id(name: str | None) -> str | None:
    """A name, where it may be that of a repository on the Hub: what is no such name the Hub refuses on a card."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def _draw(budget: Any, faithfulness: Sequence[Faithfulness], examples: Examples | None, folder: Path) -> dict[str, str]:
    """Draw what the run has: name of the figure -> path from the card. Figures of an earlier card are removed."""
    for name in FIGURE_NAMES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    try:
        if budget is not None and budget.k_min < budget.k_max:
            draw_budget(budget, folder / "k_histogram.png")
        if faithfulness:
            draw_curves(faithfulness, folder / "curves.png")
        if examples is not None:
            draw_saliency(*examples, folder / "saliency.png")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        logger.warning("the card has no figures, for matplotlib is not installed: pip install matplotlib, push again")
    return {name: f"{FIGURES}/{name}.png" for name in FIGURE_NAMES if (folder / f"{name}.png").is_file()}


def _examples(trainer: Any) -> Examples | None:
    """Some evaluation images, spread evenly over the set; `None`, with a warning, where none can be had."""
    why = _no_examples(trainer.eval_dataset)
    if is_run_together(trainer):
        why = "one process alone cannot run a sharded model"
    if why is None:
        try:
            return _explained_images(trainer)
        except ValueError as error:
            why = first_line(error)
    logger.warning(f"the card has no saliency maps: {why}")
    return None


def _explained_images(trainer: Any) -> Examples:
    """The evaluation images that the card shows, with labels, predictions and saliency.

    Raises:
        ValueError: what the evaluation set holds cannot be measured, for example for want of labels.
    """
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
        if scorer.is_multi_label:
            check_labels(batch.labels, outputs.shape[1])
            return _labels_apart(scorer, batch, outputs)
        predicted = outputs.argmax(dim=1).where(has_prediction(outputs), -1)
        maps = attribute(scorer, batch.images, batch.labels, batch.sample_idx, batch_size=len(rows))
    names = {**(getattr(getattr(model, "config", None), "id2label", None) or {}), -1: "no class (NaN)"}
    pairs = zip(batch.labels.tolist(), predicted.tolist(), strict=True)
    titles = [
        [str(names.get(label, label)), *([] if label == found else [f"predicted {names.get(found, found)}"])]
        for label, found in pairs
    ]
    return Examples(_pictures(batch.images), titles, maps.float().cpu())


def _labels_apart(scorer: LogitsModel, batch: DataBatch, outputs: torch.Tensor) -> Examples:
    """Of a multi-label model: an image once for each of its labels, with the map of that label alone.

    Raises:
        ValueError: none of the images has a label.
    """
    rows, labels = batch.labels.nonzero()[:_SHOWN_IMAGES].unbind(dim=1)
    if not len(rows):
        raise ValueError(f"none of {len(batch.labels)} images of eval_dataset has a label")
    one_hot = torch.nn.functional.one_hot(labels, outputs.shape[1])
    maps = attribute(scorer, batch.images[rows], one_hot, batch.sample_idx[rows], batch_size=len(rows))
    names = getattr(scorer.model.config, "id2label", None) or {}
    titles = [
        [str(names.get(label, label)), *([] if is_predicted else ["missed"])]
        for label, is_predicted in zip(labels.tolist(), (outputs[rows, labels] > 0).tolist(), strict=True)
    ]
    return Examples(_pictures(batch.images[rows]), titles, maps.float().cpu())


def _pictures(images: torch.Tensor) -> torch.Tensor:
    """In [0, 1], each over its own range: what normalisation did to it is not known without a pipeline."""
    pictures = images.float().cpu()
    low, high = pictures.amin(dim=(1, 2, 3), keepdim=True), pictures.amax(dim=(1, 2, 3), keepdim=True)
    return (pictures - low) / (high - low).clamp_min(1e-6)


def _no_examples(dataset: Any) -> str | None:
    """Why no images can be taken from an evaluation set; `None` where they can."""
    if dataset is None:
        return "the trainer has no eval_dataset"
    if is_eval_sets(dataset):
        return f"eval_dataset holds several evaluation sets ({', '.join(map(repr, dataset))})"
    if not has_index(dataset) or not len(dataset):
        return f"eval_dataset, a {type(dataset).__name__}, has no length and index, or no rows"
    return None


def card_text(results: Results, about: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """Everything below the metadata: the template `card.md`, filled in.

    Args:
        results: of `run_results`: the final weights first, then a row for each convention.
        about: names, data and model, of `_about`.
        figures: name -> path from the card.
    """
    first = results.rows[0]
    measured, located = results.rows_with("deletion_auc"), results.rows_with("relevance_mass")
    settings = dict(results.settings)
    # The commit comes last, under a name that says of what it is.
    versions = {name: version for name, version in results.environment.items() if version is not None}
    if "commit" in versions:
        versions["commit of smoot_hf"] = versions.pop("commit")
    return _template().render(
        **about,
        # The same text means the same in JSON and in Python, and stays on its line of the code.
        repo_literal=json.dumps(one_line(about["repo"]), ensure_ascii=False),
        reported={name: m.mean for name, m in first.metrics.items() if m.unit == "as reported"},
        measured=_measured(measured) if measured else None,
        located=_located(located[0]) if located else None,
        budget=_budget(first),
        figures=figures,
        method=settings["method"],
        seed=settings["seed"],
        epochs=settings.pop("epochs"),
        steps=settings.pop("steps"),
        settings=settings,
        versions=versions,
    )


@cache
def _template() -> jinja2.Template:
    """`card.md`. Its filters write what others have chosen so that it stays text, see `smoot_hf.markup`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # The card is Markdown: the escapes of HTML would show in its code.
        autoescape=False,
    )
    environment.filters |= {
        "text": markdown_text,
        "code": markdown_code,
        "link": markdown_link,
        "thousands": "{:,}".format,
    }
    return environment.get_template("card.md")


def _measured(rows: Sequence[Row]) -> dict[str, Any]:
    """The faithfulness measurements, one row for each convention, as the template takes them."""
    columns = {name: title for name, title in COLUMNS.items() if any(name in row.metrics for row in rows)}
    by_seed = [list(row.details["by_seed"].values()) for row in rows]
    return {
        "image_counts": sorted({found["n"] for row in by_seed for found in row}),
        # A card is of one run: its seed is among the settings, and the limits say what one run means.
        "table": Results("", {}, {}, rows).markdown_table(columns, cell=_mean).strip(),
        "notes": left_out_notes(rows),
        "readings": [
            {
                "number": number,
                "intervals": [found["deletion"]["interval"] for found in row if found["deletion"]["interval"]],
                "is_no_better_than_random": "random_auc" in metrics
                and metrics["deletion_auc"].mean >= metrics["random_auc"].mean,
            }
            for number, (row, metrics) in enumerate(zip(by_seed, (row.metrics for row in rows), strict=True), 1)
        ],
    }


def _located(row: Row) -> dict[str, Any]:
    """The localisation as the template takes it: a line for each score, with its interval and what chance gives."""
    (found,) = row.details["by_seed"].values()
    scores = [(title, found["scores"][name]) for name, title in LOCALISATION.items() if name in found["scores"]]
    return {"n": found["n"], "how": found["description"], "scores": scores, "notes": left_out_notes([row])}


def _mean(row: Row, name: str) -> str:
    return f"{row.metrics[name].mean:.2f}"


def _budget(first: Row) -> dict[str, Any] | None:
    """K at the end of training, as the template takes it; `None` for a run without K."""
    histogram = first.details.get("k_histogram")
    if histogram is None:
        return None
    counts, lowest = histogram["counts"], histogram["lowest"]
    return {
        **{name: first.metrics[name].mean for name in ("k_min", "k_median", "k_max")},
        "positions": histogram["positions"],
        "unit": first.metrics["k_median"].unit,
        "images": sum(counts),
        "lowest": lowest,
        "highest": lowest + len(counts) - 1,
        "at_lowest": counts[0],
        "at_highest": counts[-1],
    }
