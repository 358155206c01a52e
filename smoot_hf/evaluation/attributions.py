"""Attribution: importance maps of a classifier, by the gradient, by captum, or by what a layer inside it holds.

The adapter from a model to its outputs is ours (`LogitsModel`), the methods on pixels are captum's; their maps are
reduced over the channels in the same way: the mean of the signed values, or the mean of their magnitudes. Grad-CAM and
attention rollout make a map of the model's own grid, which is brought to the images' resolution.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import channel_mean, counter_uniform, input_saliency
from ..models.logits import AttributionScore, LogitsModel, ScoreModel, run_classifier, target_score

Method = Literal[
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smooth_grad",
    "gradient_shap",
    "deep_lift",
    "grad_cam",
    "attention_rollout",
    "random",
]
# Those that are no gradient of a score: the convention of a measurement says neither score nor sign of them.
WITHOUT_SCORE = ("attention_rollout", "random")

# Images in one forward pass for one image explained: points of the path, or noisy copies.
INTEGRATION_POINTS = 50
SMOOTH_GRAD_COPIES = 25
GRADIENT_SHAP_COPIES = 20
# Standard deviation of the noise of SmoothGrad and gradient SHAP, as a share of the range of the images.
NOISE_LEVEL = 0.15
# Share of f(x) - f(baseline) that DeepLIFT's attributions may miss; rounding in float32 misses less than 0.001.
COMPLETENESS_TOLERANCE = 0.01

# Tokens that may stand before those of the patches: of the class, of distillation, registers.
_MOST_FIRST_TOKENS = 16
# Their output is the map that was their input, or attention weights, which are no map over the image.
_PASSING = (nn.Dropout, nn.Identity, nn.Softmax)
# Of the weight that the centre of an image has in the model's input: positions below it count as cropped away.
_LEAST_WEIGHT = 0.5

# What autograd says where the outputs do not hang on the images.
_NO_GRADIENT = ("does not require grad", "not have been used in the graph")

_COPIES = {
    "integrated_gradients": INTEGRATION_POINTS,
    "smooth_grad": SMOOTH_GRAD_COPIES,
    "gradient_shap": GRADIENT_SHAP_COPIES,
    "deep_lift": 2,
}


def attribute(
    model: LogitsModel,
    images: Tensor,
    target: Tensor,
    sample_idx: Tensor,
    *,
    method: Method = "gradient",
    score: AttributionScore = "logit",
    signed: bool = False,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Importance of every position of every image for the score of one class, or for the sum of several labels' scores.

    Integrated gradients, gradient SHAP and DeepLIFT compare with a reference image. It is zero everywhere, which after
    the usual normalisation is the mean of the training set. The model should be in eval mode.

    | method | definition |
    |---|---|
    | `gradient` | gradient of the score; equals `captum.attr.Saliency` |
    | `input_x_gradient` | the same times the image |
    | `integrated_gradients` | 50 Gauss-Legendre points between zero and the image (Sundararajan et al. 2017) |
    | `smooth_grad` | mean gradient of 25 noisy copies (Smilkov et al. 2017) |
    | `gradient_shap` | 20 random points between zero and noisy copies (Lundberg and Lee 2017) |
    | `deep_lift` | Rescale rule (Shrikumar et al. 2017), for ReLU-like activations and pooling in modules used once |
    | `grad_cam` | Grad-CAM (Selvaraju et al. 2017) at the last layer that holds a map, see below |
    | `attention_rollout` | product of the layers' attention (Abnar and Zuidema 2020); the same for all classes |
    | `random` | uniform noise, a function of the seed and the sample alone: the control |

    The noise of `smooth_grad` and `gradient_shap` has a standard deviation of 0.15 of the range of the images. It is a
    function of `seed` and of the batch (its first row); the caller's random state is restored.

    `grad_cam` takes the last layer whose output is a map over the image on which the score depends: of a convolutional
    network its last maps before the pooling, of a transformer the tokens behind the last such LayerNorm (of a ViT that
    classifies by its class token, the one before its last attention). The map is the positive part of Equation 2 of
    the paper, or with `signed` the sum itself. `attention_rollout` needs a ViT of transformers whose layers all attend
    over the same tokens; it ignores `score` and `signed`, and switches the model to attention that returns its weights
    for as long as it runs. Both are interpolated from the layer's grid; where the model crops the images, what it does
    not see is 0.

    Args:
        model: from normalised images to logits; its `resize`, if it has one, is linear.
        images: (B, C, H, W).
        target: int64 (B,), the class explained; or of a multi-label model (B, classes), weights of the labels whose
            scores are summed, see `functional.multi_label_target`.
        sample_idx: int64 (B,), row of each image in its data set.
        method: one of the table.
        score: `"logit"` of the class, or `"log_prob"`, the logarithm of its softmax, or of a label its sigmoid, output.
        signed: `True` ranks by the channel mean of the signed values, `False` by that of their magnitudes (of
            `grad_cam` by the positive part).
        seed: of `random`, `smooth_grad` and `gradient_shap`.
        batch_size: images per forward pass at most, the copies of an image counted; all copies of an image at once for
            `gradient_shap`.

    Returns:
        (B, H, W), detached, in float32 or wider.

    Raises:
        ValueError: an unknown method or score, an architecture that DeepLIFT, Grad-CAM or attention rollout cannot
            explain, or logits that have no gradient with respect to the images.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
    if score not in get_args(AttributionScore):
        raise ValueError(f"score must be 'logit' or 'log_prob', got {score!r}")
    if target.ndim != 1 + model.is_multi_label:
        expected = "labels (B, classes) of a multi-label model" if model.is_multi_label else "classes (B,) of the model"
        raise ValueError(f"target must hold {expected}, got shape {tuple(target.shape)}")
    if method == "random":
        return counter_uniform(seed, 0, sample_idx, tuple(images.shape[2:]))
    block_size = max(1, batch_size // _COPIES.get(method, 1))
    blocks = zip(images.detach().split(block_size), target.split(block_size), strict=True)
    with torch.enable_grad(), needs_gradient(model, method):
        if method == "gradient":
            return torch.cat([_gradient(model, block, classes, score, signed) for block, classes in blocks])
        if method == "grad_cam":
            return torch.cat([_grad_cam(model, block, classes, score, signed) for block, classes in blocks])
        if method == "attention_rollout":
            return torch.cat([_attention_rollout(model, block) for block, _ in blocks])
        with _seeded(images.device, seed, int(sample_idx[0])):
            scores = ScoreModel(model, score)
            return torch.cat(
                [channel_mean(_captum(scores, block, classes, method, batch_size), signed) for block, classes in blocks]
            )


def _gradient(model: LogitsModel, images: Tensor, target: Tensor, score: AttributionScore, signed: bool) -> Tensor:
    leaf = images.clone().requires_grad_(True)
    return input_saliency(target_score(model(leaf), target, score), leaf, signed)


@contextlib.contextmanager
def needs_gradient(model: LogitsModel, method: str) -> Iterator[None]:
    """Turn autograd's errors about a missing gradient into one that names the method and the model."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _NO_GRADIENT):
            raise
        raise ValueError(
            f"{method} cannot explain {type(model.model).__name__}: its logits have no gradient with respect to the "
            "pixels (does its forward detach them or leave them out?); 'random' or a function of your own works without"
        ) from error


@contextlib.contextmanager
def _seeded(device: torch.device, *seeds: int) -> Iterator[None]:
    """Seed the global generators that captum draws from (torch's, and NumPy's for gradient SHAP); put them back."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002


def captum_methods() -> ModuleType:
    """The module `captum.attr`, imported late: it imports matplotlib, which `import smoot_hf` must not.

    Older releases of matplotlib warn of deprecations of their own, which are not the caller's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import captum.attr
    return captum.attr


def _captum(model: ScoreModel, images: Tensor, target: Tensor, method: str, batch_size: int) -> Tensor:
    """captum's attribution of every pixel and channel: (B, C, H, W)."""
    captum = captum_methods()
    # captum chooses one output of each image; the scores of several labels are summed by the model itself.
    of_target: dict[str, Any] = {"additional_forward_args": target}
    # Copies of an image at once: of large images not even those of a single one may fit into memory.
    at_once = max(1, batch_size // len(images))
    images = images.clone().requires_grad_(True)
    noise = NOISE_LEVEL * float(images.detach().amax() - images.detach().amin())
    if method == "input_x_gradient":
        return captum.InputXGradient(model).attribute(images, **of_target)
    if method == "integrated_gradients":
        return captum.IntegratedGradients(model).attribute(
            images,
            **of_target,
            n_steps=INTEGRATION_POINTS,
            internal_batch_size=None if at_once >= INTEGRATION_POINTS else at_once * len(images),
        )
    if method == "smooth_grad":
        return captum.NoiseTunnel(captum.Saliency(model)).attribute(
            images,
            nt_samples=SMOOTH_GRAD_COPIES,
            nt_samples_batch_size=min(SMOOTH_GRAD_COPIES, at_once),
            stdevs=noise,
            **of_target,
            abs=False,
        )
    if method == "gradient_shap":
        return captum.GradientShap(model).attribute(
            images, torch.zeros_like(images[:1]), n_samples=GRADIENT_SHAP_COPIES, stdevs=noise, **of_target
        )
    return _deep_lift(model, images, target)


def _deep_lift(model: ScoreModel, images: Tensor, target: Tensor) -> Tensor:
    """DeepLIFT, refused where its attributions do not add up to f(x) - f(0).

    captum replaces the gradient of the activation *modules* it knows. One that is a plain function, is used twice or is
    unknown to it keeps its own gradient, without a word; only the sum shows that the result is not DeepLIFT.
    """
    name = type(model.logits_model.model).__name__
    # captum leaves attributes on the modules that it hooks if an error is raised: it warns of hooks and gets a copy.
    model = copy.deepcopy(model)
    reference = torch.zeros_like(images)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting forward, backward hooks")
            method = captum_methods().DeepLift(model)
            values, gap = method.attribute(
                images, reference, additional_forward_args=target, return_convergence_delta=True
            )
    except (AssertionError, AttributeError, RuntimeError) as error:
        raise ValueError(f"deep_lift cannot explain {name}: {error}") from error
    with torch.no_grad():
        change = (model(images, target) - model(reference, target)).abs().mean()
    if not bool((gap.abs() <= COMPLETENESS_TOLERANCE * change).all()):
        raise ValueError(
            f"deep_lift cannot explain {name}: its attributions miss f(x) - f(0), {float(change):.3g} on average, by "
            f"up to {float(gap.abs().max()):.3g}. It needs score='logit', and every non-linearity as a module of its "
            "own, used once, of a kind that captum supports (ReLU, max pooling, ...; not GELU, SiLU or attention); "
            "integrated_gradients works without."
        )
    return values


def _grad_cam(model: LogitsModel, images: Tensor, target: Tensor, score: AttributionScore, signed: bool) -> Tensor:
    """Grad-CAM at the last layer on whose map the score depends: (B, H, W).

    Selvaraju et al. 2017, Equations 1 and 2: every channel of the map is weighted by the mean of the score's gradient
    over its positions; the sum over the channels is cut off at zero.
    """
    leaf = images.clone().requires_grad_(True)
    size = _input_size(model, images)
    with _maps_kept(model.model, len(images), size) as kept:
        value = target_score(model(leaf), target, score).sum()
    for layer, output in reversed(kept):
        (gradient,) = torch.autograd.grad(value, output, retain_graph=True, allow_unused=True)
        slopes = None if gradient is None else _as_map(layer, gradient, size)
        # Behind the last attention of a ViT the class token alone counts: the patches have no gradient there.
        if slopes is not None and bool(slopes.any()):
            channels = _as_map(layer, output.detach(), size)
            assert channels is not None
            weighted = (slopes.mean(dim=(2, 3), keepdim=True) * channels).sum(dim=1)
            return _at_native_resolution(weighted if signed else weighted.clamp_min(0), model, images, size)
    raise ValueError(
        f"grad_cam cannot explain {type(model.model).__name__}: it has no layer whose output is a map over the image "
        "(of a convolution, or of the tokens behind a LayerNorm) and on which the class depends; 'gradient' and "
        "'integrated_gradients' work without"
    )


@contextlib.contextmanager
def _maps_kept(network: nn.Module, batch: int, size: tuple[int, int]) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Every layer of the forward passes within whose output is a map over the image, with its output, in order."""
    kept: list[tuple[nn.Module, Tensor]] = []

    def keep(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(layer, _PASSING) or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if len(output) == batch and _as_map(layer, output, size) is not None:
            kept.append((layer, output))

    hooks = [layer.register_forward_hook(keep) for layer in network.modules()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _as_map(layer: nn.Module, values: Tensor, size: tuple[int, int]) -> Tensor | None:
    """A layer's output (or its gradient) as a map over the image, (B, D, h, w); `None` where it is none."""
    if values.ndim == 4:
        # Swin's norms have the channels last, those of ConvNeXT come both ways.
        is_last = isinstance(layer, nn.LayerNorm) and values.shape[1] != layer.normalized_shape[-1]
        channels_first = values.permute(0, 3, 1, 2) if is_last else values
        return channels_first if channels_first[0, 0].numel() > 1 else None
    found = patch_grid(values.shape[1], size) if values.ndim == 3 else None
    if found is None or not isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return None
    first, rows, columns = found
    return values[:, first:].transpose(1, 2).unflatten(2, (rows, columns))


def patch_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int, int] | None:
    """How the tokens of a vision transformer lie on its input: tokens before those of the patches, rows and columns.

    Args:
        tokens: number of all tokens.
        size: (height, width) of the model's input in pixels; the patches are square.

    Returns:
        `None` where no grid of at least two square patches, behind at most 16 other tokens, has so many.
    """
    height, width = size
    for first in range(min(_MOST_FIRST_TOKENS, tokens - 2) + 1):
        patches = tokens - first
        rows = math.isqrt(patches * height // width)
        if rows and patches % rows == 0 and rows * width == patches // rows * height:
            return first, rows, patches // rows
    return None


def _attention_rollout(model: LogitsModel, images: Tensor) -> Tensor:
    """Attention rollout: (B, H, W), at least 0, the share of every position in the class token behind the last layer.

    Abnar and Zuidema 2020, Equation 1: the weights of a layer are the mean over its heads; the residual connection
    counts as much as the attention (0.5 A + 0.5 I); the layers are multiplied. Where there is no class token, the mean
    over all tokens is taken.
    """
    size = _input_size(model, images)
    attentions = _attention_weights(model, images)
    tokens = attentions[0].shape[-1]
    found = patch_grid(tokens, size)
    if found is None:
        raise ValueError(
            f"{_no_rollout(model)} its {tokens} tokens are no grid of patches of {size[0]}x{size[1]} pixels"
        )
    first, rows, columns = found
    identity = torch.eye(tokens, dtype=attentions[0].dtype, device=attentions[0].device)
    rollout = identity
    for weights in attentions:
        rollout = (weights.mean(dim=1) + identity) / 2 @ rollout
    shares = rollout[:, 0] if first else rollout.mean(dim=1)
    return _at_native_resolution(shares[:, first:].unflatten(1, (rows, columns)), model, images, size)


def _attention_weights(model: LogitsModel, images: Tensor) -> tuple[Tensor, ...]:
    """Of every layer, (B, heads, tokens, tokens).

    Raises:
        ValueError: the model does not return them, or its layers attend over windows or over fewer tokens.
    """
    inputs = images if model.resize is None else model.resize(images)
    asked = {"output_attentions": True}
    try:
        with torch.no_grad(), _eager_attention(model.model):
            outputs, _ = run_classifier(model.model, inputs, asked, by_name=model.by_name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_no_rollout(model)} it does not return them ({error})") from error
    weights: tuple[Tensor, ...] = getattr(outputs, "attentions", None) or ()
    shapes = {None if one is None else one.shape for one in weights}
    if len(shapes) != 1 or None in shapes:
        raise ValueError(f"{_no_rollout(model)} it returns {'them of several shapes' if shapes else 'none'}")
    if weights[0].ndim != 4 or len(weights[0]) != len(images) or weights[0].shape[-1] != weights[0].shape[-2]:
        raise ValueError(f"{_no_rollout(model)} it returns them in the shape {tuple(weights[0].shape)}")
    return tuple(one.to(torch.promote_types(one.dtype, torch.float32)) for one in weights)


def _no_rollout(model: LogitsModel) -> str:
    return (
        f"attention_rollout cannot explain {type(model.model).__name__}: it takes the attention weights of a ViT of "
        "transformers whose layers all attend over all tokens ('grad_cam' works without; timm's models return no "
        "attention weights);"
    )


@contextlib.contextmanager
def _eager_attention(network: nn.Module) -> Iterator[None]:
    """Attention written out, where it is fused otherwise: fused kernels do not give the weights."""
    before = getattr(getattr(network, "config", None), "_attn_implementation", None)
    if before is None or before == "eager":
        yield
        return
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _input_size(model: LogitsModel, images: Tensor) -> tuple[int, int]:
    """Height and width of what the network itself gets."""
    with torch.no_grad():
        height, width = (images if model.resize is None else model.resize(images[:1])).shape[-2:]
    return height, width


def _at_native_resolution(maps: Tensor, model: LogitsModel, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps on a layer's grid (B, h, w) at the images' resolution (B, H, W), in float32 or wider.

    Interpolated to the network's input; every pixel of the image then has the mean of the input's pixels that it is a
    part of, weighted as `resize` weighs it, and 0 where it is a part of none. These weights are the gradient of the
    resizing, whatever it crops.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    at_input = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)
    if model.resize is None:
        return at_input[:, 0]
    leaf = torch.zeros_like(images, dtype=maps.dtype).requires_grad_(True)
    resized = model.resize(leaf)
    shares, weights = (
        torch.autograd.grad(resized, leaf, one.expand_as(resized), retain_graph=True)[0][:, 0]
        for one in (at_input, torch.ones_like(at_input))
    )
    is_seen = weights > _LEAST_WEIGHT * weights.amax()
    return torch.where(is_seen, shares / weights, 0)
