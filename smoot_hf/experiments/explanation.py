"""One image explained by several models: prediction, saliency, and what is left of both as salient pixels are removed.

Ranking, fill and removal are those of `evaluate_faithfulness`; nothing here knows of the page that shows it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from ..data.decoded_images import on_background
from ..evaluation import Convention
from ..evaluation.attributions import Method
from ..evaluation.convention import resolve_convention
from ..evaluation.ranked_batches import DataBatch, rank_batch
from ..functional.perturbation import has_prediction, measure_outputs, perturbed_outputs
from ..functional.removal import Fill, even_fractions, removal_ranks, removed_counts
from ..markup import figure_text
from ..models.logits import LogitsModel, refuse_multi_label
from ..models.state import model_device, untouched
from .checkpoint import Checkpoint

STEPS = 20
# A dropped image has no label: each model is asked about the class that it predicts itself.
CONVENTION = Convention(target="predicted", measure="probability", fractions=even_fractions(STEPS))

# Of an image that is decoded for the page: more than a camera's, and 150 MB in memory.
MOST_PIXELS = 50_000_000
# Not all that Pillow can open: some of its readers start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MODES = {1: "L", 3: "RGB"}
_SHALLOW = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one model says of one image, whole and with more and more of its most salient pixels removed.

    Attributes:
        attribution: (H, W), of the predicted class; by default the magnitude of the gradient of its logit.
        fractions: float64 (S+1,), true fractions removed.
        probability: (S+1,) in [0, 1], of the class predicted for the whole image.
        classes: int64 (S+1,), the class predicted at each fraction; the first is that of the whole image. -1 where the
            model's outputs hold a NaN and predict none: the probability is 0 there.
        pictures: uint8 (S+1, H, W, C), the image with the pixels removed.
    """

    attribution: Tensor
    fractions: Tensor
    probability: Tensor
    classes: Tensor
    pictures: np.ndarray


def explain(
    checkpoint: Checkpoint, pixels: Tensor, fill: Fill = "corner", attribution: Method = "gradient"
) -> Explanation:
    """Explain one image and remove its most salient pixels step by step.

    Args:
        checkpoint: model and input pipeline.
        pixels: uint8 (C, H, W), at native resolution.
        fill: what replaces a removed pixel, see `functional.removal.removal_fill`.
        attribution: what ranks the pixels.

    Raises:
        ValueError: the attribution cannot explain the model, or the model has several labels for an image.
    """
    model, pipeline = checkpoint
    refuse_multi_label(model, "the page follows")
    convention = resolve_convention(CONVENTION, attribution, fill=fill)
    device = model_device(model)
    nothing = torch.zeros(1, dtype=torch.int64, device=device)
    with untouched(model):
        batch = DataBatch(pipeline.normalize(pixels[None].to(device)), nothing, nothing)
        scorer = LogitsModel(model, pipeline.resize)
        ranked = rank_batch(scorer, batch, None, convention, seed=0, batch_size=STEPS + 1)
        ranks = removal_ranks(ranked.attribution)
        counts = removed_counts(convention.fractions, ranks.numel())
        outputs = perturbed_outputs(scorer, ranked.images, ranked.fill, ranks, counts)
    is_removed = ranks < torch.tensor(counts, device=device)[:, None, None]
    shown = torch.where(is_removed[:, None], ranked.fill, ranked.images)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (pipeline.mean, pipeline.std))
    pictures = ((shown * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return Explanation(
        attribution=ranked.attribution[0].cpu(),
        fractions=torch.tensor(counts, dtype=torch.float64) / ranks.numel(),
        probability=measure_outputs(outputs, ranked.target, "probability")[0].cpu(),
        classes=outputs[0].argmax(dim=1).where(has_prediction(outputs[0]), -1).cpu(),
        pictures=pictures.cpu().numpy(),
    )


def read_pixels(path: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """An image file of anybody's as the models know images, see `as_pixels`; its size is looked at before its pixels.

    Args:
        path: of the file.
        shape: (C, H, W) of the models' images.

    Raises:
        ValueError: as `opened`.
    """
    with opened(path) as image:
        return as_pixels(image, shape)


def read_photograph(path: str | Path, channels: int) -> Tensor:
    """An image file of anybody's at its own size, upright: uint8 (C, H, W).

    Raises:
        ValueError: as `opened`.
    """
    with opened(path) as image:
        return _tensor_of(_upright(image, channels))


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file of anybody's; what goes wrong with it here and within is a `ValueError` in one sentence.

    Raises:
        ValueError: no such file, no image of a known format, one that is damaged, of more than 50 million pixels, or of
            more than 8 bits per channel.
    """
    try:
        # The file's own header says the size; a few bytes can stand for any number of equal pixels.
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(
                    f"the image has {image.width}x{image.height} pixels, at most {MOST_PIXELS // 10**6} million are "
                    "taken: make it smaller first"
                )
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"the image has more pixels than the {MOST_PIXELS // 10**6} million that are taken: make it smaller first"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"the file is no image of a known format: {', '.join(_FORMATS)}") from error
    except FileNotFoundError as error:
        raise ValueError("there is no such file") from error
    except (OSError, SyntaxError) as error:  # what Pillow's decoders raise of damaged files
        raise ValueError(f"the image cannot be decoded: {error}") from error


def as_pixels(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """An image of any size as the models know them: uint8 (C, H, W), cut to the proportions, averaged to the size.

    Enlarged copies of images of that very size come back unchanged.

    Raises:
        ValueError: more than 8 bits per channel.
    """
    channels, height, width = shape
    upright = _upright(image, channels)
    return _tensor_of(ImageOps.fit(upright, (width, height), method=Image.Resampling.BOX))


def _upright(image: Image.Image, channels: int) -> Image.Image:
    """Turned as its EXIF data say, laid on white where it is transparent, in grey or in colours."""
    if image.mode not in _SHALLOW:
        raise ValueError(f"images of mode {image.mode!r} have more than 8 bits per channel: convert it to 8 bits first")
    return on_background(ImageOps.exif_transpose(image)).convert(_MODES[channels])


def _tensor_of(image: Image.Image) -> Tensor:
    """uint8 (C, H, W)."""
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())


def enlarged(picture: np.ndarray, side: int = 224) -> Image.Image:
    """uint8 (H, W, C) as an image at least `side` pixels wide, every pixel a whole number of them."""
    times = max(1, -(-side // picture.shape[1]))
    large = picture.repeat(times, axis=0).repeat(times, axis=1)
    return Image.fromarray(large[..., 0] if large.shape[2] == 1 else large)


def saliency_picture(attribution: Tensor) -> np.ndarray:
    """(H, W) -> uint8 (H, W, 3): share of the map's own maximum, as in the figures."""
    share = attribution / attribution.max().clamp_min(1e-38)
    return (colormaps["magma"](share.numpy())[..., :3] * 255).round().astype(np.uint8)


def draw_fall(explanations: Mapping[str, Explanation], colours: Mapping[str, str], step: int) -> Figure:
    """The probability of every model's class over the fraction removed, with the current point.

    Args:
        explanations: model -> explanation.
        colours: model -> colour.
        step: of the current point, from 0 to S.
    """
    # Not by pyplot, which threads must not share.
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, found in explanations.items():
        x, y = 100 * found.fractions, 100 * found.probability
        axes.plot(x, y, color=colours[name], linewidth=2, label=figure_text(name))
        axes.plot(x[step], y[step], "o", color=colours[name], markersize=9, markeredgecolor="black")
    now = 100 * float(next(iter(explanations.values())).fractions[step])
    axes.axvline(now, color="black", linewidth=1, linestyle=":")
    axes.set(xlim=(-1, 101), ylim=(-3, 103))
    axes.set_xlabel("pixels removed, most salient first (%)")
    axes.set_ylabel("probability (%)")
    axes.set_title("Probability of the class predicted for the whole image", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right")
    return figure
