"""The settings of the method: what one step needs to know, with or without a Trainer."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ..functional import cell_grid

# The paper's images have 28x28 and 32x32 pixels, and its mu is of 784 positions.
_LARGEST_SIDE_OF_THE_PAPER, _POSITIONS_OF_THE_PAPER = 32, 28 * 28


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SmootSettings:
    """The fields of SMOOT, SGT and standard training that one step and the mask budget depend on.

    `SmootTrainingArguments` has the same fields and makes these settings (`args.settings`); a training loop of one's
    own makes them itself. Positions are what K counts: the H*W pixels of the image that the mask acts on, before any
    resizing to the model's input, or (`mask_cell` above 1) its ceil(H/p) * ceil(W/p) cells.

    Args:
        method: `"standard"` (cross-entropy alone), `"sgt"` (every image masked by the same K) or `"smoot"` (a K of
            its own for every image, Equation 4).
        mask_ratio: K at the start as a fraction of the positions, rounded down to a whole number. With sgt K keeps this
            value.
        mask_ratio_min: K_min of Equation 4, as a fraction of the positions.
        mask_ratio_max: K_max of Equation 4, as a fraction of the positions.
        mask_cell: p, the mask acts on cells of p x p pixels, cut from the top left: the saliency is summed over each
            cell, and the K cells of the lowest sums are masked whole. Cells at the right and lower edge are narrower
            where p does not divide the image, and their sums are of fewer pixels. At most the shorter side of the
            image. 16 masks the patches of a ViT/16.
        step_size: mu of Equation 4, at least 0. With 0, K never moves, and smoot equals sgt.
        step_unit: unit of `step_size`. `"pixels"`: positions (pixels; cells with `mask_cell` above 1). `"percent"`:
            percentage points of the positions. `"auto"`: positions for the images of the paper's sizes, which are those
            of up to 32x32 pixels with `mask_cell=1`; for all others K moves by the same share of the image as on 28x28
            pixels, mu = step_size * positions / 784.
        rounding: how mu * delta is rounded (Equation 4): `"floor"` as printed in the paper, `"trunc"` or `"nearest"`.
        alpha: weight of the highest output in delta (Equation 3), in [0, 1].
        top_n: n of Equation 2, at least 1; the number of classes is used where it is smaller.
        delta_mode: how "the i-th highest output" is read: `"rank"` sorts the outputs of the clean and of the masked
            image each by itself, `"class"` uses the order of the clean image for both, and `"label"` does so too but
            puts the label first.
        kl_weight: lambda of Equation 5, at least 0.
        saliency_score: the output whose gradient is the saliency: `"logit"` or `"log_prob"`.
        signed_saliency: rank pixels by the magnitude of the gradient (`False`), or by the signed gradient as
            Algorithm 2 is written (`True`), which moves saliency off the evidence; docs/verdict.md has the numbers.
        saliency_target: the class whose score is differentiated: `"label"` or `"predicted"`.
        saliency_pass: `"shared"`: one forward pass serves both saliency and loss. `"eval"`: the saliency gets a forward
            pass of its own, without dropout and without changing batch statistics.
        shared_dropout: use the same dropout draw for clean and masked images, so that delta measures the mask alone.
        kl_gradient: `"both"`: the KL term's gradient flows through both predictions. `"masked"`: only through that of
            the masked images; the clean prediction is a constant.
        masked_share: r, the share of the samples that are masked, in (0, 1]. A hash of seed, epoch and sample chooses
            them anew in every epoch. The others are trained by their cross-entropy alone, as in standard training, and
            their K stays. The KL of the chosen is weighted by 1 / r, so that the loss is the same in expectation.
        masked_every: n, only every n-th step of the optimizer is masked, beginning with the first; the others are
            standard steps, in which no K moves. The KL is weighted by n.
        mask_positions: which K positions are masked: `"least_salient"` (Algorithm 2), or those of a control that shows
            what the ranking is good for: `"random"`, `"most_salient"`, or `"alternating"` (the least salient in even
            epochs, the most salient in odd ones; the first epoch is 0).
        mask_fill: what replaces a pixel: `"uniform"` (Section 4.1), `"mean"` (of its channel in that image), or
            `"other_image"` (the same pixel of the next image of the batch, with `masked_share` of its chosen ones, so
            that one alone stays as it is), or `"adversarial"` (the pixel itself, moved by `fill_step` against the
            sign of the score's gradient).
        fill_step: how far `mask_fill="adversarial"` moves each value, in the units of the normalised images, at least
            0; unused otherwise.
        label_smoothing_factor: of the cross-entropy, in [0, 1].
        seed: of the fill and of random mask positions, with the epoch and the index of the sample.

    Raises:
        ValueError: a field is out of its range; the message names field, value and range.
    """

    method: Literal["standard", "sgt", "smoot"] = _setting(
        "smoot", "standard: cross-entropy alone. sgt: one fixed K for all images. smoot: each image's K adapts."
    )
    mask_ratio: float = _setting(0.5, "Initial K (for sgt: the K) as a fraction of the image's positions, in [0, 1].")
    mask_ratio_min: float = _setting(0.2, "K_min of Equation 4 as a fraction of the positions, in [0, mask_ratio].")
    mask_ratio_max: float = _setting(0.8, "K_max of Equation 4 as a fraction of the positions, in [mask_ratio, 1].")
    mask_cell: int = _setting(
        1, "Side p of the cells of p x p pixels that the mask acts on and K counts; 16: the patches of a ViT/16."
    )
    step_size: float = _setting(10.0, "mu of Equation 4: how far K moves for delta = 1, in step_unit; 0 = sgt.")
    step_unit: Literal["auto", "pixels", "percent"] = _setting(
        "auto",
        "Unit of step_size: pixels (cells with mask_cell), percent of the image, or auto: pixels up to 32x32, else the "
        "same share of the image as on 28x28.",
    )
    rounding: Literal["floor", "trunc", "nearest"] = _setting(
        "floor", "Rounding of mu * delta in Equation 4. floor (as printed) costs a pixel for any negative delta; trunc."
    )
    alpha: float = _setting(0.8, "Weight of the highest output in delta, Equation 3, in [0, 1].")
    top_n: int = _setting(5, "n of Equation 2: how many of the highest outputs delta looks at, at least 1.")
    delta_mode: Literal["rank", "class", "label"] = _setting(
        "rank", "Whose i-th highest output: rank: each distribution's own; class: the clean order; label: label first."
    )
    kl_weight: float = _setting(1.0, "lambda of Equation 5: weight of KL(f(X) || f(X~)), at least 0.")
    saliency_score: Literal["logit", "log_prob"] = _setting(
        "logit", "The output whose input gradient is the saliency. log_prob gradients vanish as the model fits."
    )
    signed_saliency: bool = _setting(False, "Rank by the gradient as it is (Algorithm 2); False: by its magnitude.")
    saliency_target: Literal["label", "predicted"] = _setting("label", "The class whose score gives the saliency.")
    saliency_pass: Literal["shared", "eval"] = _setting(
        "shared", "shared: the training forward pass also gives the saliency; eval: a forward pass in eval mode does."
    )
    shared_dropout: bool = _setting(True, "Clean and masked images see the same dropout draw.")
    kl_gradient: Literal["both", "masked"] = _setting(
        "both", "Where the KL term's gradient flows: through both predictions, or the masked one alone."
    )
    masked_share: float = _setting(
        1.0,
        "Share of the samples that are masked, in (0, 1]; the KL of these is weighted by its inverse. Cheaper below 1.",
    )
    masked_every: int = _setting(
        1, "Mask in every n-th step of the optimizer only, the KL weighted by n; the other steps are standard ones."
    )
    mask_positions: Literal["least_salient", "random", "most_salient", "alternating"] = _setting(
        "least_salient", "Which K positions are masked; random, most_salient and alternating (by epoch) are controls."
    )
    mask_fill: Literal["uniform", "mean", "other_image", "adversarial"] = _setting(
        "uniform",
        "What replaces a pixel: uniform noise in the range of what remains, the channel's mean, another image's "
        "pixel, or the pixel moved against the score (adversarial).",
    )
    fill_step: float = _setting(
        0.2, "How far mask_fill=adversarial moves a pixel, in units of the normalised images, at least 0."
    )
    # The last two are fields of `TrainingArguments`.
    label_smoothing_factor: float = 0.0
    seed: int = 42

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
            if f.type is bool and not isinstance(value, bool):
                raise ValueError(f"{f.name} must be True or False, got {value!r}")
        for name in ("mask_ratio", "mask_ratio_min", "mask_ratio_max", "alpha", "label_smoothing_factor"):
            require_number(name, getattr(self, name), 0, 1)
        for name in ("step_size", "kl_weight", "fill_step"):
            require_number(name, getattr(self, name), 0, math.inf)
        require_number("masked_share", self.masked_share, 0, 1, excludes_low=True)
        for name in ("top_n", "mask_cell", "masked_every"):
            require_count(name, getattr(self, name), 1)
        if self.method == "smoot" and not self.mask_ratio_min <= self.mask_ratio <= self.mask_ratio_max:
            raise ValueError(
                "mask_ratio_min <= mask_ratio <= mask_ratio_max must hold, got "
                f"mask_ratio_min={self.mask_ratio_min}, mask_ratio={self.mask_ratio}, "
                f"mask_ratio_max={self.mask_ratio_max}"
            )

    @property
    def kl_factor(self) -> float:
        """What the mean KL of a masked step is multiplied by in the loss: lambda * n / r.

        So the loss is that of Equation 5 in expectation, with `masked_share` r and `masked_every` n.
        """
        return self.kl_weight * self.masked_every / self.masked_share

    def masks_at(self, global_step: int) -> bool:
        """Whether a step of the optimizer is a masked one.

        Args:
            global_step: steps that the optimizer has taken before, from the beginning of the training.
        """
        return self.method != "standard" and global_step % self.masked_every == 0

    def step_in_positions(self, image_size: tuple[int, int]) -> float:
        """mu in the positions that K counts, for images of (H, W): pixels, or cells (`mask_cell`).

        Raises:
            ValueError: `mask_cell` does not fit into the image.
        """
        rows, columns = cell_grid(image_size, self.mask_cell, "mask_cell")
        if self.step_unit == "percent":
            return self.step_size / 100 * rows * columns
        is_of_the_paper = self.mask_cell == 1 and max(image_size) <= _LARGEST_SIDE_OF_THE_PAPER
        if self.step_unit == "pixels" or is_of_the_paper:
            return self.step_size
        return self.step_size * rows * columns / _POSITIONS_OF_THE_PAPER


def require_number(name: str, value: float, low: float, high: float, excludes_low: bool = False) -> None:
    """Refuse what is no number in [low, high], or in (low, high].

    Raises:
        ValueError: naming the field, its value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (low <= value <= high and math.isfinite(value)) or (excludes_low and value == low):
        allowed = (
            f"in {'(' if excludes_low else '['}{low}, {high}]" if math.isfinite(high) else f"finite and at least {low}"
        )
        raise ValueError(f"{name} must be {allowed}, got {value}")


def require_count(name: str, value: float, low: int) -> None:
    """Refuse what is no whole number of at least `low`.

    Raises:
        ValueError: naming the field and its value.
    """
    require_number(name, value, low, math.inf)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")
