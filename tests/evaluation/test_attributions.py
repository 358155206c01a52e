"""Attributions: equal to captum's and to definitions, refused where an architecture cannot support them."""

import ast
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from smoot_hf import functional as SF
from smoot_hf.evaluation.attributions import NOISE_LEVEL, attribute, captum_methods
from smoot_hf.models.logits import LogitsModel

CLASSES = 4
METHODS = ["gradient", "input_x_gradient", "integrated_gradients", "smooth_grad", "gradient_shap", "random"]


class FunctionalRelu(nn.Module):
    """The same arithmetic as `modular`, with a ReLU that is a function: captum's DeepLIFT cannot see it."""

    def __init__(self, modules):
        super().__init__()
        self.conv, self.linear = modules[0], modules[4]

    def forward(self, images):
        return self.linear(F.max_pool2d(F.relu(self.conv(images)), 2).flatten(1))


def modular(channels=3, side=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * ((side - 2) // 2) ** 2, CLASSES),
    ).eval()


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config).eval()


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
    return ResNetForImageClassification(config).eval()


def timm_wrapper():
    torch.manual_seed(0)
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=CLASSES)).eval()


def batch(side=8, batch_size=3):
    images = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(batch_size) % CLASSES, torch.arange(batch_size)


@pytest.mark.parametrize("build", [modular, vit, resnet, timm_wrapper])
@pytest.mark.parametrize("signed", [True, False])
def test_gradient_equals_captums_saliency(build, signed):
    """Catches another score, a channel reduction of its own, and an adapter that breaks the graph."""
    images, target, rows = batch(32 if build is timm_wrapper else 8)
    model = LogitsModel(build())
    ours = attribute(model, images, target, rows, method="gradient", signed=signed)
    theirs = captum_methods().Saliency(model).attribute(images.clone().requires_grad_(True), target=target, abs=False)
    theirs = theirs if signed else theirs.abs()
    torch.testing.assert_close(ours, theirs.mean(dim=1), rtol=1e-5, atol=1e-9)


@settings(max_examples=15)
@given(st.integers(0, 2**31 - 1), st.integers(1, 3), st.sampled_from(["logit", "log_prob"]), st.booleans())
def test_gradient_of_a_linear_model_by_hand(seed, channels, score, signed):
    """Catches the gradient of another class or score: a linear model's is its weight row (minus the expected one)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, channels * 6, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 6, CLASSES, bias=False, dtype=torch.float64))
    model[1].weight.data.copy_(weight)
    images = torch.randn(2, channels, 2, 3, generator=generator, dtype=torch.float64)
    target = torch.tensor([1, 3])
    found = attribute(LogitsModel(model), images, target, torch.arange(2), score=score, signed=signed)
    for b in range(2):
        gradient = weight[target[b]]
        if score == "log_prob":
            gradient = gradient - (weight @ images[b].flatten()).softmax(0) @ weight
        gradient = gradient.reshape(channels, 2, 3)
        torch.testing.assert_close(found[b], (gradient if signed else gradient.abs()).mean(0))


def test_methods_on_a_linear_model_by_hand():
    """Catches methods under each other's names, and a baseline other than zero: all are the weight, or it times x."""
    images, target, rows = batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    weight = model[1].weight.detach()[target].reshape(images.shape)
    times_input = (weight * images).mean(1)
    for method, expected in {
        "gradient": weight.mean(1),
        "smooth_grad": weight.mean(1),
        "input_x_gradient": times_input,
        "integrated_gradients": times_input,
        "deep_lift": times_input,
    }.items():
        found = attribute(LogitsModel(model), images, target, rows, method=method, signed=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=method)
    # Noise on the images, 20 copies with random weights along the path: half the input on average, plus noise.
    shap = attribute(LogitsModel(model), images, target, rows, method="gradient_shap", signed=True)
    noise = NOISE_LEVEL * (images.max() - images.min())
    bound = 5 * weight.abs().max() * noise / np.sqrt(20)
    assert (shap - times_input).abs().max() < bound


def test_integrated_gradients_are_complete():
    """Catches too few points or another end of the path: attributions must sum to f(x) - f(0)."""
    images, target, rows = batch()
    model = LogitsModel(vit())
    found = attribute(model, images, target, rows, method="integrated_gradients", signed=True)
    with torch.no_grad():
        change = (model(images) - model(torch.zeros_like(images))).gather(1, target[:, None])[:, 0]
    # The channel mean times three is the sum.
    torch.testing.assert_close(3 * found.sum(dim=(1, 2)), change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [modular, resnet])
def test_deep_lift_is_complete_where_it_is_supported(build):
    """Catches a refusal of architectures that DeepLIFT can explain."""
    images, target, rows = batch()
    model = LogitsModel(build())
    found = attribute(model, images, target, rows, method="deep_lift", signed=True)
    with torch.no_grad():
        change = (model(images) - model(torch.zeros_like(images))).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(3 * found.sum(dim=(1, 2)), change, rtol=1e-3, atol=1e-4)


def reused_relu():
    relu, model = nn.ReLU(), modular()
    return nn.Sequential(model[0], relu, model[2], model[3], model[4], relu).eval()


def gelu():
    model = modular()
    model[1] = nn.GELU()
    return model


@pytest.mark.parametrize("build", [lambda: FunctionalRelu(modular()), reused_relu, gelu, vit])
def test_deep_lift_is_refused_where_it_would_be_wrong(build):
    """Catches captum's silence: a ReLU as a function, a module used twice, GELU and attention give wrong numbers."""
    images, target, rows = batch()
    model = build()
    with pytest.raises(ValueError, match=f"deep_lift cannot explain {type(model).__name__}"):
        attribute(LogitsModel(model), images, target, rows, method="deep_lift")
    assert not any(hasattr(module, "input_ref") for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_deep_lift_of_the_log_probability_is_refused():
    """Catches the log-softmax, a function, that would take part without its rule."""
    images, target, rows = batch()
    with pytest.raises(ValueError, match="score='logit'"):
        attribute(LogitsModel(modular()), images, target, rows, method="deep_lift", score="log_prob")


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_detached_float_reproducible_and_leave_no_trace(method):
    """Catches gradients left on parameters or images, noise from the caller's generator, and half-precision maps."""
    images, target, rows = batch()
    model = modular().bfloat16() if method == "gradient" else modular()
    images = images.to(next(model.parameters()).dtype)
    before = copy.deepcopy(model.state_dict())
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = attribute(LogitsModel(model), images, target, rows, method=method, seed=3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    second = attribute(LogitsModel(model), images, target, rows, method=method, seed=3)
    assert torch.equal(first, second)
    assert first.shape == (3, 8, 8)
    assert first.dtype == torch.float32
    assert not first.requires_grad
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_seed_changes_what_is_random():
    """Catches noise that is the same for every seed."""
    images, target, rows = batch()
    for method in ("random", "smooth_grad", "gradient_shap"):
        maps = [attribute(LogitsModel(modular()), images, target, rows, method=method, seed=seed) for seed in (0, 1)]
        assert not torch.equal(*maps), method


def test_random_ranking_is_a_function_of_the_sample():
    """Catches a control that depends on the batch an image stands in."""
    images, target, _ = batch()
    rows = torch.tensor([7, 2, 9])
    together = attribute(LogitsModel(modular()), images, target, rows, method="random", seed=5)
    alone = attribute(LogitsModel(modular()), images[1:2], target[1:2], rows[1:2], method="random", seed=5)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together, SF.counter_uniform(5, 0, rows, (8, 8)))


def test_blocks_equal_the_whole():
    """Catches targets that go out of step with their images when the batch is cut to fit memory."""
    images, target, rows = batch(batch_size=5)
    model = LogitsModel(modular())
    for method in ("gradient", "integrated_gradients", "deep_lift"):
        whole = attribute(model, images, target, rows, method=method, batch_size=1000)
        cut = attribute(model, images, target, rows, method=method, batch_size=2)
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-7)


def test_resizing_is_differentiated_through():
    """Catches maps at the model's resolution instead of the images'."""
    images, target, rows = batch(side=4)
    model = LogitsModel(modular(), lambda native: F.interpolate(native, (8, 8), mode="bilinear"))
    assert attribute(model, images, target, rows).shape == (3, 4, 4)


class OwnModel(PreTrainedModel):
    """As people write one: `main_input_name` is left at its default, and the pixels do not come first."""

    config_class = ViTConfig

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(3, 4)

    def forward(self, labels=None, pixel_values=None):
        return ImageClassifierOutput(logits=self.head(pixel_values.mean(dim=(2, 3))))


def test_a_model_of_ones_own_gets_its_images_by_name():
    """Catches images passed as input_ids: a model that trains, and fails when it is evaluated."""
    images = torch.randn(2, 3, 4, 4)
    model = OwnModel(ViTConfig())
    assert torch.equal(LogitsModel(model)(images), model.head(images.mean(dim=(2, 3))))


def test_captum_is_imported_late():
    """Catches captum at import: it brings matplotlib with it, which `import smoot_hf` must not."""
    found = []
    for path in Path(captum_methods.__code__.co_filename).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name.split(".")[0] in ("captum", "matplotlib")]
    assert found == []


def test_errors_name_what_is_wrong():
    """Catches an unknown name that falls through, a single class, and an output without logits."""
    images, target, rows = batch()
    with pytest.raises(ValueError, match="method must be one of 'gradient'"):
        attribute(LogitsModel(modular()), images, target, rows, method="saliency")
    with pytest.raises(ValueError, match="score must be 'logit' or 'log_prob'"):
        attribute(LogitsModel(modular()), images, target, rows, score="probability")
    with pytest.raises(ValueError, match="at least 2 classes"):
        LogitsModel(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)))(images)
    with pytest.raises(ValueError, match=r"output \(tuple\) has no 'logits'"):
        LogitsModel(nn.MaxPool2d(2, return_indices=True))(images)
