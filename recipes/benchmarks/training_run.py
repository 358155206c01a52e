"""A whole training, input path included: SmootTrainer beside the plain Trainer as the official example sets it up.

    python recipes/benchmarks/training_run.py --dataset uoft-cs/cifar10 [--model deit-tiny] [--bf16] [--output FILE]

Time: half a minute on two CPU cores with `--model resnet-18 --batch 64 --steps 8`, and ten seconds more for decoding
the data the first time.

Each way trains for some steps, then the next one does, for some turns; the first two steps of each turn do not count.

  plain                   `Trainer`, `with_transform`: decode, RandomCrop, flip, ToTensor, Normalize, image by image.
  standard                `SmootTrainer(method="standard")`, rows decoded once, the same augmentation on the device.
  smoot                   SMOOT, on the same rows.
  smoot, with_transform   SMOOT, on the plain Trainer's data.

plain / it: how many times as long as with the plain Trainer an image takes. wait: share of a step that the batch takes
to come, measured with the device idle before and after; without workers it holds everything that the loader does. MB:
most memory allocated at a time, on CUDA alone.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import DatasetDict
from input_path import PADDING, loader_settings, official_example
from torchvision import transforms
from training_step import MODELS
from transformers import Trainer, TrainerCallback, TrainingArguments

from smoot_hf import InputPipeline, SmootTrainer, SmootTrainingArguments
from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.data.decoded_images import DecodedImages, decode_images

Method = Literal["standard", "smoot"]
WARM_UP = 2
CUDA = torch.cuda.is_available()


class Watch(TrainerCallback):
    """When each step ended, and how long its batch took to come."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.waits: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time at which the device has done the step."""
        self.ends.append(now())


class Watched(Trainer):
    """A Trainer that tells its watch how long each batch took to come."""

    watch = Watch()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.get_batch_samples`."""
        start = now()
        batches = super().get_batch_samples(*args, **kwargs)
        self.watch.waits.append(now() - start)
        return batches


class WatchedSmoot(Watched, SmootTrainer):
    """The same of a SmootTrainer."""


def now() -> float:
    """The time at which the device has done all that it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def make_trainers(splits: DatasetDict, arguments: argparse.Namespace) -> dict[str, Watched]:
    """A trainer for each way, of one training set."""
    make_model, batch, shape, _ = MODELS[arguments.model]
    data = DecodedImages(decode_images(splits)["train"])
    if data.image_shape != shape:
        raise SystemExit(f"--model {arguments.model} takes images {shape}, those of --dataset are {data.image_shape}")
    crop = transforms.RandomCrop(shape[1:], padding=PADDING)
    transformed, collate = official_example(splits["train"], data, crop)
    pipeline = InputPipeline(*data.channel_statistics(), crop_padding=PADDING, horizontal_flip=True)
    common = loader_settings() | {
        "per_device_train_batch_size": arguments.batch or batch,
        "max_steps": arguments.steps + WARM_UP,
        "dataloader_num_workers": arguments.workers,
        "dataloader_pin_memory": CUDA,
        "use_cpu": not CUDA,
        "bf16": arguments.bf16,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }

    def ours(method: Method, **more: Any) -> Watched:
        return WatchedSmoot(make_model(), SmootTrainingArguments(**common, method=method), **more)

    rows = {"train_dataset": data, "data_collator": DecodedImages.collate, "input_pipeline": pipeline}
    plain = {"train_dataset": transformed, "data_collator": collate}
    return {
        "plain": Watched(make_model(), TrainingArguments(**common), **plain),
        "standard": ours("standard", **rows),
        "smoot": ours("smoot", **rows),
        "smoot, with_transform": ours("smoot", **plain),
    }


def train(trainer: Watched) -> dict[str, float]:
    """One turn: images per second, share of waiting, memory."""
    trainer.watch = watch = Watch()
    trainer.add_callback(watch)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    trainer.remove_callback(watch)
    spent = watch.ends[-1] - watch.ends[WARM_UP - 1]
    waited = sum(watch.waits[WARM_UP : len(watch.ends)])
    images = trainer.args.per_device_train_batch_size * (len(watch.ends) - WARM_UP)
    memory = {"peak_mb": torch.cuda.max_memory_allocated() / 1e6} if CUDA else {}
    return {"images_per_second": images / spent, "wait": waited / spent, **memory}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="Hub id or local directory.")
    parser.add_argument("--model", choices=MODELS, default="deit-tiny", help="Must take the images at their size.")
    parser.add_argument("--batch", type=int, help="Images in a step, in the place of the model's own.")
    parser.add_argument("--steps", type=int, default=20, help="Steps of a turn that count.")
    parser.add_argument("--turns", type=int, default=3, help="Turns to measure.")
    parser.add_argument("--workers", type=int, default=0, help="Processes that load, as in the official example.")
    parser.add_argument("--bf16", action="store_true", help="Forward passes in bfloat16 where autocast says so.")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/training_run.json"), help="JSON file.")
    arguments = parser.parse_args()
    trainers = make_trainers(load_image_dataset(arguments.dataset), arguments)
    turns = [{way: train(trainer) for way, trainer in trainers.items()} for _ in range(arguments.turns)]
    print(f"{arguments.model}\n{'':<24}{'img/s':>9}   min .. max{'':<4}{'plain / it':>12}{'wait %':>9}   min .. max")
    results = {}
    for way in trainers:
        r = {key: [turn[way][key] for turn in turns] for key in turns[0][way]}
        r["time_to_plain"] = [turn["plain"]["images_per_second"] / turn[way]["images_per_second"] for turn in turns]
        results[way] = {key: [statistics.median(values), min(values), max(values)] for key, values in r.items()}
        rate, wait = results[way]["images_per_second"], [100 * share for share in results[way]["wait"]]
        rates, waits = f"{rate[1]:.0f} .. {rate[2]:.0f}", f"{wait[1]:.2f} .. {wait[2]:.2f}"
        memory = f"{results[way]['peak_mb'][0]:.0f} MB" if CUDA else ""
        slower = results[way]["time_to_plain"][0]
        print(f"{way:<24}{rate[0]:>9.0f}   {rates:<16}{slower:>9.2f}{wait[0]:>9.2f}   {waits:<16}{memory}")
    settings = {name: str(value) for name, value in vars(arguments).items()} | {"torch": torch.__version__}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"settings": settings, "median_min_max": results}, indent=2), encoding="utf-8"
    )
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
