"""The convention of a faithfulness measurement: every choice that a deletion or insertion area depends on."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from ..functional.removal import Fill, check_choice, even_fractions, removed_counts
from ..models.logits import AttributionScore
from .attributions import WITHOUT_SCORE

Target = Literal["label", "predicted"]
Measure = Literal["accuracy", "probability", "label_probability"]
Normalisation = Literal["none", "span"]


@dataclass(frozen=True)
class Convention:
    """How a deletion or insertion curve and its area were measured.

    On one MNIST network these choices moved the area further than the training method did, so every number carries
    them. Pixels are removed most salient first, all channels of a position at once; values are in percent.

    Attributes:
        attribution: the method that ranks the positions, by name.
        score: whose gradient it is, the `"logit"` or `"log_prob"` of the class; `None` where the order is random, that
            of the attention weights, or of a function of the caller's, which decides for itself.
        signed: ranked by the signed value or (`False`) by the magnitude, see `attributions.attribute`; `None` as above.
        target: the class that is explained and followed: the true `"label"`, or the one `"predicted"` on the whole
            image. Of a multi-label model it is all labels of the image, or all whose output is above one half there.
        measure: `"accuracy"`: share of images whose highest output is the target's; `"probability"`: its softmax
            output. `"label_probability"`, of a multi-label model alone: the mean sigmoid output of its labels.
        fill: what replaces a removed pixel, see `functional.removal.removal_fill`.
        fractions: removed (insertion: restored) fractions of the positions, rising; the first and the last are the end
            points. Each becomes floor(fraction * positions).
        normalisation: `"none"`: the area by the trapezoid rule over the true fractions. `"span"`: this area divided by
            the distance of the end points, which is the mean height of the curve. Published code that divides by the
            number of steps, as that of RISE does, reports this; from 0 to 100 % both are the same.
        cell: side in pixels of the cells that are removed and restored whole, in the order of the attribution summed
            over each, see `functional.cell_sum`. Positions are cells then; with 1 they are pixels.

    Raises:
        ValueError: a field outside its choices, fractions that do not rise within [0, 1], or a cell that is no whole
            number of at least 1.
    """

    attribution: str = "gradient"
    score: AttributionScore | None = "logit"
    signed: bool | None = False
    target: Target = "label"
    measure: Measure = "accuracy"
    fill: Fill = "corner"
    fractions: tuple[float, ...] = even_fractions(10)
    normalisation: Normalisation = "none"
    cell: int = 1

    def __post_init__(self) -> None:
        check_choice("target", self.target, Target)
        check_choice("measure", self.measure, Measure)
        check_choice("fill", self.fill, Fill)
        check_choice("normalisation", self.normalisation, Normalisation)
        if self.score is not None:
            check_choice("score", self.score, AttributionScore)
        removed_counts(self.fractions, 1)  # raises unless they rise within [0, 1]
        if not isinstance(self.cell, Integral) or isinstance(self.cell, bool) or self.cell < 1:
            raise ValueError(f"cell must be a whole number of at least 1, got {self.cell!r}")

    @property
    def end_points(self) -> tuple[float, float]:
        """First and last fraction."""
        return self.fractions[0], self.fractions[-1]

    def describe(self) -> str:
        """One line for a caption or a table, in words."""
        first, last = (f"{100 * fraction:g}" for fraction in self.end_points)
        value = {
            "accuracy": "correct",
            "probability": "probability of the class",
            "label_probability": "mean probability of an image's labels",
        }[self.measure]
        kind = {None: "", True: "signed ", False: "magnitude of "}[self.signed]
        whose = f"the {self.target} class' "
        if self.measure == "label_probability":
            whose = "the sum of the " + ("image's labels' " if self.target == "label" else "predicted labels' ")
        of = "" if self.score is None else f" of {whose}{self.score.replace('_', '-')}"
        cells = "" if self.cell == 1 else f"cells of {self.cell}x{self.cell} pixels, "
        area = "trapezoid" if self.normalisation == "none" else "trapezoid divided by its span"
        return (
            f"{value} in percent ({self.target}), {cells}most salient first by {kind}{self.attribution}{of}, "
            f"{self.fill} fill, {first} to {last} % in {len(self.fractions) - 1} steps, {area}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`, with what is the same in every convention written out."""
        return {
            **dataclasses.asdict(self),
            "fractions": list(self.fractions),
            "order": "most_salient_first",
            "end_points": list(self.end_points),
            "unit": "percent",
            "area": "trapezoid",
            "description": self.describe(),
        }


DEFAULT = Convention()
# The paper's tables: magnitude of the log-probability's gradient, 0 to 90 % in steps of ten. The paper does not say
# whether its area is divided by the distance of the end points, 0.9. Here it is not; `normalisation="span"` divides it.
PAPER = Convention(score="log_prob", fractions=even_fractions(9, 0.9))

PRESETS = {"default": DEFAULT, "paper": PAPER}


def resolve_convention(
    convention: Convention | str,
    attribution: str | Callable[..., Any] | None = None,
    steps: int | None = None,
    fill: Fill | None = None,
    cell: int | None = None,
    is_multi_label: bool = False,
) -> Convention:
    """A preset by name, or a convention, with single fields replaced.

    Args:
        convention: `"default"`, `"paper"`, or a `Convention`. The presets measure the accuracy, and of a multi-label
            model, which names no one class, the `"label_probability"`.
        attribution: the name of a method, or a function of the caller's, which goes by its own name and leaves `score`
            and `signed` open, as `"random"` and `"attention_rollout"` do; `None` leaves the convention's.
        steps: number of even steps between the convention's end points, at least 1; `None` leaves its fractions.
        fill: `None` leaves the convention's.
        cell: `None` leaves the convention's.
        is_multi_label: the model that is measured is one, see `models.logits.is_multi_label`.

    Raises:
        ValueError: an unknown preset, a value out of range, or a measure that is not one of the model's kind.
    """
    if isinstance(convention, str):
        if convention not in PRESETS:
            raise ValueError(f"convention must be 'default', 'paper' or a Convention, got {convention!r}")
        convention = PRESETS[convention]
        if is_multi_label:
            convention = dataclasses.replace(convention, measure="label_probability")
    if is_multi_label != (convention.measure == "label_probability"):
        kind = "a multi-label model" if is_multi_label else "a model of exclusive classes"
        expected = "'label_probability'" if is_multi_label else "'accuracy' or 'probability'"
        raise ValueError(f"measure must be {expected} for {kind}, got {convention.measure!r}")
    if callable(attribution):
        name = getattr(attribution, "__name__", type(attribution).__name__)
        convention = dataclasses.replace(convention, attribution=name, score=None, signed=None)
    elif attribution in WITHOUT_SCORE:
        convention = dataclasses.replace(convention, attribution=attribution, score=None, signed=None)
    elif attribution is not None:
        convention = dataclasses.replace(convention, attribution=attribution)
    if steps is not None:
        first, last = convention.end_points
        convention = dataclasses.replace(convention, fractions=even_fractions(steps, last, first))
    if fill is not None:
        convention = dataclasses.replace(convention, fill=fill)
    if cell is not None:
        convention = dataclasses.replace(convention, cell=cell)
    return convention
