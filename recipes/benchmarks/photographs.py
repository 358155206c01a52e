# /// script
# requires-python = ">=3.11"
# dependencies = ["smoot-hf[recipes,photos]", "scikit-image", "gradio"]
#
# [tool.uv.sources]
# smoot-hf = { path = "../..", editable = true }
# ///
"""Folders of photographs for trying a fine-tuning, and the localisation of a model on those whose evidence is known.

    python recipes/benchmarks/photographs.py make FOLDER
    smoot-hf train --recipe photos --dataset FOLDER/crops [--method METHOD] --output_dir RUN
    smoot-hf train --recipe photos --dataset FOLDER/planted [--method METHOD] --output_dir RUN
    python recipes/benchmarks/photographs.py localise FOLDER RUN [RUN ...]

Time: seconds to make the folders, a minute to localise 90 images; the trainings take minutes, see docs/photographs.md.

The photographs are those that scikit-learn, scikit-image and gradio ship.

  crops     300 training and 100 test images of 256x256 in five classes: random crops of random size. "cat" and
            "building" are tested on other photographs than they are trained on; of "coffee", "flower" and "motorcycle"
            there is one each, whose left half is for training and whose right half is for testing (resizing mixes
            two columns across the edge).
  planted   240 training and 90 test images of 224x224 in three classes: a disc cut out of a photograph (a cat's face, a
            cup of coffee, a flower), turned, scaled and pasted anywhere into a crop of another photograph. The disc is
            the evidence. Training and testing have different backgrounds, and the same three discs.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from smoot_hf.data.decoded_images import DecodedImages
from smoot_hf.evaluation import evaluate_localisation
from smoot_hf.experiments.checkpoint import load_checkpoint

SCIKIT_IMAGE, SCIKIT_LEARN, GRADIO = "skimage/data", "sklearn/datasets/images", "gradio"
# (left, top, right, bottom) as shares of the photograph.
Box = tuple[float, float, float, float]
WHOLE, LEFT, RIGHT = (0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)
CHINA, FLOWER, COFFEE, CAT = (
    f"{SCIKIT_LEARN}/china.jpg",
    f"{SCIKIT_LEARN}/flower.jpg",
    f"{SCIKIT_IMAGE}/coffee.png",
    f"{SCIKIT_IMAGE}/chelsea.png",
)
MOTORCYCLE = f"{SCIKIT_IMAGE}/motorcycle_left.png"
# split -> class -> parts of photographs.
CROPS: dict[str, dict[str, list[tuple[str, Box]]]] = {
    "train": {
        "building": [(CHINA, (0, 0, 0.65, 1))],
        "cat": [(CAT, WHOLE), (f"{GRADIO}/media_assets/images/cheetah1.jpg", WHOLE)],
        "coffee": [(COFFEE, LEFT)],
        "flower": [(FLOWER, LEFT)],
        "motorcycle": [(MOTORCYCLE, LEFT)],
    },
    "test": {
        "building": [(f"{GRADIO}/media_assets/images/tower.jpg", WHOLE)],
        "cat": [(f"{GRADIO}/media_assets/images/lion.jpg", WHOLE), (f"{GRADIO}/test_data/cheetah2.jpg", WHOLE)],
        "coffee": [(COFFEE, RIGHT)],
        "flower": [(FLOWER, RIGHT)],
        "motorcycle": [(MOTORCYCLE, RIGHT)],
    },
}
# class -> photograph, centre and radius of the disc in its pixels.
DISCS = {"cat": (CAT, (256, 145), 130), "coffee": (COFFEE, (322, 195), 165), "flower": (FLOWER, (307, 222), 132)}
BACKGROUNDS = {
    "train": [f"{SCIKIT_IMAGE}/{name}" for name in ("grass.png", "gravel.png", "hubble_deep_field.jpg", "rocket.jpg")],
    "test": [f"{SCIKIT_IMAGE}/brick.png", f"{SCIKIT_IMAGE}/moon.png", MOTORCYCLE, CHINA],
}
COUNTS = {"crops": {"train": 60, "test": 20}, "planted": {"train": 80, "test": 30}}
# Sides in pixels of the two kinds of images, smallest and largest diameter of a disc, and its distance from the margin,
# which an image processor may crop off.
CROP, PLANTED, DIAMETERS, MARGIN = 256, 224, (64, 112), 16


def photograph(place: str) -> Image.Image:
    """A photograph that a package ships, in RGB; the first part of `place` is the package."""
    package, _, file = place.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(f"the photographs need the package {package}: pip install scikit-image scikit-learn gradio")
    return Image.open(Path(found.origin).parent / file).convert("RGB")


def random_crop(image: Image.Image, box: Box, side: int, generator: np.random.Generator) -> Image.Image:
    """A square of 60 to 100 % of the shorter side of a part of a photograph, resized to `side` pixels."""
    left, top, right, bottom = (share * length for share, length in zip(box, (*image.size, *image.size), strict=True))
    size = generator.uniform(0.6, 1.0) * min(right - left, bottom - top)
    x, y = generator.uniform(left, right - size), generator.uniform(top, bottom - size)
    return image.resize((side, side), Image.Resampling.BICUBIC, (x, y, x + size, y + size))


def disc(name: str, generator: np.random.Generator) -> Image.Image:
    """An object cut out, turned by up to 30 degrees, in RGBA."""
    place, (x, y), radius = DISCS[name]
    cut = photograph(place).crop((x - radius, y - radius, x + radius, y + radius))
    cut = cut.rotate(generator.uniform(-30, 30), Image.Resampling.BICUBIC)
    diameter = int(generator.integers(DIAMETERS[0], DIAMETERS[1] + 1))
    alpha = Image.new("L", cut.size)
    # The corners that turning lays bare are outside of it.
    ImageDraw.Draw(alpha).ellipse((0, 0, cut.width - 1, cut.height - 1), fill=255)
    cut.putalpha(alpha)
    return cut.resize((diameter, diameter), Image.Resampling.BICUBIC)


def planted(name: str, split: str, generator: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """An image of a class, and where its evidence is (black and white)."""
    backgrounds = BACKGROUNDS[split]
    image = random_crop(photograph(backgrounds[generator.integers(len(backgrounds))]), WHOLE, PLANTED, generator)
    pasted = disc(name, generator)
    x, y = (int(generator.integers(MARGIN, PLANTED - MARGIN - pasted.width + 1)) for _ in range(2))
    image.paste(pasted, (x, y), pasted)
    evidence = Image.new("L", image.size)
    evidence.paste(pasted.getchannel("A").point(lambda alpha: 255 * (alpha > 0)), (x, y))
    return image, evidence.convert("1")


def make(folder: Path) -> None:
    """Write the two folders of images, and the evidence of the planted ones beside them."""
    generator = np.random.default_rng(0)
    for split, classes in CROPS.items():
        for name, parts in classes.items():
            for number in range(COUNTS["crops"][split]):
                place, box = parts[number % len(parts)]
                _save(
                    random_crop(photograph(place), box, CROP, generator),
                    folder / "crops" / split / name,
                    f"{number:02}.jpg",
                )
        for name in DISCS:
            for number in range(COUNTS["planted"][split]):
                image, evidence = planted(name, split, generator)
                _save(image, folder / "planted" / split / name, f"{number:02}.jpg")
                _save(evidence, folder / "evidence" / split / name, f"{number:02}.png")


def _save(image: Image.Image, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Quality is for JPEG, and PNG does without.
    image.save(folder / name, quality=95)


def test_images(folder: Path) -> DecodedImages:
    """The planted test images with their evidence."""
    files = sorted((folder / "planted" / "test").glob("*/*.jpg"))
    names = sorted(DISCS)
    pixels = [np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files]
    masks = [
        np.asarray(Image.open(folder / "evidence" / "test" / file.parent.name / f"{file.stem}.png")) for file in files
    ]
    labels = torch.tensor([names.index(file.parent.name) for file in files])
    return DecodedImages.of_tensors(
        torch.from_numpy(np.stack(pixels)), labels, names, torch.from_numpy(np.stack(masks))
    )


def localise(folder: Path, runs: Sequence[str]) -> None:
    """Print how much of each model's saliency lies on the evidence."""
    images = test_images(folder)
    for run in runs:
        model, pipeline = load_checkpoint(run, images, "cpu")
        found = evaluate_localisation(model, images, input_pipeline=pipeline, batch_size=16)
        print(f"{run}: accuracy {found.accuracy:.1f} %; of {found.n} images classified correctly:")
        for name, score in found.scores.items():
            interval = "" if score.interval is None else f" [{score.interval[0]:.1f}, {score.interval[1]:.1f}]"
            print(f"  {name:<16}{score.value:5.1f}{interval}, by chance {score.chance:.1f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Make the folders, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="Write the folders of images.")
    making.add_argument("folder", type=Path, metavar="FOLDER")
    localising = commands.add_parser("localise", help="Measure models on the planted test images.")
    localising.add_argument("folder", type=Path, metavar="FOLDER")
    localising.add_argument("runs", nargs="+", metavar="RUN")
    options = parser.parse_args(argv)
    if options.command == "make":
        make(options.folder)
    else:
        localise(options.folder, options.runs)


if __name__ == "__main__":
    main()
