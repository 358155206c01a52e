"""Images per second of the input path of training, beside that of `with_transform`, on one core.

    python recipes/benchmarks/input_path.py --dataset uoft-cs/cifar10 [--turns 7] [--output FILE.json]

Time: a minute on one core, and half a minute more for decoding the data the first time.

Every line makes batches of 256 from shuffled rows, without workers, and takes its turn with the others, so that a slow
moment of the machine hits all of them; the median is what to quote.

  with_transform         what the official image classification example does, at the size of the data: every image is
                         decoded by Pillow, then RandomCrop(padding=4), RandomHorizontalFlip, ToTensor and Normalize of
                         torchvision, image by image; the plain Trainer's loader.
  with_transform, 224    the same with the example's own RandomResizedCrop(224) in the place of RandomCrop.
  rows                   `DecodedImages.__getitems__`: copies of memory-mapped uint8 rows, and nothing else.
  fetch                  the same through the loader of `SmootTrainer`, with the sample index and the checks of a batch:
                         all that is left to the CPU where a GPU augments.
  whole path             fetch, then `InputPipeline.prepare_training`: random crop with padding, flip, normalise.
  whole path, 224        the same, then `InputPipeline.resize` to 224x224, which SMOOT does after the mask.
  copy                   one contiguous copy of as many bytes as a batch has: the memory bandwidth.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torchvision import transforms
from transformers import Trainer, TrainingArguments

from smoot_hf import InputPipeline, PaperCnnConfig, PaperCnnForImageClassification, SmootTrainer, SmootTrainingArguments
from smoot_hf.data.dataset import load_image_dataset
from smoot_hf.data.decoded_images import DecodedImages, decode_images

BATCH = 256
PADDING = 4
# Makes ready one batch after the other, and says how many images each had.
Path_ = Iterator[int]
BASELINES = {"whole path, 224": "with_transform, 224"}


def official_example(
    dataset: Dataset, data: DecodedImages, crop: Callable[[Any], Any]
) -> tuple[Dataset, Callable[[list[dict[str, Any]]], dict[str, Tensor]]]:
    """Training set and collator of the official image classification example."""
    mean, std = data.channel_statistics()
    mode = "RGB" if data.image_shape[0] == 3 else "L"
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    transform = transforms.Compose(steps)

    def transform_batch(batch: dict[str, Any]) -> dict[str, Any]:
        batch["pixel_values"] = [transform(image.convert(mode)) for image in batch["image"]]
        return batch

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = torch.stack([sample["pixel_values"] for sample in samples])
        return {"pixel_values": images, "labels": torch.tensor([sample["labels"] for sample in samples])}

    return dataset.with_transform(transform_batch), collate


def with_transform(dataset: Dataset, data: DecodedImages, crop: Callable[[Any], Any]) -> Path_:
    """The official example's input path, endlessly."""
    train_dataset, collate = official_example(dataset, data, crop)
    trainer = Trainer(make_model(data), TrainingArguments(**loader_settings()), collate, train_dataset)
    for batch in endlessly(trainer.get_train_dataloader()):
        yield len(batch["pixel_values"])


def rows(data: DecodedImages) -> Path_:
    """Rows without a loader, endlessly."""
    while True:
        for indices in torch.randperm(len(data)).split(BATCH):
            yield len(data.__getitems__(indices.tolist())["pixel_values"])


def decoded(data: DecodedImages, prepare: Callable[[dict[str, Tensor]], object]) -> Path_:
    """Batches of `SmootTrainer`'s loader, made ready by `prepare`, endlessly."""
    trainer = SmootTrainer(
        make_model(data),
        SmootTrainingArguments(**loader_settings()),
        train_dataset=data,
        data_collator=DecodedImages.collate,
        input_pipeline=InputPipeline(*data.channel_statistics()),
    )
    for batch in endlessly(trainer.get_train_dataloader()):
        prepare(batch)
        yield len(batch["pixel_values"])


def copies(data: DecodedImages) -> Path_:
    """Contiguous copies, endlessly."""
    source = torch.zeros(BATCH, *data.image_shape, dtype=torch.uint8)
    while True:
        yield len(source.clone())


def endlessly(loader: Iterable[Any]) -> Iterator[Any]:
    """One epoch after the other."""
    while True:
        yield from loader


def loader_settings() -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": BATCH,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "dataloader_drop_last": True,
        "report_to": "none",
        "use_cpu": True,
    }


def make_model(data: DecodedImages) -> PaperCnnForImageClassification:
    """A trainer wants a model; it is not run."""
    channels, height, _ = data.image_shape
    config = PaperCnnConfig(image_size=height, num_channels=channels, num_labels=len(data.label_names))
    return PaperCnnForImageClassification(config)


def make_paths(dataset: Dataset, data: DecodedImages) -> dict[str, Path_]:
    """Every line of the table."""
    pipeline = InputPipeline(*data.channel_statistics(), size=(224, 224), crop_padding=PADDING, horizontal_flip=True)

    def native(batch: dict[str, Tensor]) -> Tensor:
        return pipeline.prepare_training(batch["pixel_values"], batch["sample_idx"], epoch=0)

    own_size = transforms.RandomCrop(data.image_shape[1:], padding=PADDING)
    return {
        "with_transform": with_transform(dataset, data, own_size),
        "with_transform, 224": with_transform(dataset, data, transforms.RandomResizedCrop(224)),
        "rows": rows(data),
        "fetch": decoded(data, lambda batch: None),
        "whole path": decoded(data, native),
        "whole path, 224": decoded(data, lambda batch: pipeline.resize(native(batch))),
        "copy": copies(data),
    }


def images_per_second(path: Path_, seconds: float) -> float:
    """Take batches for at least so long."""
    start, images = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        images += next(path)
    return images / spent


def measure(paths: dict[str, Path_], turns: int, seconds: float) -> dict[str, dict[str, float]]:
    """Median rate of each and its extremes, and the median ratio to `with_transform` of the same turn."""
    for path in paths.values():
        next(path)
    measured = [{name: images_per_second(path, seconds) for name, path in paths.items()} for _ in range(turns)]
    results = {}
    for name in paths:
        rates = [turn[name] for turn in measured]
        ratios = [turn[name] / turn[BASELINES.get(name, "with_transform")] for turn in measured]
        results[name] = {"images_per_second": statistics.median(rates), "min": min(rates), "max": max(rates)}
        results[name] |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return results


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="Hub id or local directory.")
    parser.add_argument("--turns", type=int, default=7, help="Turns to measure, after one batch to warm up.")
    parser.add_argument("--seconds", type=float, default=1.0, help="Of each line in each turn.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1).")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/input_path.json"), help="JSON file.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    splits = load_image_dataset(arguments.dataset)
    data = DecodedImages(decode_images(splits)["train"])
    results = measure(make_paths(splits["train"], data), arguments.turns, arguments.seconds)
    print(f"{len(data)} images {data.image_shape}, batch {BATCH}, {arguments.threads} thread(s)")
    print(f"{'':<22}{'img/s':>12}   min .. max{'ratio to with_transform':>40}")
    for name, r in results.items():
        rates = f"{r['images_per_second']:>12,.0f}   {r['min']:,.0f} .. {r['max']:,.0f}"
        print(f"{name:<22}{rates:<42}{r['ratio']:>9.1f}   {r['ratio_min']:.1f} .. {r['ratio_max']:.1f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"threads": arguments.threads, "torch": torch.__version__, "image_shape": data.image_shape}
    arguments.output.write_text(
        json.dumps({"settings": settings, "turns": arguments.turns, "results": results}, indent=2)
    )
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
