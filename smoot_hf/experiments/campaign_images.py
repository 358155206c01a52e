"""The images of a campaign: drawn and planted by the seed of a run."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..data import DecodedImages, InputPipeline, PlantedImages, decode_images, load_image_dataset, plant_splits
from ..data.planted_evidence import LabelledPixels
from ..data.sample_photos import photos_of_scikit_learn


@dataclass(frozen=True)
class Data:
    """What a campaign trains and judges on.

    Attributes:
        planted: a set of `smoot_hf.data.planted_evidence`, or "plain": the images as they are, without evidence.
        source: "digits", a Hub id or a local directory of images with classes.
        partners: the same, for "pair".
        photos: the same, for "on-photo"; "scikit-learn" takes crops of the two photos that it ships.
        labelled: whose labels "pair" carries.
        train_samples: training images, drawn anew for every seed; 0: all.
        test_samples: test images, the same for every seed; 0: all.
        gap_samples: test images whose deletion curves are measured; 0: none.
        history_samples: test images on which accuracy and localisation are measured after every epoch; 0: none.
        tables: also measure the deletion areas by which the paper's tables could have been made, see `paper_tables`.
        roar_kept: fraction of the positions that DiffROAR leaves a fresh network to learn from, twice as long as
            standard training takes; 0: not measured.
    """

    planted: Literal["plain", "block", "block-fixed", "pair", "on-photo", "decoy", "several"] = "block"
    source: str = "digits"
    partners: str = ""
    photos: str = "scikit-learn"
    labelled: Literal["first", "second"] = "first"
    train_samples: int = 0
    test_samples: int = 0
    gap_samples: int = 1000
    history_samples: int = 0
    tables: bool = False
    roar_kept: float = 0.0


class Splits(NamedTuple):
    """Training and test images, uint8, and what normalises them."""

    train: Any
    test: Any
    pipeline: InputPipeline


def make_splits(data: Data, seed: int) -> Splits:
    """The images of a run: of its seed the draw and the planting of the training images; the test images never change.

    Raises:
        ValueError: fewer images than are asked for, or an unknown set.
        OSError: the data cannot be loaded.
    """
    pixels = {split: load_pixels(data.source, split) for split in ("train", "test")}
    chosen = {
        "train": _some(pixels["train"], data.train_samples, seed, "train_samples"),
        "test": _some(pixels["test"], data.test_samples, 0, "test_samples"),
    }
    if data.planted == "plain":
        planted = [PlantedImages(*chosen[split], chosen[split][0][:, 0] < 0) for split in ("train", "test")]
    else:
        others = photos = None
        if data.planted == "pair":
            others = {split: load_pixels(data.partners, split) for split in ("train", "test")}
        if data.planted == "on-photo":
            photos = {split: _photos(data.photos, split) for split in ("train", "test")}
        planted = [
            plant_splits(data.planted, chosen, seed=of_split, others=others, photos=photos, labelled=data.labelled)[
                split
            ]
            for split, of_split in (("train", seed), ("test", 0))
        ]
    return Splits(planted[0], planted[1], InputPipeline(*planted[0].channel_statistics()))


@lru_cache(maxsize=8)
def load_pixels(source: str, split: str) -> LabelledPixels:
    """All images of a split, uint8 (N, C, H, W), and their labels; kept for the next run of this process."""
    rows = DecodedImages(decode_images(load_image_dataset(source))[split])
    batch = rows.__getitems__(range(len(rows)))
    return batch["pixel_values"], batch["labels"]


def _photos(source: str, split: str) -> Tensor:
    if source == "scikit-learn":
        return photos_of_scikit_learn(1000, 32, seed=int(split == "test"))
    return load_pixels(source, split)[0]


def _some(split: LabelledPixels, count: int, seed: int, argument: str) -> LabelledPixels:
    """`count` images drawn without replacement; 0: all in their order."""
    pixels, labels = split
    if count > len(labels):
        raise ValueError(f"{argument} is {count}, but there are {len(labels)} images")
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    return (pixels[rows], labels[rows]) if count else split
