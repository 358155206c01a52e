"""Attribution: importance maps of a classifier, by our own gradient or by the methods of captum.

The adapter from a model to its outputs is ours (`LogitsModel`), the methods are captum's. Every map is reduced over
the channels in the same way: the mean of the signed values, or the mean of their magnitudes.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..functional import channel_mean, class_score, counter_uniform, input_saliency
from ..models.logits import AttributionScore, LogitsModel, ScoreModel

Method = Literal[
    "gradient", "input_x_gradient", "integrated_gradients", "smooth_grad", "gradient_shap", "deep_lift", "random"
]

# Images in one forward pass for one image explained: points of the path, or noisy copies.
INTEGRATION_POINTS = 50
SMOOTH_GRAD_COPIES = 25
GRADIENT_SHAP_COPIES = 20
# Standard deviation of the noise of SmoothGrad and gradient SHAP, as a share of the range of the images.
NOISE_LEVEL = 0.15
# Share of f(x) - f(baseline) that DeepLIFT's attributions may miss; rounding in float32 misses less than 0.001.
COMPLETENESS_TOLERANCE = 0.01

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
    """Importance of every position of every image for the score of one class.

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
    | `random` | uniform noise, a function of the seed and the sample alone: the control |

    The noise of `smooth_grad` and `gradient_shap` has a standard deviation of 0.15 of the range of the images. It is a
    function of `seed` and of the batch (its first row); the caller's random state is restored.

    Args:
        model: from normalised images to logits.
        images: (B, C, H, W).
        target: int64 (B,), the class explained.
        sample_idx: int64 (B,), row of each image in its data set.
        method: one of the table.
        score: `"logit"` of the class, or `"log_prob"`.
        signed: `True` ranks by the channel mean of the signed values, `False` by that of their magnitudes.
        seed: of `random`, `smooth_grad` and `gradient_shap`.
        batch_size: images per forward pass at most, as far as one image with all its copies fits.

    Returns:
        (B, H, W), detached, in float32 or wider.

    Raises:
        ValueError: an unknown method or score, an architecture that DeepLIFT cannot explain, or logits that have no
            gradient with respect to the images.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
    if score not in get_args(AttributionScore):
        raise ValueError(f"score must be 'logit' or 'log_prob', got {score!r}")
    if method == "random":
        return counter_uniform(seed, 0, sample_idx, tuple(images.shape[2:]))
    block_size = max(1, batch_size // _COPIES.get(method, 1))
    blocks = zip(images.detach().split(block_size), target.split(block_size), strict=True)
    with torch.enable_grad(), needs_gradient(model, method):
        if method == "gradient":
            return torch.cat([_gradient(model, block, classes, score, signed) for block, classes in blocks])
        with _seeded(images.device, seed, int(sample_idx[0])):
            scores = ScoreModel(model, score)
            return torch.cat(
                [channel_mean(_captum(scores, block, classes, method), signed) for block, classes in blocks]
            )


def _gradient(model: LogitsModel, images: Tensor, target: Tensor, score: str, signed: bool) -> Tensor:
    leaf = images.clone().requires_grad_(True)
    return input_saliency(class_score(model(leaf), target, score), leaf, signed)


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


def _captum(model: ScoreModel, images: Tensor, target: Tensor, method: str) -> Tensor:
    """captum's attribution of every pixel and channel: (B, C, H, W)."""
    captum = captum_methods()
    images = images.clone().requires_grad_(True)
    noise = NOISE_LEVEL * float(images.detach().amax() - images.detach().amin())
    if method == "input_x_gradient":
        return captum.InputXGradient(model).attribute(images, target=target)
    if method == "integrated_gradients":
        return captum.IntegratedGradients(model).attribute(images, target=target, n_steps=INTEGRATION_POINTS)
    if method == "smooth_grad":
        return captum.NoiseTunnel(captum.Saliency(model)).attribute(
            images, nt_samples=SMOOTH_GRAD_COPIES, stdevs=noise, target=target, abs=False
        )
    if method == "gradient_shap":
        return captum.GradientShap(model).attribute(
            images, torch.zeros_like(images[:1]), n_samples=GRADIENT_SHAP_COPIES, stdevs=noise, target=target
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
            values, gap = method.attribute(images, reference, target=target, return_convergence_delta=True)
    except (AssertionError, AttributeError, RuntimeError) as error:
        raise ValueError(f"deep_lift cannot explain {name}: {error}") from error
    with torch.no_grad():
        change = (model(images) - model(reference)).gather(1, target[:, None]).abs().mean()
    if not bool((gap.abs() <= COMPLETENESS_TOLERANCE * change).all()):
        raise ValueError(
            f"deep_lift cannot explain {name}: its attributions miss f(x) - f(0), {float(change):.3g} on average, by "
            f"up to {float(gap.abs().max()):.3g}. It needs score='logit', and every non-linearity as a module of its "
            "own, used once, of a kind that captum supports (ReLU, max pooling, ...; not GELU, SiLU or attention); "
            "integrated_gradients works without."
        )
    return values
