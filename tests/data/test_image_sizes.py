"""Photographs of several sizes: brought to the model's input as its image processor does, and when they are."""

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor

from smoot_hf import InputPipeline
from smoot_hf.data.decoded_images import DecodedImages, decode_images
from smoot_hf.data.image_sizes import image_sizes, must_be_resized

PROCESSORS = {
    "squash": ViTImageProcessor(size={"height": 24, "width": 24}),
    "resize and crop": ViTImageProcessor(
        size={"shortest_edge": 28}, do_center_crop=True, crop_size={"height": 24, "width": 24}
    ),
    "resize by a share and crop": ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.875),
}
AS_THEY_ARE = InputPipeline.from_image_processor(ViTImageProcessor(do_resize=False))
SHORTER_SIDE = InputPipeline.from_image_processor(ViTImageProcessor(size={"shortest_edge": 24}))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written beside the user's own data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def photographs(folder, *sizes, exif=None):
    """Noise of (height, width), a PNG file each, and the splits that hold the files."""
    paths = []
    for i, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(str(folder / f"{i}.png"))
        orientation = Image.Exif()
        orientation[0x0112] = 1 if exif is None else exif[i]
        Image.fromarray(pixels).save(paths[-1], exif=orientation)
    features = Features({"image": datasets.Image(), "labels": ClassLabel(names=["a", "b"])})
    rows = {"image": paths, "labels": [i % 2 for i in range(len(paths))]}
    return DatasetDict(train=Dataset.from_dict(rows, features=features))


@pytest.mark.parametrize("kind", PROCESSORS)
def test_photographs_become_what_the_image_processor_makes_of_them(kind, tmp_path):
    """Fault: a squeezed picture where the processor crops, or images that are resized and cropped a second time."""
    splits = photographs(tmp_path, (40, 60), (61, 33), (24, 24), (10, 90))
    pipeline = InputPipeline.from_image_processor(PROCESSORS[kind])
    images = DecodedImages(decode_images(splits, input_pipeline=pipeline)["train"], is_resized=True)
    assert images.image_shape == (3, 24, 24)
    stored = images.__getitems__(range(4))["pixel_values"]
    resized = InputPipeline.from_image_processor(PROCESSORS[kind]).with_images_resized()
    for row in range(4):
        theirs = PROCESSORS[kind](splits["train"][row]["image"], return_tensors="pt")["pixel_values"]
        # float32 rounding of two ways to normalise.
        torch.testing.assert_close(resized.prepare_evaluation(stored[[row]]), theirs, rtol=0, atol=2e-6)
    masked = resized.prepare_training(stored, torch.arange(4), epoch=0)
    assert resized.resize(masked) is masked


def test_a_pipeline_of_resized_images_is_still_compared_with_its_processor():
    """Fault: the card of every model of photographs says that its image processor makes other pixels, or none does."""
    resized = InputPipeline.from_image_processor(PROCESSORS["resize and crop"]).with_images_resized()
    assert resized.agrees_with(PROCESSORS["resize and crop"], (24, 24))
    assert not resized.agrees_with(PROCESSORS["squash"], (24, 24))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(8, 8), (8, 8)], False),
        ([(24, 24), (24, 24)], False),
        ([(8, 8), (8, 9)], True),
        ([(30, 40), (30, 40)], True),
        ([(24, 25)], True),
    ],
)
def test_small_images_of_one_size_stay_as_they_are(sizes, expected, tmp_path):
    """Fault: the masks of CIFAR at 224x224, or those of photographs of one camera at twelve million pixels."""
    pipeline = InputPipeline.from_image_processor(PROCESSORS["resize and crop"])
    assert must_be_resized(photographs(tmp_path, *sizes), pipeline) is expected


def test_sizes_are_those_of_upright_images(tmp_path):
    """Fault: photographs of one camera have two sizes where it was turned."""
    splits = photographs(tmp_path, (8, 6), (6, 8), (6, 8), exif=[1, 6, 8])
    (tmp_path / "1.png").write_bytes(b"no image")
    assert list(image_sizes(splits["train"])) == [(8, 6), (8, 6)]


@pytest.mark.parametrize("pipeline", [AS_THEY_ARE, SHORTER_SIDE])
def test_an_image_processor_without_a_size_is_one_sentence(pipeline, tmp_path):
    """Fault: decoding for an hour before the first image of another size."""
    assert not must_be_resized(photographs(tmp_path, (40, 60), (40, 60)), pipeline)
    with pytest.raises(ValueError, match=r"several sizes, such as 40x60 and 41x60, .* set image_size \(--image_size\)"):
        must_be_resized(photographs(tmp_path, (40, 60), (41, 60)), pipeline)


def test_two_answers_for_the_size_are_refused(tmp_path):
    """Fault: one of them is passed over without a word."""
    pipeline = InputPipeline.from_image_processor(PROCESSORS["squash"])
    with pytest.raises(ValueError, match="image_size=8 and input_pipeline both say the size"):
        decode_images(photographs(tmp_path, (8, 8)), image_size=8, input_pipeline=pipeline)


def test_the_cache_knows_how_images_were_resized_and_nothing_else(tmp_path, capsys):
    """Fault: the pixels of another image processor; or decoding once more for another seed or augmentation."""
    photographs(tmp_path, (40, 60), (61, 33))["train"].to_parquet(tmp_path / "train.parquet")
    splits = datasets.load_dataset("parquet", data_files={"train": str(tmp_path / "train.parquet")})

    def is_decoded(processor, **settings):
        capsys.readouterr()
        decode_images(splits, input_pipeline=InputPipeline.from_image_processor(processor, **settings))
        return "Decoding" in capsys.readouterr().err

    assert is_decoded(PROCESSORS["squash"])
    assert not is_decoded(PROCESSORS["squash"], seed=3, crop_padding=4, horizontal_flip=True)
    assert is_decoded(PROCESSORS["resize and crop"])
