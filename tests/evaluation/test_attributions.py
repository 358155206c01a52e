"""Attributions: equal to captum's and to definitions, refused where an architecture cannot support them."""

import ast
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput

from smoot_hf import functional as SF
from smoot_hf.data import InputPipeline
from smoot_hf.evaluation.attributions import NOISE_LEVEL, attribute, captum_methods, patch_grid
from smoot_hf.models.logits import LogitsModel

CLASSES = 4
METHODS = [
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smooth_grad",
    "gradient_shap",
    "grad_cam",
    "random",
]


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


def pooled_cnn(channels=5):
    """Maps of the images' size, their mean, and a linear layer; in float64."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, CLASSES)).double().eval()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("score", ["logit", "log_prob"])
def test_grad_cam_of_a_pooled_network_by_hand(signed, score):
    """Catches another layer, weights that are not the mean gradient, and a sum that is not cut off at zero.

    The gradient of a logit of such a network is w_k / (H W) at every position of channel k.
    """
    images, target, rows = batch()
    images, model = images.double(), pooled_cnn()
    weight, bias = model[4].weight.detach(), model[4].bias.detach()
    found = attribute(LogitsModel(model), images, target, rows, method="grad_cam", signed=signed, score=score)
    activations = model[1](model[0](images)).detach()
    for b in range(3):
        slope = weight[target[b]]
        if score == "log_prob":
            slope = slope - (weight @ activations[b].mean(dim=(1, 2)) + bias).softmax(0) @ weight
        for i in range(8):
            for j in range(8):
                expected = sum(slope[k] / 64 * activations[b, k, i, j] for k in range(5))
                expected = expected if signed else max(expected, torch.zeros(()).double())
                # float64, some dozens of additions.
                assert abs(found[b, i, j] - expected) < 1e-12


@pytest.mark.parametrize(("build", "layer", "side"), [(modular, "2", 8), (timm_wrapper, "timm_model.layer4", 64)])
def test_grad_cam_of_a_cnn_is_captums(build, layer, side):
    """Catches a stem or a middle layer in the place of the last stage, and another interpolation to the images."""
    images, target, rows = batch(side)
    model = LogitsModel(build())
    found = attribute(model, images, target, rows, method="grad_cam")
    cam = captum_methods().LayerGradCam(model, model.model.get_submodule(layer))
    coarse = cam.attribute(images, target=target, relu_attributions=True).detach()
    assert coarse.shape[-1] > 1
    expected = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_grad_cam_of_a_vit_takes_the_tokens_before_the_last_attention():
    """Catches the tokens behind it, whose gradient is zero but for the class token, and patches in another order."""
    images, target, rows = batch()
    model = vit().double()
    found = attribute(LogitsModel(model), images.double(), target, rows, method="grad_cam", signed=True)
    kept = []
    norm = model.get_submodule("vit.layers.1.layernorm_before")
    hook = norm.register_forward_hook(lambda layer, inputs, output: kept.append(output))
    value = model(pixel_values=images.double()).logits.gather(1, target[:, None]).sum()
    hook.remove()
    (slopes,) = torch.autograd.grad(value, kept[0])
    for b in range(3):
        weights = slopes[b, 1:].mean(dim=0)
        grid = torch.stack([(kept[0][b, token] * weights).sum() for token in range(1, 5)]).reshape(1, 1, 2, 2)
        expected = F.interpolate(grid, (8, 8), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(found[b], expected.detach())


def swin():
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(image_size=32, patch_size=4, num_labels=CLASSES, **sizes)).eval()


def timm_model(architecture, **settings):
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, num_labels=CLASSES, model_args=settings)
    return TimmWrapperForImageClassification(config).eval()


SMALL_SWIN = {"img_size": 32, "depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16}


@pytest.mark.parametrize(
    ("build", "side"),
    [
        (swin, 32),
        (lambda: timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), 32),
        (lambda: timm_model("swin_tiny_patch4_window7_224", **SMALL_SWIN), 32),
        (lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1)), 64),
        (lambda: timm_model("tf_efficientnet_lite0"), 64),
    ],
    ids=["swin", "timm-vit", "timm-swin", "timm-convnext", "timm-efficientnet"],
)
def test_grad_cam_finds_a_map_in_every_kind_of_network(build, side):
    """Catches tokens or channels-last maps that are read as something else, which ends in an error or a flat map."""
    images, target, rows = batch(side)
    found = attribute(LogitsModel(build()), images, target, rows, method="grad_cam", signed=True)
    assert found.shape == (3, side, side)
    assert bool((found.flatten(1).std(dim=1) > 0).all())


def test_a_map_of_what_the_model_crops_lies_where_it_was_cropped():
    """Catches a map that is stretched over the whole image, though the model sees its centre alone."""
    images = torch.zeros(1, 3, 32, 32)
    images[..., 20:24, 20:24] = 4.0
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.0)
    # Enlarged to 64 pixels, of which the middle 32 are kept: of the image the rows and columns 8 to 23.
    pipeline = InputPipeline((0.5,) * 3, (0.5,) * 3, size=64, crop_size=(32, 32))
    scorer = LogitsModel(model, pipeline.resize)
    found = attribute(scorer, images, torch.zeros(1).long(), torch.zeros(1).long(), method="grad_cam", signed=True)[0]
    # The map is nowhere 0 but where it was cropped away.
    assert found.nonzero().amin(dim=0).tolist() == [8, 8]
    assert found.nonzero().amax(dim=0).tolist() == [23, 23]
    bright = found > (found[8:24, 8:24].amax() + found[8:24, 8:24].amin()) / 2
    assert bright.nonzero().amin(dim=0).tolist() == [20, 20]
    assert bright.nonzero().amax(dim=0).tolist() == [23, 23]


def deit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return DeiTForImageClassification(DeiTConfig(image_size=8, patch_size=4, num_labels=CLASSES, **sizes)).eval()


def slow_attention(model, images, layer):
    """softmax(q k / sqrt(d)) of every head of a layer of a tiny ViT, from what its projections give."""
    projected = {}
    hooks = [
        model.get_submodule(f"vit.layers.{layer}.attention.{name}_proj").register_forward_hook(
            lambda module, inputs, output, name=name: projected.update({name: output.detach()})
        )
        for name in "qk"
    ]
    model(pixel_values=images)
    for hook in hooks:
        hook.remove()
    batch_size, tokens, width = projected["q"].shape
    weights = torch.zeros(batch_size, 2, tokens, tokens, dtype=images.dtype)
    for b in range(batch_size):
        for head in range(2):
            part = slice(head * width // 2, (head + 1) * width // 2)
            for i in range(tokens):
                scores = [projected["q"][b, i, part] @ projected["k"][b, j, part] for j in range(tokens)]
                weights[b, head, i] = (torch.stack(scores) / math.sqrt(width // 2)).softmax(0)
    return weights


def test_attention_rollout_by_hand():
    """Catches another order of the layers, a residual connection left out, and the row of another token.

    Abnar and Zuidema 2020, Equation 1: rollout(l) = (0.5 A(l) + 0.5 I) rollout(l - 1), A the mean over the heads.
    """
    images, target, rows = batch()
    images, model = images.double(), vit().double()
    # Far from uniform attention, of which all layers would be the same.
    for layer in range(2):
        nn.init.normal_(model.get_submodule(f"vit.layers.{layer}.attention.q_proj").weight)
        nn.init.normal_(model.get_submodule(f"vit.layers.{layer}.attention.k_proj").weight)
    found = attribute(LogitsModel(model), images, target, rows, method="attention_rollout")
    assert model.config._attn_implementation == "sdpa"
    mixed = [0.5 * slow_attention(model, images, layer).mean(dim=1) + 0.5 * torch.eye(5) for layer in range(2)]
    for b in range(3):
        shares = torch.zeros(5, dtype=torch.float64)
        for patch in range(5):
            for between in range(5):
                shares[patch] += mixed[1][b, 0, between] * mixed[0][b, between, patch]
        grid = shares[1:].reshape(1, 1, 2, 2)
        expected = F.interpolate(grid, (8, 8), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(found[b], expected)


def test_attention_rollout_skips_the_distillation_token():
    """Catches a grid that begins one token too early, where two stand before the patches."""
    images, target, rows = batch()
    model = deit()
    found = attribute(LogitsModel(model), images, target, rows, method="attention_rollout")
    model.set_attn_implementation("eager")
    first, second = model(pixel_values=images, output_attentions=True).attentions
    shares = ((second.mean(1) + torch.eye(6)) / 2 @ ((first.mean(1) + torch.eye(6)) / 2))[:, 0, 2:].reshape(3, 1, 2, 2)
    expected = F.interpolate(shares, (8, 8), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (resnet, "it returns none|it does not return them"),
        (lambda: timm_model("vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1), "timm's models return no"),
        (swin, "several shapes|in the shape"),
        (modular, "it does not return them"),
    ],
    ids=["resnet", "timm", "swin", "module"],
)
def test_attention_rollout_is_refused_where_there_are_no_weights_to_multiply(build, reason):
    """Catches an error from inside the model, and windows of an image that are multiplied as if they were images."""
    images, target, rows = batch(32 if build is swin else 8)
    model = build()
    with pytest.raises(ValueError, match="attention_rollout cannot explain") as caught:
        attribute(LogitsModel(model), images, target, rows, method="attention_rollout")
    assert any(one in str(caught.value) for one in reason.split("|"))


def test_grad_cam_is_refused_where_there_is_no_map():
    """Catches a map of something else, such as the images themselves."""
    images, target, rows = batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    with pytest.raises(ValueError, match="grad_cam cannot explain Sequential: it has no layer whose output is a map"):
        attribute(LogitsModel(model), images, target, rows, method="grad_cam")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (197, (224, 224), (1, 14, 14)),
        (198, (224, 224), (2, 14, 14)),
        (261, (224, 224), (5, 16, 16)),
        (49, (224, 224), (0, 7, 7)),
        (1 + 8 * 4, (64, 32), (1, 8, 4)),
        (2, (8, 8), None),
        (200, (224, 224), (4, 14, 14)),
        (77, (224, 224), (13, 8, 8)),
    ],
)
def test_tokens_lie_on_a_grid_of_square_patches(tokens, size, expected):
    """Catches rows and columns exchanged, and class tokens taken for patches."""
    assert patch_grid(tokens, size) == expected


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
