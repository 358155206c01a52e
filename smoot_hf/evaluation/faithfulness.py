"""Faithfulness of a classifier's saliency: deletion and insertion over a whole data set (the paper's tables, Fig. 3).

Any checkpoint can be judged: nothing here knows how the model was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional import mean_average_precision
from ..functional.perturbation import (
    area_under_curve,
    deletion_outputs,
    has_prediction,
    insertion_outputs,
    measure_outputs,
)
from ..functional.removal import Fill, removed_counts
from ..models.logits import LogitsModel, is_multi_label
from ..models.state import model_device, untouched
from .attributions import Method
from .convention import Convention, resolve_convention
from .image_identity import ImageIdentity
from .intervals import mean_interval
from .ranked_batches import (
    AttributionFunction,
    Collator,
    NothingToMeasureError,
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
        mean_average_precision: float64 (S+1,), of a multi-label model: what is left of `Faithfulness`'s. It belongs to
            the images as a whole, so that no image has a value and the area has no interval. `None` for other models.
        mean_average_precision_auc: the area under it, by the convention of `auc`.
    """

    values: Tensor
    sample_auc: Tensor
    interval: tuple[float, float] | None
    nan_predictions: int = 0
    mean_average_precision: Tensor | None = None
    mean_average_precision_auc: float | None = None

    @property
    def auc(self) -> float:
        """Area under the curve."""
        return float(self.sample_auc.mean())

    def to_dict(self) -> dict[str, Any]:
        """Curve, area and interval as plain values; the images' own areas are left out."""
        plain = {
            "values": self.values.tolist(),
            "auc": self.auc,
            "interval": self.interval and list(self.interval),
            "nan_predictions": self.nan_predictions,
        }
        if self.mean_average_precision is not None:
            plain["mean_average_precision"] = self.mean_average_precision.tolist()
            plain["mean_average_precision_auc"] = self.mean_average_precision_auc
        return plain


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What `evaluate_faithfulness` found; every value but `fractions` is in percent.

    Attributes:
        convention: how it was measured.
        accuracy: of the unmasked images against their labels, over all images, the skipped ones included. A model whose
            outputs for an image hold a NaN is wrong about it. Of a multi-label model it is the subset accuracy: the
            share of images of which all labels are predicted, by an output above one half, and no other.
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
        mean_average_precision: of a multi-label model on the unmasked images, over all of them, see
            `functional.mean_average_precision`; `None` for other models.
        unlabelled: images left out because they have none of a multi-label model's labels, whose probability could be
            followed. They count in every mean average precision, where their outputs should rank below the others.
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
    mean_average_precision: float | None = None
    unlabelled: int = 0

    @property
    def is_multi_label(self) -> bool:
        """Whether it is of a multi-label model, whose curves are of the `"label_probability"`."""
        return self.convention.measure == "label_probability"

    @property
    def subset_accuracy(self) -> float | None:
        """Of a multi-label model the `accuracy` under the name that says what it is; `None` for other models."""
        return self.accuracy if self.is_multi_label else None

    @property
    def mean_average_precision_auc(self) -> float | None:
        """Area under the deletion curve of the mean average precision; lower is better. `None` for other models."""
        return self.deletion.mean_average_precision_auc

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
        of_labels = {
            "subset_accuracy": self.subset_accuracy,
            "mean_average_precision": self.mean_average_precision,
            "unlabelled": self.unlabelled,
        }
        return {
            "convention": self.convention.to_dict(),
            "n": self.n,
            "nan_skipped": self.nan_skipped,
            "flat_skipped": self.flat_skipped,
            "dataset_fingerprint": self.dataset_fingerprint,
            "predictions": self.predictions,
            "nan_predictions": self.nan_predictions,
            "seed": self.seed,
            **(of_labels if self.is_multi_label else {"accuracy": self.accuracy}),
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
            label) pairs as torchvision's, or whatever `data_collator` takes; see `data_batches`. The labels of a
            multi-label model (`config.problem_type="multi_label_classification"`) are rows (classes,) of 0 and 1.
        attribution: a method of `attributions.attribute`, or a function (model, images (B, C, H, W), target (B,)) ->
            (B, H, W) of any real type. Default: the convention's, the gradient. Of a multi-label model it explains the
            sum of the scores of the image's labels, of an image without any its highest output; a function gets these
            as a target (B, classes).
        steps: even steps between the convention's end points. Default: as the convention says.
        fill: what replaces a removed pixel. Default: as the convention says.
        convention: `"default"`: accuracy, magnitude of the logit's gradient, corner fill, 0 to 100 % by 10. `"paper"`:
            the log-probability's gradient and 0 to 90 % by 10. Or a `Convention` of your own. Of a multi-label model
            they measure the mean probability of the image's labels in the place of accuracy (`"label_probability"`):
            these are the curves and areas, and beside each stands that of the mean average precision.
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
            output has no logits, or of one class; labels that are text, floats or no classes of the model, or of a
            multi-label model not 0 or 1 for each class; a convention for models of the other kind; `steps` that is no
            whole number of at least 1; an attribution of another shape than (B, H, W), a cell that does not fit into
            the images, or an unknown choice.
        NothingToMeasureError: a ValueError: for every image the attribution is NaN or the same at all positions, or the
            model's outputs hold a NaN, or no image has a label of a multi-label model.
    """
    own = attribution if callable(attribution) else None
    convention = resolve_convention(convention, attribution, steps, fill, cell, is_multi_label(model))
    unknown = set(curves) - set(ALL_CURVES)
    if unknown:
        raise ValueError(f"curves must be among {ALL_CURVES}, got {sorted(unknown)}")
    resize = input_pipeline and input_pipeline.resize
    scorer, ranker = LogitsModel(model, resize), None if ranked_by is None else LogitsModel(ranked_by, resize)
    if ranker is not None and ranker.is_multi_label != scorer.is_multi_label:
        raise ValueError("model and ranked_by must both be multi-label models, or both have exclusive classes")
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
    """The curves (B, S+1) of one batch, with what must be known of each image; everything stays on the device.

    A mean average precision is of all images together: of a multi-label model the outputs (B, S+1, classes) are kept.
    """
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
        "is_correct": batch.is_correct,
        "has_prediction": batch.has_prediction,
        "is_nan": batch.is_nan,
        "is_flat": batch.is_flat,
    }

    def add(name: str, outputs: Tensor) -> None:
        part[name] = measure_outputs(outputs, batch.target, convention.measure)
        part[f"{name}_has_prediction"] = has_prediction(outputs)
        if score.is_multi_label:
            part[f"{name}_outputs"] = outputs

    if score.is_multi_label:
        part |= {"labels": batch.labels, "outputs": batch.outputs}
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
    is_used = is_ranked(columns["is_nan"], columns["is_flat"], convention)
    check_predictions(columns["has_prediction"][is_used])
    keep, labels = _followed(is_used, columns, convention), columns.get("labels")
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
            curve = Curve(values.mean(dim=0), areas, mean_interval(areas, bounds), without_prediction)
            if labels is not None:
                precision = _precision(columns[f"{name}_outputs"][is_used], labels[is_used])
                area = float(area_under_curve(fractions, precision)) / span
                curve = replace(curve, mean_average_precision=precision, mean_average_precision_auc=area)
            measured[name] = curve
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
        mean_average_precision=None if labels is None else float(_precision(columns["outputs"][:, None], labels)),
        unlabelled=int(is_used.sum()) - n,
        **measured,  # type: ignore[arg-type]  # deletion is always measured
    )
    warn_of_nan_predictions(found.nan_predictions, found.predictions)
    return found


def _followed(is_used: Tensor, columns: dict[str, Tensor], convention: Convention) -> Tensor:
    """Which of the images that are used, bool (n,), have a target whose value can be followed.

    Raises:
        NothingToMeasureError: no image has any label of a multi-label model.
    """
    if "labels" not in columns:
        return is_used
    is_labelled = is_used & (columns["labels"] > 0).any(dim=1)
    if not bool(is_labelled.any()):
        raise NothingToMeasureError(f"none of the {int(is_used.sum())} images that can be measured has a label")
    return is_labelled if convention.target == "label" else is_used


def _precision(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean average precision in percent at every point, float64 (S+1,), of outputs (n, S+1, classes).

    Outputs that predict nothing count as the lowest for every label.
    """
    outputs = outputs.masked_fill(~has_prediction(outputs)[..., None], -torch.inf)
    return 100 * mean_average_precision(outputs.transpose(0, 1), labels)


def _largest_area(fractions: Tensor, convention: Convention) -> float:
    """What `Faithfulness.largest_auc` gives."""
    return 100.0 if convention.normalisation == "span" else 100 * float(fractions[-1] - fractions[0])
