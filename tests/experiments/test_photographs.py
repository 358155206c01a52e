"""A folder of photographs and a pretrained model, by the command: what is trained, said, read again and published."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from smoot_hf.data import load_image_dataset
from smoot_hf.experiments import checkpoint, checkpoint_evaluation, evaluate, train

RAW = datasets.Image(decode=False)
# (height, width) of the photographs of one class; their widths grow from one to the next.
SIZES = {"ant": (40, 50), "bee": (60, 36), "wasp": (33, 80)}
TRAIN = [
    *("--dataset", "photos", "--output_dir", "run", "--num_train_epochs", "1", "--per_device_train_batch_size", "8"),
    *("--card_samples", "0", "--use_cpu", "--disable_tqdm", "true"),
]
CROPPED = ViTImageProcessor(size={"shortest_edge": 28}, do_center_crop=True, crop_size={"height": 24, "width": 24})


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with photographs of every kind and models; the first class has more than ten times the others'."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(56 if name == "ant" else 5):
            pixels = generator.integers(0, 256, (height, width + i, 3), dtype=np.uint8)
            exif = Image.Exif()
            exif[0x0112] = 6 if i % 2 else 1
            kind, mode = [("png", "RGB"), ("png", "L"), ("png", "RGBA"), ("png", "P"), ("jpg", "CMYK")][i % 5]
            Image.fromarray(pixels).convert(mode).save(folder / "photos" / name / f"{i}.{kind}", exif=exif)
    config = ViTConfig(
        image_size=24, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for name, processor in {"cropping": CROPPED, "without size": ViTImageProcessor(do_resize=False)}.items():
        ViTForImageClassification(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def run(here):
    """The folder of a training, without a word about sizes on its command line."""
    train.main(argv=[*TRAIN, "--model", "cropping"])
    return Path("run")


def test_what_is_trained_on_is_said(here, capsys, caplog):
    """Fault: classes of unequal size, or the size of the masks, are found out after hours."""
    train.main(argv=[*TRAIN, "--model", "cropping", "--output_dir", "said", "--max_steps", "1"])
    said = capsys.readouterr().out
    assert (
        "  ant       44 train      12 test\n  bee        4 train       1 test\n  wasp       4 train       1 test"
        in said
    )
    assert "images and masks of 24x24 pixels, to which the model's image processor brought them" in said
    assert "3 classes of 4 (bee) to 44 (ant) images" in caplog.text


def test_every_command_reads_the_images_that_were_trained_on(run):
    """Fault: saliency of images that are resized and cropped twice, or of squares where training saw crops."""
    recorded = checkpoint.recorded_images(run, "test")
    options = evaluate.make_parser().parse_args(["run", "--dataset", "photos", "--max_eval_samples", "1000"])
    judged = checkpoint_evaluation.load_test_images(options)
    assert recorded.is_resized
    assert recorded.image_shape == (3, 24, 24)
    assert judged.fingerprint == recorded.fingerprint
    _, found = checkpoint.load_checkpoint("run", recorded, "cpu")
    assert found.is_resized
    assert not checkpoint.read_checkpoint("run", "cpu").pipeline.is_resized


def test_the_pipeline_of_transformers_gives_the_probabilities_of_the_evaluation(run):
    """Fault: accuracy on crops, while whoever loads the model gets that of something else."""
    test = checkpoint.recorded_images(run, "test")
    model, found = checkpoint.load_checkpoint("run", test, "cpu")
    ours = model(pixel_values=found.prepare_evaluation(test.__getitems__(range(len(test)))["pixel_values"]))
    stored = load_image_dataset("photos")["test"].cast_column("image", RAW)
    classify = pipeline("image-classification", model="run", top_k=None, device="cpu")
    for row, expected in zip(stored, ours.logits.softmax(dim=1), strict=True):
        # Transparency is laid on white here, and dropped there.
        with Image.open(row["image"]["path"]) as image:
            is_opaque = not image.has_transparency_data
        if is_opaque:
            theirs = {one["label"]: one["score"] for one in classify(row["image"]["path"])}
            got = [theirs[name] for name in test.label_names]
            np.testing.assert_allclose(got, expected.detach(), rtol=0, atol=1e-5)


def test_a_processor_that_says_no_size_is_one_line(here, capsys):
    """Fault: a traceback of shapes, or an hour of decoding before it."""
    with pytest.raises(SystemExit) as ended:
        train.main(argv=[*TRAIN, "--model", "without size", "--output_dir", "none"])
    assert ended.value.code == 2
    assert "says none that they could be brought to: set image_size (--image_size)" in capsys.readouterr().err
