"""The input pipeline against the image processors it stands for, and its augmentation against brute force."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    Swin2SRImageProcessor,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper import TimmWrapperImageProcessor

from smoot_hf import InputPipeline
from smoot_hf.data.input_pipeline import pillow_resize
from smoot_hf.functional import counter_uniform

GREY = {"image_mean": [0.13], "image_std": [0.31]}

PROCESSORS = {
    "vit": ViTImageProcessor(),
    "bicubic, not square": ViTImageProcessor(size={"height": 40, "width": 56}, resample=3),
    "nearest": ViTImageProcessor(size={"height": 40, "width": 56}, resample=0),
    "native": ViTImageProcessor(do_resize=False),
    "grey": ViTImageProcessor(size={"height": 32, "width": 32}, **GREY),
    "scale of its own": ViTImageProcessor(do_resize=False, rescale_factor=1 / 127.5, image_mean=[1.0] * 3),
    "not normalised": ViTImageProcessor(do_resize=False, do_normalize=False),
    "deit (crop)": DeiTImageProcessor(),
    "clip (shorter side, crop)": CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 33, "width": 40}),
    "convnext 64 (crop_pct)": ConvNextImageProcessor(size={"shortest_edge": 64}),
    "convnext 384 (squash)": ConvNextImageProcessor(size={"shortest_edge": 384}),
}


def uint8_images(batch=4, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def as_pillow(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def pipeline(**settings):
    return InputPipeline(**{"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4), **settings})


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_is_the_image_processor(name, size):
    """Fault: evaluation or inference sees other pixels than the other (1e-6: float32 rounding of values up to 3)."""
    processor = PROCESSORS[name]
    images = uint8_images(2, 1 if name == "grey" else 3, *size)
    ours = InputPipeline.from_image_processor(processor).prepare_evaluation(images)
    theirs = processor([as_pillow(image) for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_evaluation_is_timms_transform(crop_pct, crop_mode):
    """Fault: a crop one pixel off (timm rounds half a pixel, transformers floors), or torchvision's grey values."""
    processor = TimmWrapperImageProcessor(
        {"input_size": (3, 64, 64), "crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": "bicubic"}
    )
    images = uint8_images(2, 3, 37, 50)
    made = InputPipeline.from_image_processor(processor)
    theirs = processor([as_pillow(image) for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made.prepare_evaluation(images), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_pillows_to_the_grey_value(interpolation):
    """Fault: another rounding, a support cut off at the border, or the sides in the wrong order."""
    sizes = torch.randint(1, 40, (40, 4), generator=torch.Generator().manual_seed(0)).tolist()
    for height, width, new_height, new_width in sizes:
        image = uint8_images(1, 3, height, width)
        theirs = as_pillow(image[0]).resize((new_width, new_height), Image.Resampling[interpolation.upper()])
        ours = pillow_resize(image, (new_height, new_width), interpolation)[0].permute(1, 2, 0)
        assert np.array_equal(ours, theirs), (height, width, new_height, new_width)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (MobileViTImageProcessor(), "do_flip_channel_order"),
        (Swin2SRImageProcessor(), "do_pad"),
        (ViTImageProcessor(resample=1), "resample=1"),
        (ViTImageProcessor(size={"max_height": 9, "max_width": 9}), "max_height"),
        (LevitImageProcessor(), "LevitImageProcessor gives other pixels"),
        (TimmWrapperImageProcessor({"input_size": (3, 64, 64), "crop_mode": "border"}), "crop_mode='border'"),
    ],
)
def test_processors_it_cannot_stand_for_are_refused(processor, message):
    """Fault: training on other pixels than the checkpoint was made for, in silence."""
    with pytest.raises(ValueError, match=message):
        InputPipeline.from_image_processor(processor)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("geometry", [{"size": (48, 40)}, {"size": 40, "crop_size": (33, 36)}])
def test_training_path_meets_evaluation(interpolation, geometry):
    """Fault: a shift or a crop between what is trained and what is evaluated (one grey level: uint8 rounding)."""
    made = pipeline(interpolation=interpolation, **geometry)
    images = uint8_images(2, 3, 32, 34)
    one_level = 1.01 / 255 / torch.tensor(made.std)[:, None, None]
    difference = (made.resize(made.normalize(images)) - made.prepare_evaluation(images)).abs()
    assert bool((difference <= one_level).all())


def test_resize_is_differentiable():
    """Fault: a saliency of zeros, or of the wrong pixels, behind a crop."""
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    pipeline(size=32, crop_size=(16, 16)).resize(images).sum().backward()
    seen = images.grad[0, 0] > 0
    assert seen[4:12, 4:12].all()
    assert not seen[:3].any()
    assert not seen[:, -3:].any()


def test_mean_and_std_may_be_lists():
    """Catches a list that fails in the first batch, for want of a hash."""
    made = InputPipeline([0.5] * 3, [0.25] * 3)
    assert made == InputPipeline((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(made.normalize(uint8_images()), InputPipeline((0.5,) * 3, (0.25,) * 3).normalize(uint8_images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_images_of_short_floats_are_resized(interpolation, dtype):
    """Catches a model in bfloat16 that cannot be explained: torch has no antialiasing of it on a CPU."""
    pipeline = InputPipeline((0.5,) * 3, (0.25,) * 3, size=(12, 20), interpolation=interpolation)
    images = torch.randn(2, 3, 32, 32)
    short = pipeline.resize(images.to(dtype))
    assert short.dtype == dtype
    torch.testing.assert_close(short, pipeline.resize(images.to(dtype).float()).to(dtype), rtol=0, atol=0)


def test_resize_leaves_native_images_alone():
    """Fault: a copy in every step."""
    images = torch.rand(1, 3, 16, 16)
    assert pipeline().resize(images) is images
    assert pipeline(size=(16, 16)).resize(images) is images


def test_augmented_images_are_crops_and_mirror_images():
    """Fault: rows and columns exchanged, a flip of the padding, pixels from outside that are not black."""
    made = pipeline(crop_padding=2, horizontal_flip=True)
    images = uint8_images(300, 3, 6, 5)
    augmented = made.prepare_training(images, torch.arange(300), epoch=3)
    padded = made.normalize(torch.nn.functional.pad(images, (2, 2, 2, 2)))
    seen = set()
    for sample in range(300):
        for top, left, mirrored in np.ndindex(5, 5, 2):
            crop = padded[sample, :, top : top + 6, left : left + 5]
            if torch.equal(augmented[sample], crop.flip(2) if mirrored else crop):
                seen.add((top, left, mirrored))
                break
        else:
            pytest.fail(f"sample {sample} is no crop of its image")
    assert len(seen) == 50


def test_augmentation_belongs_to_the_sample():
    """Fault: numbers that depend on the batch, so that resuming or a second process changes the run."""
    made = pipeline(crop_padding=4, horizontal_flip=True, seed=5)
    images, rows = uint8_images(16), torch.arange(16)
    whole = made.prepare_training(images, rows, epoch=1)
    order = torch.randperm(16)
    assert torch.equal(made.prepare_training(images[order], rows[order], epoch=1), whole[order])
    assert not torch.equal(made.prepare_training(images, rows, epoch=2), whole)
    other_seed = pipeline(crop_padding=4, horizontal_flip=True, seed=6)
    assert not torch.equal(other_seed.prepare_training(images, rows, epoch=1), whole)


def test_augmentation_is_independent_of_the_fill():
    """Fault: the fill of the first pixel tells whether the image is mirrored."""
    rows = torch.arange(2000)
    images = torch.arange(2, dtype=torch.uint8).expand(2000, 1, 1, 2)
    made = InputPipeline(mean=(0.0,), std=(1 / 255,), horizontal_flip=True)
    is_mirrored = made.prepare_training(images, rows, epoch=0)[:, 0, 0, 0] == 1
    fill = counter_uniform(0, 0, rows, (3,))[:, 2]
    assert abs(torch.corrcoef(torch.stack([is_mirrored.float(), fill]))[0, 1]) < 0.1


def test_without_augmentation_training_sees_the_images():
    """Fault: an augmentation nobody asked for."""
    made, images = pipeline(size=(64, 64)), uint8_images()
    prepared = made.prepare_training(images, torch.arange(4), epoch=0)
    expected = (images / 255 - torch.tensor(made.mean)[:, None, None]) / torch.tensor(made.std)[:, None, None]
    assert torch.equal(prepared, made.normalize(images))
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, expected)


def test_no_step_waits_for_the_device():
    """Fault: a value read back to the host; on the meta device there is none to read."""
    made = pipeline(size=40, crop_size=(32, 32), crop_padding=4, horizontal_flip=True)
    images, rows = uint8_images().to("meta"), torch.arange(4, device="meta")
    assert made.resize(made.prepare_training(images, rows, epoch=0)).shape == (4, 3, 32, 32)


def test_normalisation_survives_inference_mode():
    """Fault: constants made under inference mode, which autograd refuses later."""
    made = InputPipeline(mean=(0.123,), std=(0.456,))
    images = uint8_images(1, 1)
    with torch.inference_mode():
        made.normalize(images)
    made.normalize(images).requires_grad_().square().sum().backward()


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 4, 4), uint8_images()[0], uint8_images(channels=1)])
@pytest.mark.parametrize("method", ["normalize", "prepare_evaluation"])
def test_other_images_are_refused(method, images):
    """Fault: images divided by 255 twice, or broadcast over channels."""
    with pytest.raises(ValueError, match=r"pixel_values must be uint8 \(B, 3, H, W\), got"):
        getattr(pipeline(), method)(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"mean": (0.1,)}, "one number per channel"),
        ({"interpolation": "lanczos"}, "interpolation must be one of"),
        ({"crop_padding": -1}, "crop_padding must be at least 0"),
    ],
)
def test_impossible_fields_are_refused(settings, message):
    """Fault: images of NaN, or an error in the first step."""
    with pytest.raises(ValueError, match=message):
        pipeline(**settings)


def test_crop_larger_than_the_images_is_refused():
    """Fault: a smaller image than the model takes."""
    with pytest.raises(ValueError, match="crop_size"):
        pipeline(crop_size=(64, 64)).prepare_evaluation(uint8_images())
