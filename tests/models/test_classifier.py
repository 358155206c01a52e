"""The paper's CNN as a transformers model, and the models that recipes build."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    LevitConfig,
    ResNetConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from smoot_hf import InputPipeline
from smoot_hf.data.decoded_images import Decoding, pixels_of
from smoot_hf.models.classifier import load_image_processor, load_model
from smoot_hf.models.modeling_smoot_cnn import PaperCnnConfig, PaperCnnForImageClassification

DIGITS = [str(digit) for digit in range(10)]


def cnn(**settings):
    return PaperCnnForImageClassification(PaperCnnConfig(**{"num_labels": 10, **settings}))


def tiny_vit(folder: Path, num_labels: int = 4) -> str:
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.num_labels = num_labels
    ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


def test_cnn_is_the_papers_network():
    """Fault: padding, stride or a layer that the paper does not have."""
    shapes = [tuple(p.shape) for p in cnn().parameters() if p.ndim > 1]
    assert shapes == [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64 * 12 * 12), (10, 128)]
    rates = [m.p for m in cnn().modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.25, 0.5]


def test_cnn_starts_from_torchs_weights():
    """Fault: the initialisation of transformers (normal, 0.02; zero biases) in a network that is trained without it."""
    torch.manual_seed(0)
    model = cnn()
    for layer in (model.convolution_1, model.convolution_2, model.hidden, model.classifier):
        bound = layer.weight[0].numel() ** -0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert 0.5 * bound < layer.bias.abs().max() <= bound


def test_cnn_gives_logits_and_their_cross_entropy():
    """Fault: log-probabilities as in the published code, or a loss of its own kind."""
    model = cnn(image_size=[10, 12], num_channels=3).eval()
    images, labels = torch.randn(5, 3, 10, 12), torch.arange(5)
    output = model(images, labels=labels)
    assert output.logits.shape == (5, 10)
    assert not torch.allclose(output.logits.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert model(images).loss is None


@pytest.mark.parametrize("shape", [(1, 27, 28), (3, 28, 28)])
def test_cnn_refuses_other_images(shape):
    """Fault: a message about matrix shapes deep inside."""
    with pytest.raises(ValueError, match=re.escape("(1, 28, 28), got (2, ")):
        cnn()(torch.zeros(2, *shape))


def test_cnn_refuses_impossible_settings():
    """Fault: a layer without inputs, or without outputs in training."""
    with pytest.raises(ValueError, match="image_size must be at least 6"):
        PaperCnnConfig(image_size=5)
    with pytest.raises(ValueError, match="classifier_dropout must lie in"):
        PaperCnnConfig(classifier_dropout=1.0)


def test_cnn_survives_saving(tmp_path):
    """Fault: an Auto class that does not know it, or a setting or weight lost on the way."""
    model = cnn(image_size=(8, 10), num_channels=3, feature_dropout=0.1).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.image_height_width, config.num_channels, config.feature_dropout) == ((8, 10), 3, 0.1)
    images = torch.randn(2, 3, 8, 10)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_load_cnn_knows_the_classes():
    """Fault: LABEL_0 in the Hub's widget."""
    model = load_model("cnn", labels=["cat", "dog"], image_size=(8, 10), num_channels=3)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model(torch.zeros(1, 3, 8, 10)).logits.shape == (1, 2)


@pytest.mark.parametrize(("side", "patch_size", "expected"), [(32, None, 4), (64, None, 16), (32, 8, 8)])
def test_deit_tiny_from_scratch(side, patch_size, expected):
    """Fault: another size of DeiT, or 224 pixels where the images have 32."""
    model = load_model(
        "deit-tiny",
        labels=DIGITS,
        image_size=(side, side),
        num_channels=3,
        from_scratch=True,
        patch_size=patch_size,
    )
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 192, 3)
    assert (config.image_size, config.patch_size, config.intermediate_size) == (side, expected, 768)
    assert model(torch.zeros(1, 3, side, side)).logits.shape == (1, 10)


def test_checkpoint_gets_a_new_head_and_keeps_its_weights(tmp_path):
    """Fault: training from random weights in silence, or a head of the old classes."""
    checkpoint = tiny_vit(tmp_path)
    loaded = load_model(checkpoint, labels=["a", "b", "c"], image_size=(32, 32), num_channels=3)
    stored = AutoModelForImageClassification.from_pretrained(checkpoint)
    assert loaded.classifier.out_features == 3
    assert loaded.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert loaded.config.image_size == 16
    assert torch.equal(loaded.vit.embeddings.cls_token, stored.vit.embeddings.cls_token)


@pytest.mark.parametrize("config", [DeiTConfig, LevitConfig, ResNetConfig])
def test_from_scratch_takes_the_architecture_of_a_local_configuration(tmp_path, config):
    """Fault: `'NoneType' object is not iterable` for model types with two classes (deit, levit)."""
    small = {
        DeiTConfig: {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
        LevitConfig: {"hidden_sizes": [16, 16, 16], "depths": [1, 1, 1], "num_attention_heads": [1, 1, 1]},
        ResNetConfig: {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"},
    }[config]
    config(**small).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), labels=DIGITS, image_size=(64, 64), num_channels=3, from_scratch=True).eval()
    assert model(torch.zeros(2, 3, 64, 64)).logits.shape == (2, 10)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_timm_checkpoint_gets_a_new_head_and_keeps_its_processor(tmp_path, from_scratch):
    """Fault: the timm wrapper counts classes in a field of its own, and keeps its processor in the configuration."""
    pretrained = {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.1, 0.2, 0.3]}
    config = TimmWrapperConfig.from_dict({"architecture": "resnet10t", "num_classes": 7, "pretrained_cfg": pretrained})
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    name = str(tmp_path)
    model = load_model(name, labels=["a", "b"], image_size=(8, 8), num_channels=3, from_scratch=from_scratch)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)
    assert model.config.id2label == {0: "a", 1: "b"}
    processor = load_image_processor(name, model, (8, 8), (0.5,) * 3, (0.5,) * 3, from_scratch=from_scratch)
    assert tuple(processor.data_config["mean"]) == (0.1, 0.2, 0.3)


def test_processor_of_a_model_from_scratch_is_found_beside_it(tmp_path):
    """Fault: inference that normalises with the numbers of ImageNet."""
    model = load_model("cnn", labels=DIGITS, image_size=(8, 10), num_channels=1)
    load_image_processor("cnn", model, (8, 10), (0.25,), (0.5,)).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == ((0.25,), (0.5,))
    assert (processor.size["height"], processor.size["width"]) == (8, 10)


@pytest.mark.parametrize("name", ["deit-tiny", "someone/else", "./not-there"])
def test_unreachable_checkpoint_is_one_line(name):
    """Fault: a page of traceback that does not say what to do without network."""
    with pytest.raises(OSError, match="--model takes a local directory") as error:
        load_model(name, labels=DIGITS, image_size=(32, 32), num_channels=3)
    assert "\n" not in str(error.value)


def test_checkpoint_without_processor_is_one_line(tmp_path):
    """Fault: a processor guessed for a checkpoint that has none."""
    name = tiny_vit(tmp_path)
    model = load_model(name, labels=DIGITS, image_size=(16, 16), num_channels=3)
    with pytest.raises(OSError, match="comes without an image processor") as error:
        load_image_processor(name, model, (16, 16), (0.5,) * 3, (0.5,) * 3)
    assert "\n" not in str(error.value)


def test_images_that_do_not_fit_are_refused(tmp_path):
    """Fault: a patch embedding initialised anew in silence, or an error about shapes in the first step."""
    checkpoint = tiny_vit(tmp_path)
    with pytest.raises(ValueError, match=r"takes images of 3 channels, the data have 1.*--convert_rgb"):
        load_model(checkpoint, labels=DIGITS, image_size=(16, 16), num_channels=1)
    with pytest.raises(ValueError, match="patch_size=5 must divide the image size"):
        load_model("deit-tiny", labels=DIGITS, image_size=(32, 32), num_channels=3, from_scratch=True, patch_size=5)
    with pytest.raises(ValueError, match="patch_size=4 needs a patch-based model from scratch"):
        load_model(checkpoint, labels=DIGITS, image_size=(16, 16), num_channels=3, patch_size=4)


def test_the_cnn_pools_before_the_relu_without_a_difference():
    """Catches an order of pooling and ReLU that changes a prediction or a gradient, ties and zeros included."""
    torch.manual_seed(0)
    values = (torch.randint(-4, 5, (64, 8, 12, 12)) / 4).requires_grad_()
    weights = torch.randn(64, 8, 6, 6)
    results = []
    for order in ((F.relu, lambda x: F.max_pool2d(x, 2)), (lambda x: F.max_pool2d(x, 2), F.relu)):
        out = order[1](order[0](values))
        results.append((out, torch.autograd.grad((out * weights).sum(), values)[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_processor_beside_cropped_images_crops(channels, tmp_path):
    """Fault: a published model that is shown squeezed photographs, after training on the middle of them.

    Smooth images, so that Pillow's rounding and torchvision's are all that differs: two of 256 grey values.
    """
    across, down = np.meshgrid(np.arange(48), np.arange(32))
    levels = (across * 3 + down * 2).astype(np.uint8)
    photograph = Image.fromarray(levels) if channels == 1 else Image.fromarray(np.stack([levels] * 3, axis=2))
    model = load_model("cnn", labels=DIGITS, image_size=(16, 16), num_channels=channels)
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    load_image_processor("cnn", model, (16, 16), zeros, ones, center_crop=True).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    trained_on = torch.from_numpy(pixels_of(photograph, Decoding(image_size=16)).copy())
    published = processor(photograph, return_tensors="pt")["pixel_values"][0]
    assert (published * 255 - trained_on).abs().max() <= 2.01
    seen = InputPipeline.from_image_processor(processor).prepare_evaluation(trained_on[None])[0]
    torch.testing.assert_close(seen * 255, trained_on.float())
