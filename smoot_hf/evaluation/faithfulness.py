"""Faithfulness of a classifier's saliency: deletion and insertion over a whole data set (the paper's tables, Fig. 3).

Any checkpoint can be judged: nothing here knows how the model was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional.perturbation import (
    area_under_curve,
    deletion_outputs,
    has_prediction,
    insertion_outputs,
    measure_outputs,
)
from ..functional.removal import Fill, removed_counts
from ..models.logits import LogitsModel
from ..models.state import model_device, untouched
from .attributions import Method
from .convention import Convention, resolve_convention
from .image_identity import ImageIdentity
from .intervals import mean_interval
from .ranked_batches import (
    AttributionFunction,
    Collator,
    RankedBatch,
    autocast,
    check_predictions,
    data_batches,
    is_ranked,
    random_map,
    rank_batch,
    warn_of_nan_predictions,
)

# What can be measured beside the deletion curve.
FurtherCurve = Literal["insertion", "least_salient_first", "random"]
ALL_CURVES: tuple[FurtherCurve, ...] = ("insertion", "least_salient_first", "random")


@dataclass(frozen=True, eq=False)
class Curve:
    """One curve over a data set, in percent.

    Attributes:
        values: float64 (S+1,), the mean over the images.
        sample_auc: float64 (n,), the area under each image's own curve; their mean is `auc`.
        interval: 95 % interval of `auc` over the images, see `intervals.mean_interval`; `None` for a single image and
            for areas that are all the same, short of 0 and of the largest possible.
        nan_predictions: of the n * (S+1) outputs of the model behind the curve, those that hold a NaN or an infinity
            and so predict no class. They count as wrong: 0 % correct, and 0 % probability.
    """

    values: Tensor
    sample_auc: Tensor
    interval: tuple[float, float] | None
    nan_predictions: int = 0

    @property
    def auc(self) -> float:
        """Area under the curve."""
        return float(self.sample_auc.mean())

    def to_dict(self) -> dict[str, Any]:
        """Curve, area and interval as plain values; the images' own areas are left out."""
        return {
            "values": self.values.tolist(),
            "auc": self.auc,
            "interval": self.interval and list(self.interval),
            "nan_predictions": self.nan_predictions,
        }


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What `evaluate_faithfulness` found; every value but `fractions` is in percent.

    Attributes:
        convention: how it was measured.
        accuracy: of the unmasked images against their labels, over all images, the skipped ones included. A model whose
            outputs for an image hold a NaN is wrong about it.
        fractions: float64 (S+1,), the true fractions: removed (insertion: restored) positions of all positions, which
            are the H * W pixels, or the cells of the convention.
        deletion: most salient positions removed first; lower is better.
        insertion: most salient positions restored first; higher is better. `None` where it was not asked for.
        least_salient_first: least salient positions removed first; higher is better. `None` as above.
        random: positions removed in random order, the control; `None` as above.
        n: images measured.
        nan_skipped: images left out because their attribution holds a NaN.
        sample_idx: int64 (n,), rows of the images measured.
        seed: of all randomness.
        flat_skipped: images left out because their attribution has one value at all positions.
        dataset_fingerprint: identifies the images, see `image_identity.ImageIdentity`; two measurements with unlike
            ones are not compared. `None` where it is not known, as of a measurement of an older version.
    """

    convention: Convention
    accuracy: float
    fractions: Tensor
    deletion: Curve
    insertion: Curve | None
    least_salient_first: Curve | None
    random: Curve | None
    n: int
    nan_skipped: int
    sample_idx: Tensor
    seed: int
    flat_skipped: int = 0
    dataset_fingerprint: str | None = None

    @property
    def deletion_curve(self) -> Tensor:
        """(S+1,)."""
        return self.deletion.values

    @property
    def deletion_auc(self) -> float:
        """Area under the deletion curve; lower is better."""
        return self.deletion.auc

    @property
    def insertion_curve(self) -> Tensor | None:
        """(S+1,), or `None`."""
        return None if self.insertion is None else self.insertion.values

    @property
    def insertion_auc(self) -> float | None:
        """Area under the insertion curve; higher is better."""
        return None if self.insertion is None else self.insertion.auc

    @property
    def random_auc(self) -> float | None:
        """Area under the deletion curve of a random ranking. `deletion_auc` should be below it."""
        return None if self.random is None else self.random.auc

    @property
    def largest_auc(self) -> float:
        """Area under a curve that stays at 100 %: 100, or 100 times the span of the fractions, by the convention."""
        return _largest_area(self.fractions, self.convention)

    @property
    def gap(self) -> float | None:
        """Area of least salient first minus area of most salient first; higher is better, 0 is a random ranking."""
        if self.least_salient_first is None:
            return None
        return self.least_salient_first.auc - self.deletion.auc

    @property
    def gap_interval(self) -> tuple[float, float] | None:
        """95 % interval of `gap`, paired over the images."""
        if self.least_salient_first is None:
            return None
        largest = self.largest_auc
        return mean_interval(self.least_salient_first.sample_auc - self.deletion.sample_auc, (-largest, largest))

    @property
    def predictions(self) -> int:
        """Outputs of the model behind all the curves, one for each image and point."""
        return len(self._curves) * self.n * len(self.fractions)

    @property
    def nan_predictions(self) -> int:
        """Those of the outputs behind all the curves that hold a NaN or an infinity and count as wrong, see `Curve`."""
        return sum(curve.nan_predictions for curve in self._curves.values())

    @property
    def _curves(self) -> dict[str, Curve]:
        """Those that were measured, by name."""
        curves = {name: getattr(self, name) for name in ("deletion", *ALL_CURVES)}
        return {name: curve for name, curve in curves.items() if curve is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`, the convention among them."""
        return {
            "convention": self.convention.to_dict(),
            "n": self.n,
            "nan_skipped": self.nan_skipped,
            "flat_skipped": self.flat_skipped,
            "dataset_fingerprint": self.dataset_fingerprint,
            "predictions": self.predictions,
            "nan_predictions": self.nan_predictions,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "fractions": self.fractions.tolist(),
            "gap": self.gap,
            "gap_interval": self.gap_interval and list(self.gap_interval),
            **{name: curve.to_dict() for name, curve in self._curves.items()},
        }


def evaluate_faithfulness(
    model: nn.Module,
    dataset: Any,
    attribution: Method | AttributionFunction | None = None,
    steps: int | None = None,
    fill: Fill | None = None,
    *,
    convention: Convention | Literal["default", "paper"] = "default",
    cell: int | None = None,
    curves: Sequence[FurtherCurve] = ALL_CURVES,
    ranked_by: nn.Module | None = None,
    input_pipeline: Any = None,
    data_collator: Collator | None = None,
    label_name: str | None = None,
    batch_size: int = 256,
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Faithfulness:
    """Measure how faithful a model's attributions are, by removing and restoring pixels in the order that they give.

    One pass over the data. Each image costs the attribution, one unmasked forward pass (shared with the attribution, if
    that is the gradient) and, for every curve, one for each fraction in between; the fill alone is shared. The model
    runs in eval mode; its flags and gradients and the global random states are left as they were found, also when an
    error is raised.

    Args:
        model: any image classifier: of `transformers`, timm's wrapper, or a module that returns logits.
        dataset: map-style, with rows that are dicts of `pixel_values` (C, H, W) and `labels` (or `label`), or (image,
            label) pairs as torchvision's, or whatever `data_collator` takes; see `data_batches`.
        attribution: a method of `attributions.attribute`, or a function (model, images (B, C, H, W), target (B,)) ->
            (B, H, W) of any real type. Default: the convention's, the gradient.
        steps: even steps between the convention's end points. Default: as the convention says.
        fill: what replaces a removed pixel. Default: as the convention says.
        convention: `"default"`: accuracy, magnitude of the logit's gradient, corner fill, 0 to 100 % by 10. `"paper"`:
            the log-probability's gradient and 0 to 90 % by 10. Or a `Convention` of your own.
        cell: side in pixels of the cells that are removed and restored whole, in the order of the attribution summed
            over each; 16 removes the patches of a ViT/16. Fractions are of cells then. At most the shorter side of the
            images. Default: as the convention says, 1, which removes single pixels.
        curves: what to measure beside deletion.
        ranked_by: another model, whose attributions order the positions that `model` loses, see `referee_matrix`. It
            takes the same images, on the same device and in the same precision. `None`: the model's own.
        input_pipeline: normalises uint8 pixels and resizes after the mask, which acts at native resolution; `None`
            where the data come normalised and at the model's size.
        data_collator: makes a batch of a list of rows, as the one of a `Trainer` does: a dict with `pixel_values`
            (B, C, H, W) and labels (B,). What it normalises, resizes or reorders is what is measured. `None`: the rows
            are stacked.
        label_name: key of the labels; `None`: `labels` or `label`.
        batch_size: images per forward pass.
        autocast_dtype: for example `torch.bfloat16`; `None` runs in the model's own precision.
        seed: of the random ranking, the uniform fill and the noise of attributions.

    Returns:
        Curves, areas and their intervals, in percent, with the convention that they depend on.

    Raises:
        ValueError: an empty data set, or something else in its place (a `DataLoader`, a `DatasetDict`); a model whose
            output has no logits, or of one class; labels that are text, floats or no classes of the model; `steps` that
            is no whole number of at least 1; an attribution of another shape than (B, H, W), a cell that does not fit
            into the images, or an unknown choice.
        NothingToMeasureError: a ValueError: for every image the attribution is NaN or the same at all positions, or the
            model's outputs hold a NaN.
    """
    own = attribution if callable(attribution) else None
    convention = resolve_convention(convention, attribution, steps, fill, cell)
    unknown = set(curves) - set(ALL_CURVES)
    if unknown:
        raise ValueError(f"curves must be among {ALL_CURVES}, got {sorted(unknown)}")
    resize = input_pipeline and input_pipeline.resize
    scorer, ranker = LogitsModel(model, resize), None if ranked_by is None else LogitsModel(ranked_by, resize)
    parts: list[dict[str, Tensor]] = []
    positions, identity = 0, ImageIdentity(dataset)
    with untouched(model), untouched(ranked_by or model), autocast(model_device(model), autocast_dtype):
        for batch in data_batches(
            dataset,
            model,
            input_pipeline=input_pipeline,
            data_collator=data_collator,
            label_name=label_name,
            batch_size=batch_size,
            identity=identity,
        ):
            ranked = rank_batch(scorer, batch, own, convention, seed, batch_size, ranker)
            parts.append(_measure(scorer, ranked, convention, curves, batch_size, seed))
            positions = ranked.positions
    return _collect(parts, convention, positions, seed, identity.fingerprint)


def _measure(
    score: LogitsModel,
    batch: RankedBatch,
    convention: Convention,
    curves: Sequence[str],
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """The curves (B, S+1) of one batch, with what must be known of each image; everything stays on the device."""
    cell, positions = convention.cell, batch.positions
    known = {0: batch.outputs}
    if "insertion" in curves or convention.fractions[-1] == 1.0:
        with torch.no_grad():
            known[positions] = score(batch.fill.expand_as(batch.images))
    options: dict[str, Any] = {"cell": cell, "chunk_size": batch_size, "known": known}
    fixed = (convention.fractions, batch.fill)
    ranked = (score, batch.images, batch.attribution, *fixed)
    part = {
        "sample_idx": batch.sample_idx,
        "is_correct": measure_outputs(batch.outputs[:, None], batch.labels, "accuracy")[:, 0],
        "has_prediction": batch.has_prediction,
        "is_nan": batch.is_nan,
        "is_flat": batch.is_flat,
    }

    def add(name: str, outputs: Tensor) -> None:
        part[name] = measure_outputs(outputs, batch.target, convention.measure)
        part[f"{name}_has_prediction"] = has_prediction(outputs)

    add("deletion", deletion_outputs(*ranked, **options))
    if "insertion" in curves:
        add("insertion", insertion_outputs(*ranked, **options))
    if "least_salient_first" in curves:
        add("least_salient_first", deletion_outputs(*ranked, order="least_salient_first", **options))
    if "random" in curves:
        noise = random_map(seed, batch.sample_idx, batch.images.shape[2:], cell)
        add("random", deletion_outputs(score, batch.images, noise, *fixed, **options))
    return part


def _collect(
    parts: list[dict[str, Tensor]], convention: Convention, positions: int, seed: int, fingerprint: str
) -> Faithfulness:
    """Means and areas over the images whose attribution ranks the positions."""
    columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    keep = is_ranked(columns["is_nan"], columns["is_flat"], convention)
    check_predictions(columns["has_prediction"][keep])
    n = int(keep.sum())
    fractions = torch.tensor(removed_counts(convention.fractions, positions), dtype=torch.float64) / positions
    span = float(fractions[-1] - fractions[0]) if convention.normalisation == "span" else 1.0
    bounds = (0.0, _largest_area(fractions, convention))
    measured: dict[str, Curve | None] = dict.fromkeys(ALL_CURVES)
    for name in ("deletion", *ALL_CURVES):
        if name in columns:
            values = 100 * columns[name][keep].double()
            areas = area_under_curve(fractions, values) / span
            without_prediction = int((~columns[f"{name}_has_prediction"][keep]).sum())
            measured[name] = Curve(values.mean(dim=0), areas, mean_interval(areas, bounds), without_prediction)
    found = Faithfulness(
        convention=convention,
        accuracy=100 * float(columns["is_correct"].double().mean()),
        fractions=fractions,
        n=n,
        nan_skipped=int(columns["is_nan"].sum()),
        sample_idx=columns["sample_idx"][keep],
        seed=seed,
        flat_skipped=int(columns["is_flat"].sum()),
        dataset_fingerprint=fingerprint,
        **measured,  # type: ignore[arg-type]  # deletion is always measured
    )
    warn_of_nan_predictions(found.nan_predictions, found.predictions)
    return found


def _largest_area(fractions: Tensor, convention: Convention) -> float:
    """What `Faithfulness.largest_auc` gives."""
    return 100.0 if convention.normalisation == "span" else 100 * float(fractions[-1] - fractions[0])
