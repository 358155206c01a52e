"""Image classes I and II: images whose prediction masking only makes worse, and images that it helps (Figure 1)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional.perturbation import has_prediction, measure_outputs, perturbed_outputs
from ..functional.removal import Fill, removal_ranks, removed_counts
from ..models.logits import LogitsModel, refuse_multi_label
from ..models.state import model_device, untouched
from .attributions import Method
from .convention import Convention, resolve_convention
from .ranked_batches import (
    AttributionFunction,
    Collator,
    autocast,
    check_predictions,
    data_batches,
    is_ranked,
    rank_batch,
    warn_of_nan_predictions,
)


@dataclass(frozen=True, eq=False)
class ImageClasses:
    """How each image's prediction moves while its most salient positions are masked.

    An image is of class II where masking helps: at some masked fraction the probability of its target is, by more than
    `margin`, above that of the unmasked image *and* above `floor`. Else it is of class I.

    The paper tells the classes apart by eye and counts every rise; `is_raised` and `share_raised` do so. That reading
    also counts images that the model gets wrong, and whose probability only returns to chance once the whole image is
    masked. Masking has not helped there: the evidence for the wrong class is gone, and so is all other evidence.

    Attributes:
        fractions: float64 (S+1,), the true masked fractions, from 0.
        probability: float32 (n, S+1), probability of the target, in [0, 1].
        is_correct: bool (n, S+1), whether the target has the highest output.
        floor: float32 (n,), the probability of the target without an image: that for the fill alone, or one over the
            number of classes, whichever is higher.
        margin: the rise that counts, in [0, 1).
        sample_idx: int64 (n,), rows of the images.
        nan_skipped: images left out because their attribution holds a NaN.
        convention: how it was measured.
        flat_skipped: images left out because their attribution has one value at all positions.
        nan_predictions: of the n * (S+1) outputs of the model, those that hold a NaN or an infinity and so predict no
            class: they count as wrong, with a probability of 0.
    """

    fractions: Tensor
    probability: Tensor
    is_correct: Tensor
    floor: Tensor
    margin: float
    sample_idx: Tensor
    nan_skipped: int
    convention: Convention
    flat_skipped: int = 0
    nan_predictions: int = 0

    @property
    def gain(self) -> Tensor:
        """Highest probability under masking minus that of the unmasked image: (n,), in [-1, 1]."""
        return self.probability[:, 1:].amax(dim=1) - self.probability[:, 0]

    @property
    def is_helped(self) -> Tensor:
        """Bool (n, S+1): where the probability is above that of the unmasked image and above the floor."""
        start = torch.maximum(self.probability[:, 0], self.floor)
        return self.probability - start[:, None] > self.margin

    @property
    def is_class_two(self) -> Tensor:
        """Bool (n,): masking helps at some fraction."""
        return self.is_helped.any(dim=1)

    @property
    def is_raised(self) -> Tensor:
        """Bool (n,): the paper's reading, any rise by more than the margin, be it to the floor only."""
        return self.gain > self.margin

    @property
    def share(self) -> float:
        """Class II among the images, in percent."""
        return 100 * float(self.is_class_two.double().mean())

    @property
    def share_raised(self) -> float:
        """The same by the paper's reading, at least `share` (the paper: 16 for a CNN on CIFAR-10's test images)."""
        return 100 * float(self.is_raised.double().mean())

    @property
    def peak(self) -> Tensor:
        """Masked fraction at which the probability is highest, 0 where masking never raises it: float64 (n,)."""
        return self.fractions[self.probability.argmax(dim=1)]

    @property
    def share_of_early_peaks(self) -> float | None:
        """Class II images whose peak lies before half of the positions are masked, in percent of class II.

        `None` where there is no image of class II.
        """
        peaks = self.peak[self.is_class_two]
        return 100 * float((peaks < 0.5).double().mean()) if len(peaks) else None

    @property
    def share_recovered(self) -> float:
        """Images that are wrong unmasked and right at a masked fraction that helps, in percent of all.

        A model gives one and the same answer to all images of which nothing is left: being right then does not count.
        """
        return 100 * float((~self.is_correct[:, 0] & (self.is_correct & self.is_helped).any(dim=1)).double().mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`; the images' own curves are left out."""
        by_class = {"class_one": ~self.is_class_two, "class_two": self.is_class_two}
        return {
            "convention": self.convention.to_dict(),
            "n": len(self.probability),
            "nan_skipped": self.nan_skipped,
            "flat_skipped": self.flat_skipped,
            "predictions": self.probability.numel(),
            "nan_predictions": self.nan_predictions,
            "margin": self.margin,
            "share": self.share,
            "share_raised": self.share_raised,
            "share_of_early_peaks": self.share_of_early_peaks,
            "share_recovered": self.share_recovered,
            "fractions": self.fractions.tolist(),
            "mean_probability": {
                name: self.probability[chosen].double().mean(dim=0).tolist() if bool(chosen.any()) else None
                for name, chosen in by_class.items()
            },
        }


def find_image_classes(
    model: nn.Module,
    dataset: Any,
    attribution: Method | AttributionFunction | None = None,
    steps: int | None = None,
    fill: Fill | None = None,
    *,
    margin: float = 0.01,
    convention: Convention | Literal["default", "paper"] = "default",
    cell: int | None = None,
    input_pipeline: Any = None,
    data_collator: Collator | None = None,
    label_name: str | None = None,
    batch_size: int = 256,
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> ImageClasses:
    """Mask the highest gradients first and follow each image's probability and correctness.

    Args:
        model: as in `evaluate_faithfulness`, like every argument that is not listed here.
        dataset: the images.
        attribution: what ranks the positions.
        steps: even steps between the convention's end points.
        fill: what replaces a masked pixel.
        margin: rise of the probability that counts, in [0, 1). The default, one percentage point, keeps changes in the
            last digits of a certain prediction out.
        convention: preset or `Convention`; its `measure` is not used, both curves are kept.
        cell: side in pixels of the cells that are masked whole.
        input_pipeline: normalises, and resizes after the mask.
        data_collator: makes a batch of a list of rows.
        label_name: key of the labels; `None`: `labels` or `label`.
        batch_size: images per forward pass.
        autocast_dtype: `None` runs in the model's own precision.
        seed: of the random ranking, the uniform fill and the noise of attributions.

    Returns:
        Every image's curves, and the share of class II.

    Raises:
        ValueError: as `evaluate_faithfulness`; a margin outside [0, 1); fractions that do not start at 0; a multi-label
            model, whose images have no one probability that could rise.
    """
    refuse_multi_label(model, "image classes I and II are told apart by")
    own = attribution if callable(attribution) else None
    convention = resolve_convention(convention, attribution, steps, fill, cell)
    if not 0 <= margin < 1:
        raise ValueError(f"margin must lie in [0, 1), got {margin}")
    if convention.fractions[0] != 0:
        raise ValueError(f"fractions must start at 0, the unmasked image, got {convention.fractions}")
    scorer = LogitsModel(model, input_pipeline and input_pipeline.resize)
    probability, is_correct, predicts, floor, sample_idx, is_nan, is_flat = [], [], [], [], [], [], []
    with untouched(model), autocast(model_device(model), autocast_dtype):
        for batch in data_batches(
            dataset,
            model,
            input_pipeline=input_pipeline,
            data_collator=data_collator,
            label_name=label_name,
            batch_size=batch_size,
        ):
            ranked = rank_batch(scorer, batch, own, convention, seed, batch_size)
            positions = ranked.positions
            counts = removed_counts(convention.fractions, positions)
            with torch.no_grad():
                nothing = scorer(ranked.fill.expand_as(batch.images))
            ranks = removal_ranks(ranked.attribution, cell=convention.cell)
            known = {0: ranked.outputs, positions: nothing}
            outputs = perturbed_outputs(scorer, batch.images, ranked.fill, ranks, counts, batch_size, known)
            probability.append(measure_outputs(outputs, ranked.target, "probability"))
            is_correct.append(measure_outputs(outputs, ranked.target, "accuracy").bool())
            predicts.append(has_prediction(outputs))
            without = measure_outputs(nothing[:, None], ranked.target, "probability")[:, 0]
            floor.append(without.clamp_min(1 / nothing.shape[1]))
            sample_idx.append(batch.sample_idx)
            is_nan.append(ranked.is_nan)
            is_flat.append(ranked.is_flat)
    nan, flat = torch.cat(is_nan), torch.cat(is_flat)
    keep = is_ranked(nan, flat, convention)
    has_predictions = torch.cat(predicts).cpu()[keep]
    check_predictions(has_predictions[:, 0])
    nan_predictions = int((~has_predictions).sum())
    warn_of_nan_predictions(nan_predictions, has_predictions.numel())
    return ImageClasses(
        fractions=torch.tensor(counts, dtype=torch.float64) / positions,
        probability=torch.cat(probability).cpu()[keep],
        is_correct=torch.cat(is_correct).cpu()[keep],
        floor=torch.cat(floor).cpu()[keep],
        margin=margin,
        sample_idx=torch.cat(sample_idx).cpu()[keep],
        nan_skipped=int(nan.sum()),
        convention=convention,
        flat_skipped=int(flat.sum()),
        nan_predictions=nan_predictions,
    )
