"""A training run: data, model, trainer, and at its end the card, the report and the push."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import DatasetDict
from transformers import EvalPrediction, set_seed
from transformers.utils import logging

from ..data import InputPipeline
from ..data.class_counts import describe_class_counts, imbalance
from ..data.dataset import load_image_dataset
from ..data.decoded_images import DecodedImages, decode_images
from ..data.image_sizes import must_be_resized
from ..data.mixing import Mixing
from ..data.planted_evidence import plant_images
from ..errors import PushError, first_line
from ..evaluation import Faithfulness, Localisation, evaluate_faithfulness, evaluate_localisation
from ..evaluation.faithfulness import ALL_CURVES, FurtherCurve
from ..evaluation.ranked_batches import evenly_spread
from ..fingerprint import hub_revision
from ..functional.removal import Fill
from ..models.classifier import load_image_processor, load_model, load_pretrained_processor
from ..models.logits import MULTI_LABEL, is_multi_label
from ..training import SmootTrainer, SmootTrainingArguments
from ..training.checkpoint_folder import RunIdentity, find_damage, newest_whole_checkpoint, refuse_other_runs
from ..training.checkpoints import no_checkpoint
from . import prediction
from .arguments import make_parser, parse
from .flags import RecipeArguments
from .run import RecordBudget, RunRecord, SaveRecord

logger = logging.get_logger(__name__)

# The two fills of the tables: the fill moves the AUC as much as a training method does.
_FILLS: tuple[Fill, ...] = ("corner", "mean")


class Task(NamedTuple):
    """Everything that a trainer is built from."""

    model: Any
    processor: Any
    pipeline: InputPipeline
    train: DecodedImages
    test: DecodedImages


def main(defaults: Mapping[str, Any] | None, argv: Sequence[str]) -> dict[str, float]:
    """As `train.main`, whose flags have been checked as far as that goes without the libraries."""
    parser = make_parser(defaults or {}, __doc__)
    args, recipe = parse(parser, list(argv))
    try:
        args.resume_from_checkpoint = checkpoint_to_resume(args)
        task = prepare(args, recipe)
        trainer = make_trainer(task, args, recipe)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    if args.should_log:
        print(
            f"{args.method} on {recipe.data_name}: {len(task.train)} training and {len(task.test)} test images, ",
            end="",
        )
        print(f"{trainer.accelerator.num_processes} process(es) on {args.device.type}")
        describe_images(task)
    try:
        return train(trainer, args, recipe)
    except (ValueError, OSError, KeyError) as error:
        # A KeyError shows its message in quotes.
        message = error.args[0] if isinstance(error, KeyError) else error
        parser.error(str(message), code=1)


def describe_images(task: Task) -> None:
    """Print how many images each class has and how large they are; warn of classes of very unequal size."""
    names = task.train.label_names
    print(describe_class_counts(names, {"train": task.train.labels, "test": task.test.labels}))
    _, height, width = task.train.image_shape
    how = ", to which the model's image processor brought them" if task.train.is_resized else ""
    print(f"images and masks of {height}x{width} pixels{how}", flush=True)
    unequal = imbalance(names, task.train.labels)
    if unequal is not None:
        logger.warning(unequal)


def checkpoint_to_resume(args: SmootTrainingArguments) -> str | bool | None:
    """The folder that --resume_from_checkpoint names; of "true" or "last" `True`: the newest whole one of this run.

    The trainer asks the same again, and more, once data and model are there; this saves the time until then.

    Raises:
        ValueError: there is no checkpoint, or not all of it, or it is another run's; or a new run would begin among the
            checkpoints of another.
    """
    named = args.resume_from_checkpoint
    if named is None:
        if not args.overwrite_output_dir:
            refuse_other_runs(args.output_dir)
        return None
    if str(named).lower() not in ("true", "last"):
        damage = find_damage(named)
        if damage is not None:
            raise ValueError(
                f"resume_from_checkpoint={named!r}: no checkpoint in {named}: {damage}; leave the flag away to start "
                "afresh"
            )
        return named
    asked = RunIdentity(method=args.method, seed=args.seed)
    if newest_whole_checkpoint(args.output_dir, asked=asked) is None:
        raise ValueError(no_checkpoint(args.output_dir, asked))
    return True


def prepare(args: SmootTrainingArguments, recipe: RecipeArguments) -> Task:
    """Load and decode the data, build the model, its image processor and the input pipeline."""
    train, test = load_data(args, recipe)
    channels, height, width = train.image_shape
    # The trainer seeds too late for the initial weights.
    set_seed(args.seed)
    model = load_model(
        recipe.model,
        labels=train.label_names,
        image_size=(height, width),
        num_channels=channels,
        from_scratch=recipe.from_scratch,
        patch_size=recipe.patch_size,
    )
    if train.is_multi_label:
        model.config.problem_type = MULTI_LABEL
    if is_from_scratch(recipe):
        processor = load_image_processor(
            recipe.model,
            model,
            (height, width),
            *train.channel_statistics(),
            from_scratch=recipe.from_scratch,
            center_crop=recipe.image_size is not None,
        )
    else:
        processor = load_pretrained_processor(recipe.model)
    if recipe.convert_rgb or train.is_resized:
        processor.do_convert_rgb = True
    pipeline = InputPipeline.from_image_processor(
        processor,
        crop_padding=recipe.crop_padding,
        horizontal_flip=recipe.horizontal_flip,
        mix=_make_mixing(recipe, model),
        seed=args.seed,
    )
    return Task(model, processor, replace(pipeline, is_resized=train.is_resized), train, test)


def _make_mixing(recipe: RecipeArguments, model: Any) -> Mixing | None:
    """What the flags of a recipe say of mixing.

    Raises:
        ValueError: erasing without mixing, or a flag out of its range.
    """
    if not recipe.mixup and not recipe.cutmix:
        if recipe.random_erasing:
            raise ValueError(f"random_erasing={recipe.random_erasing} goes with mixup or cutmix: set one of them")
        return None
    return Mixing(model.config.num_labels, recipe.mixup, recipe.cutmix, recipe.random_erasing, is_multi_label(model))


def load_data(args: SmootTrainingArguments, recipe: RecipeArguments) -> tuple[DecodedImages, DecodedImages]:
    """The decoded training and test images.

    Raises:
        ValueError: both are one split; else as `load_image_dataset`, `decode_images` and `plant_images`.
    """
    if recipe.eval_split == recipe.train_split:
        raise ValueError(f"eval_split={recipe.eval_split!r} is what is trained on: name another split")
    if args.dataloader_drop_last:
        raise ValueError(
            "dataloader_drop_last=True would leave test images out of the evaluation as well: leave it away"
        )
    # The first process fills the cache, the others read it.
    with args.main_process_first(desc="decoding the images"):
        pipeline = None
        if not is_from_scratch(recipe):
            pipeline = InputPipeline.from_image_processor(load_pretrained_processor(recipe.model))
        sizes = {"train": recipe.max_train_samples, "test": recipe.max_eval_samples}
        images = load_images(recipe, recipe.dataset, sizes, pipeline)
    return images["train"], images["test"]


def is_from_scratch(recipe: RecipeArguments) -> bool:
    """Whether the model takes the images as they are; else its image processor may say their size."""
    return recipe.from_scratch or recipe.model == "cnn"


def load_images(
    recipe: Any, dataset: str, sizes: dict[str, int | None], pipeline: InputPipeline | None
) -> dict[str, DecodedImages]:
    """The decoded images of "train" and "test" as the flags of a recipe say, planted where they ask for it.

    Args:
        recipe: `RecipeArguments`, or others with flags of the same names.
        dataset: in place of that of the recipe.
        sizes: of each split how many images; `None`: all.
        pipeline: of the model's image processor, to whose size photographs are brought unless the recipe has an
            `image_size` (see `must_be_resized`); `None` for models that take images as they are.
    """
    splits = load_image_dataset(
        dataset,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        train_split=recipe.train_split,
        eval_split=recipe.eval_split,
    )
    # Of all images, so that every command decides alike, however few it looks at.
    resized = pipeline if pipeline and recipe.image_size is None and must_be_resized(splits, pipeline) else None
    decoded = decode_images(
        limit(splits, sizes),
        # Among photographs some are grey.
        convert_rgb=recipe.convert_rgb or (resized is not None and len(resized.mean) == 3),
        image_size=recipe.image_size,
        input_pipeline=resized,
    )
    images = {name: DecodedImages(split, is_resized=resized is not None) for name, split in decoded.items()}
    return images if recipe.planted == "plain" else plant_images(recipe.planted, images)


def limit(splits: DatasetDict, sizes: dict[str, int | None]) -> DatasetDict:
    """Random rows of a split, the same in every run: the first rows may well be of one class."""
    chosen = dict(splits)
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"max_{'train' if name == 'train' else 'eval'}_samples must be at least 1, got {size}")
        if size is not None and size < len(splits[name]):
            chosen[name] = splits[name].shuffle(seed=0).select(range(size))
    return DatasetDict(chosen)


def make_trainer(task: Task, args: SmootTrainingArguments, recipe: RecipeArguments) -> SmootTrainer:
    """The trainer of a task."""
    optimizer = None
    if recipe.optimizer == "adadelta":
        # Not among the names of --optim.
        optimizer = (torch.optim.Adadelta, {"lr": args.learning_rate, "weight_decay": args.weight_decay})
    return SmootTrainer(
        model=task.model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.test,
        data_collator=DecodedImages.collate,
        input_pipeline=task.pipeline,
        processing_class=task.processor,
        compute_metrics=prediction.metrics,
        optimizer_cls_and_kwargs=optimizer,
    )


def train(trainer: SmootTrainer, args: SmootTrainingArguments, recipe: RecipeArguments) -> dict[str, float]:
    """Train, evaluate, save model, processor, metrics, record and card, print a summary, and push where asked."""
    trainer.add_callback(RecordBudget(trainer))
    trainer.add_callback(SaveRecord(trainer, args, recipe))
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    # Pushed last, when there is nothing left that a failing Hub could keep from being saved.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    metrics, predicted = evaluate(trainer)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        RunRecord.of(trainer, args, recipe, result.metrics["train_runtime"]).save(args.output_dir)
        print(summary(trainer, args, recipe, metrics), flush=True)
    publish(trainer, args, recipe, predicted)
    return metrics


def evaluate(trainer: SmootTrainer) -> tuple[dict[str, float], np.ndarray]:
    """The metrics of the test images, and what is predicted for each of them, from one pass over them."""
    kept: list[np.ndarray] = []

    def metrics_and_predicted(outputs: EvalPrediction) -> dict[str, float]:
        kept.append(prediction.predicted(outputs))
        return prediction.metrics(outputs)

    compute_metrics, trainer.compute_metrics = trainer.compute_metrics, metrics_and_predicted
    try:
        metrics = trainer.evaluate()
    finally:
        trainer.compute_metrics = compute_metrics
    return metrics, kept[-1] if kept else np.empty(0, dtype=np.int64)


def summary(
    trainer: SmootTrainer, args: SmootTrainingArguments, recipe: RecipeArguments, metrics: Mapping[str, float]
) -> str:
    """What a user wants to know at the end."""
    lines = {"method": args.method, "data, model": f"{recipe.data_name}, {recipe.model}"}
    lines["test accuracy"] = f"{metrics['eval_accuracy']:.2%} of {len(trainer.eval_dataset)} images"
    if trainer.eval_dataset.is_multi_label:
        lines["test accuracy"] += " with all labels right"
        lines["test mAP"] = f"{metrics['eval_mean_average_precision']:.2%}"
    if trainer.mask_budget is not None:
        k, unit = trainer.mask_budget.statistics(), trainer.mask_budget.unit
        lines["K min/median/max"] = f"{k['k_min']:g} / {k['k_median']:g} / {k['k_max']:g} {unit} per training image"
    lines["model saved in"] = args.output_dir
    return "\n".join(["", *(f"  {name:<18}{value}" for name, value in lines.items())])


def publish(
    trainer: SmootTrainer, args: SmootTrainingArguments, recipe: RecipeArguments, predicted: np.ndarray
) -> None:
    """Write card, figures, results.json and report.html into the run's folder; push where `push_to_hub` says so.

    Where faithfulness cannot be measured, a warning says why, and card and report go without. The report shows training
    images, and is not pushed.

    Raises:
        PushError: what the Hub lacks, now or since a push during training; the model is saved by then.
    """
    # Of a local folder its name alone: the rest is nobody's business.
    card: dict[str, Any] = {"dataset": recipe.data_name}
    if trainer.is_world_process_zero():
        by_cell: list[Faithfulness] = []
        try:
            card["faithfulness"] = by_cell = measure(trainer, args, recipe)
            card["localisation"] = localise(trainer, args, recipe)
            if args.mask_cell > 1:
                by_cell = measure(trainer, args, recipe, cell=args.mask_cell, curves=("random",))
        except (ValueError, RuntimeError) as error:
            logger.warning(f"the card lacks what could not be measured of the saliency: {first_line(error)}")
        write_report(trainer, args, recipe, predicted, by_cell)
        on_hub = hub_revision(trainer.train_dataset)
        card["dataset_tags"] = on_hub and on_hub[0]
    if not args.push_to_hub:
        trainer.create_model_card(**card)
        return
    trainer.push_to_hub(**card)
    if trainer.failed_pushes:
        raise PushError("; ".join(trainer.failed_pushes.values()))


def write_report(
    trainer: SmootTrainer,
    args: SmootTrainingArguments,
    recipe: RecipeArguments,
    predicted: np.ndarray,
    faithfulness: list[Faithfulness],
) -> None:
    """Write report.html, see `training_report`; where that fails, a warning says why: the model is saved."""
    path = Path(args.output_dir) / "report.html"
    facts = {
        "method": args.method,
        "data": recipe.data_name,
        "model": Path(recipe.model).name if Path(recipe.model).is_dir() else recipe.model,
        "test accuracy": f"{prediction.is_right(predicted, trainer.eval_dataset.labels).mean():.2%} of "
        f"{len(predicted)} images{' with all labels right' if trainer.eval_dataset.is_multi_label else ''}",
        "training images": len(trainer.train_dataset),
        "epochs": f"{trainer.state.epoch or 0:g}",
        "seed": args.seed,
    }
    try:
        # That of a run before this one.
        path.unlink(missing_ok=True)
        # It needs matplotlib, which training does not.
        from .training_report import write_training_report

        write_training_report(
            path,
            trainer,
            predicted,
            faithfulness,
            facts=facts,
            # These sections explain the one class of an image; the card shows the saliency of several labels.
            with_saliency=bool(recipe.card_samples) and not trainer.eval_dataset.is_multi_label,
        )
    except Exception as error:  # whatever it is, the model and its push come first
        logger.warning(f"{path} is not written: {first_line(error)}")


def measure(
    trainer: SmootTrainer,
    args: SmootTrainingArguments,
    recipe: RecipeArguments,
    *,
    cell: int = 1,
    curves: Sequence[FurtherCurve] = ALL_CURVES,
) -> list[Faithfulness]:
    """Faithfulness on up to `card_samples` test images, spread evenly, by the library's convention with two fills."""
    if not recipe.card_samples:
        return []
    return [
        evaluate_faithfulness(
            trainer.model,
            evenly_spread(trainer.eval_dataset, recipe.card_samples),
            fill=fill,
            cell=cell,
            curves=curves,
            input_pipeline=trainer.input_pipeline,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
        )
        for fill in _FILLS
    ]


def localise(trainer: SmootTrainer, args: SmootTrainingArguments, recipe: RecipeArguments) -> Localisation | None:
    """Localisation on the same images; `None` where they do not say where their evidence is."""
    if not recipe.card_samples or trainer.eval_dataset.evidence is None:
        return None
    return evaluate_localisation(
        trainer.model,
        evenly_spread(trainer.eval_dataset, recipe.card_samples),
        input_pipeline=trainer.input_pipeline,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
    )
