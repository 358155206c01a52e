"""Train an image classifier with SMOOT, SGT or in the standard way, on any data set and model.

    accelerate launch recipes/train.py --dataset DATA --model MODEL [--method smoot] [--config FILE] [flags]

DATA is a Hub id, a local directory (Parquet or imagefolder) or "digits"; MODEL is "cnn", "deit-tiny", a Hub id or a
local directory of transformers or timm. Every field of `TrainingArguments` and `SmootTrainingArguments` is a flag. A
YAML or JSON file, as the first argument or by --config, holds the same names as the flags; flags override it.

The recipes of the paper's data sets (train_mnist.py and its neighbours) are this script with other defaults.

What departs from the library's defaults, and why: 256 images a batch and an evaluation and a checkpoint per epoch, of
which the last is kept; nothing is reported to a tracker unless --report_to says so.
"""

import sys

from flags import check_flags

if __name__ == "__main__":
    # Before the imports below, which take ten seconds.
    check_flags({}, __doc__)

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from budget_history import RecordBudget
from command_line import RecipeArguments, make_parser, parse
from datasets import DatasetDict
from publish import publish
from run_record import RunRecord, SaveRecord
from transformers import EvalPrediction, set_seed

from smoot_hf import InputPipeline, SmootTrainer, SmootTrainingArguments
from smoot_hf.data import DecodedImages, decode_images, load_image_dataset
from smoot_hf.models import load_image_processor, load_model
from smoot_hf.resumable_trainer import no_checkpoint
from smoot_hf.run_identity import RunIdentity
from smoot_hf.whole_checkpoints import find_damage, newest_whole_checkpoint, refuse_other_runs


class Task(NamedTuple):
    """Everything that a trainer is built from."""

    model: Any
    processor: Any
    pipeline: InputPipeline
    train: DecodedImages
    test: DecodedImages


def main(defaults: Mapping[str, Any] | None = None, argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run a recipe: train, evaluate, save, report.

    What a user can get wrong ends the process with one line on stderr: with exit code 2 before training starts, with 1
    from then on (a sample that cannot be used, a full disk, a Hub that does not answer).

    Args:
        defaults: values of flags that differ from those of this script.
        argv: the command line; default: that of the process.

    Returns:
        The metrics of the final evaluation.
    """
    parser = make_parser(defaults or {}, __doc__.split("\n\n")[0])
    args, recipe = parse(parser, sys.argv[1:] if argv is None else list(argv))
    try:
        args.resume_from_checkpoint = checkpoint_to_resume(args)
        task = prepare(args, recipe)
        trainer = make_trainer(task, args, recipe)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    if args.should_log:
        print(
            f"{args.method} on {recipe.dataset}: {len(task.train)} training and {len(task.test)} test images, ", end=""
        )
        print(f"{trainer.accelerator.num_processes} process(es) on {args.device.type}")
    try:
        return train(trainer, args, recipe)
    except (ValueError, OSError, KeyError) as error:
        # A KeyError shows its message in quotes.
        message = error.args[0] if isinstance(error, KeyError) else error
        parser.error(str(message), code=1)


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
    mean, std = train.channel_statistics()
    processor = load_image_processor(
        recipe.model,
        model,
        (height, width),
        mean,
        std,
        from_scratch=recipe.from_scratch,
        center_crop=recipe.image_size is not None,
    )
    if recipe.convert_rgb:
        processor.do_convert_rgb = True
    pipeline = InputPipeline.from_image_processor(
        processor, crop_padding=recipe.crop_padding, horizontal_flip=recipe.horizontal_flip, seed=args.seed
    )
    return Task(model, processor, pipeline, train, test)


def load_data(args: SmootTrainingArguments, recipe: RecipeArguments) -> tuple[DecodedImages, DecodedImages]:
    """The decoded training and test images.

    Raises:
        ValueError: both are one split; else as `load_image_dataset` and `decode_images`.
    """
    if recipe.eval_split == recipe.train_split:
        raise ValueError(f"eval_split={recipe.eval_split!r} is what is trained on: name another split")
    # The first process fills the cache, the others read it.
    with args.main_process_first(desc="decoding the images"):
        splits = load_splits(recipe, recipe.dataset)
        decoded = decode(limit(splits, {"train": recipe.max_train_samples, "test": recipe.max_eval_samples}), recipe)
    return DecodedImages(decoded["train"]), DecodedImages(decoded["test"])


def load_splits(recipe: Any, dataset: str) -> DatasetDict:
    """The stored images of a data set as the flags of a recipe say, `RecipeArguments` or those of the same names."""
    return load_image_dataset(
        dataset,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        train_split=recipe.train_split,
        eval_split=recipe.eval_split,
    )


def decode(splits: DatasetDict, recipe: Any) -> DatasetDict:
    """The images decoded as the flags of a recipe say."""
    return decode_images(splits, convert_rgb=recipe.convert_rgb, image_size=recipe.image_size)


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
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=optimizer,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose highest logit is that of the label; logits that hold a NaN count as wrong."""
    outputs = prediction.predictions
    # Some models have further outputs; the logits of the class come first.
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    is_correct = logits.argmax(axis=-1) == prediction.label_ids
    return {"accuracy": float(np.mean(is_correct & ~np.isnan(logits).any(axis=-1)))}


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
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        RunRecord.of(trainer, args, recipe, result.metrics["train_runtime"]).save(args.output_dir)
        print(summary(trainer, args, recipe, metrics), flush=True)
    publish(trainer, args, recipe)
    return metrics


def summary(
    trainer: SmootTrainer, args: SmootTrainingArguments, recipe: RecipeArguments, metrics: Mapping[str, float]
) -> str:
    """What a user wants to know at the end."""
    lines = {"method": args.method, "data, model": f"{recipe.dataset}, {recipe.model}"}
    lines["test accuracy"] = f"{metrics['eval_accuracy']:.2%} of {len(trainer.eval_dataset)} images"
    if trainer.mask_budget is not None:
        k = trainer.mask_budget.statistics()
        lines["K min/median/max"] = f"{k['k_min']:g} / {k['k_median']:g} / {k['k_max']:g} pixels per training image"
    lines["model saved in"] = args.output_dir
    return "\n".join(["", *(f"  {name:<18}{value}" for name, value in lines.items())])


if __name__ == "__main__":
    main()
