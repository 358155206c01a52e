"""Localisation over a data set: how much of a classifier's saliency lies on evidence that is known.

Any checkpoint can be judged, and nothing is removed from the images. The evidence is a mask per image: where a planted
object stands (`smoot_hf.data.planted_evidence`), a segmentation, or the boxes of a detection set drawn as a mask.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from ..functional import counter_uniform
from ..functional.localisation import (
    evidence_share,
    pointing_game,
    rank_accuracy,
    relevance_mass,
    roc_auc,
    top_outside,
)
from ..models.logits import LogitsModel, is_multi_label
from ..models.state import model_device, untouched
from .attributions import Method
from .comparison import PairedDifference
from .convention import resolve_convention
from .image_identity import ImageIdentity
from .intervals import mean_interval
from .ranked_batches import (
    AttributionFunction,
    Collator,
    DataBatch,
    NothingToMeasureError,
    RankedBatch,
    autocast,
    check_dataset,
    data_batches,
    rank_batch,
)

logger = logging.get_logger(__name__)

# Keeps the control's random map apart from the noise of a measurement of the same seed.
_CONTROL_STREAM = 2
_PERCENT = (0.0, 100.0)

# The scores that `Localisation` holds by name, beside `outside`.
MEASURES = {
    "relevance_mass": relevance_mass,
    "rank_accuracy": rank_accuracy,
    "pointing_game": pointing_game,
    "roc_auc": roc_auc,
}


@dataclass(frozen=True, eq=False)
class Score:
    """One localisation score over a data set, in percent.

    Attributes:
        sample_values: float64 (n,), one per image; of a multi-label model one for each label of each image.
        sample_chance: float64 (n,), what a map that knows nothing of the evidence scores in expectation, exactly.
        sample_control: float64 (n,), what a random map of each image scored.
        interval: 95 % interval of `value` over the images, see `intervals.mean_interval`; `None` for a single image and
            for values that are all the same, short of 0 and of 100. Several labels of one image are taken as images
            of their own, although they are not independent: it is too narrow where they agree.
    """

    sample_values: Tensor
    sample_chance: Tensor
    sample_control: Tensor
    interval: tuple[float, float] | None

    @property
    def value(self) -> float:
        """Mean over the images."""
        return float(self.sample_values.mean())

    @property
    def chance(self) -> float:
        """Chance level: the exact mean over all permutations of each map's positions."""
        return float(self.sample_chance.mean())

    @property
    def control(self) -> float:
        """What random maps of these images scored; it differs from `chance` by the luck of the draw alone."""
        return float(self.sample_control.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the images' own are left out."""
        return {
            "value": self.value,
            "interval": self.interval and list(self.interval),
            "chance": self.chance,
            "control": self.control,
        }


@dataclass(frozen=True, eq=False)
class Localisation:
    """What `evaluate_localisation` found; scores and accuracy are in percent.

    Of a multi-label model "image" means an image with one of its labels: each pair has a map and evidence of its own.

    Attributes:
        relevance_mass: share of the positive attribution on the evidence; higher is better.
        rank_accuracy: share of the |E| highest positions on the evidence of size |E|; higher is better.
        pointing_game: share of the images whose highest position is on the evidence; higher is better.
        roc_auc: the map as a detector of the evidence; higher is better.
        outside: for each `top`, the share of that fraction of highest positions outside the evidence; lower is better.
        accuracy: over all images, whatever was left out of the scores. Of a multi-label model it is the recall: the
            share of the images' labels that are predicted, by an output above one half.
        n: images measured.
        incorrect: images left out because they are classified wrongly (`only_correct`), or their label not predicted.
        nan_skipped: images left out because their attribution holds a NaN or infinity.
        unmarked: images left out because their evidence is empty or the whole image, which no map can miss or hit.
        flat: images measured whose attribution has one value everywhere; they score their chance level.
        sample_idx: int64 (n,), rows of the images measured.
        description: the attribution, the images and the name of the evidence, in words.
        seed: of all randomness.
        image_size: (H, W) of the maps.
        dataset_fingerprint: identifies the images, see `image_identity.ImageIdentity`; two measurements with unlike
            ones are not compared.
        label_idx: int64 (n,), of a multi-label model: whose map and evidence it is; `None` for other models.
    """

    relevance_mass: Score
    rank_accuracy: Score
    pointing_game: Score
    roc_auc: Score
    outside: Mapping[float, Score]
    accuracy: float
    n: int
    incorrect: int
    nan_skipped: int
    unmarked: int
    flat: int
    sample_idx: Tensor
    description: str
    seed: int
    image_size: tuple[int, int]
    dataset_fingerprint: str
    label_idx: Tensor | None = None

    @property
    def recall(self) -> float | None:
        """Of a multi-label model the `accuracy` under the name that says what it is; `None` for other models."""
        return None if self.label_idx is None else self.accuracy

    @property
    def scores(self) -> dict[str, Score]:
        """All scores by name; the share of the top 10 % outside the evidence is `"outside_0.1"`."""
        named = {name: getattr(self, name) for name in MEASURES}
        return named | {f"outside_{top:g}": score for top, score in self.outside.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`."""
        counts = {name: getattr(self, name) for name in ("n", "incorrect", "nan_skipped", "unmarked", "flat", "seed")}
        scores = {name: score.to_dict() for name, score in self.scores.items()}
        return {
            "description": self.description,
            "dataset_fingerprint": self.dataset_fingerprint,
            "image_size": list(self.image_size),
            **({"accuracy": self.accuracy} if self.recall is None else {"recall": self.recall}),
            **counts,
            "scores": scores,
        }


def evaluate_localisation(
    model: nn.Module,
    dataset: Any,
    attribution: Method | AttributionFunction | None = None,
    *,
    evidence: str = "evidence",
    top: Sequence[float] = (0.025, 0.1, 0.3),
    only_correct: bool = True,
    input_pipeline: Any = None,
    data_collator: Collator | None = None,
    label_name: str | None = None,
    batch_size: int = 256,
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Localisation:
    """Measure where a model's attributions of the label lie, against the evidence that the data set marks.

    Of a multi-label model every label of an image is measured by itself: the map of that label alone, against the
    evidence of that label. The scores are means over these pairs of an image and one of its labels, and images without
    any label have none.

    One pass over the data; each image costs the attribution alone. Beside every score stands its exact chance level,
    and what a random map of the same images scored. The model runs in eval mode; its flags and gradients and the global
    random states are left as they were found, also when an error is raised.

    Args:
        model: any image classifier: of `transformers`, timm's wrapper, or a module that returns logits.
        dataset: map-style, with rows of `pixel_values` (C, H, W), `labels` (or `label`), and a bool mask (H, W), `True`
            where the evidence lies, at the resolution of the pixel values. For a multi-label model the labels are rows
            (classes,) of 0 and 1, and the mask is (classes, H, W), of which the labels of the image alone are read.
        attribution: a method of `attributions.attribute`, or a function (model, images (B, C, H, W), target (B,)) ->
            (B, H, W). Default: the magnitude of the gradient of the label's logit.
        evidence: name of the mask in the rows.
        top: fractions of the positions, in (0, 1], whose share outside the evidence is measured.
        only_correct: leave out images that the model classifies wrongly: of those nobody knows where evidence for the
            answer would lie. Of a multi-label model: pairs whose label is not predicted. `compare_localisation` and
            `on_shared_images` go on to those that all models get right.
        input_pipeline: normalises uint8 pixels and resizes after the attribution's leaf, which lives at native
            resolution; `None` where the data come normalised and at the model's size.
        data_collator: makes a batch of a list of rows, as in `evaluate_faithfulness`; the evidence is taken from the
            rows themselves. `None`: the rows are stacked.
        label_name: key of the labels; `None`: `labels` or `label`.
        batch_size: images per forward pass.
        autocast_dtype: for example `torch.bfloat16`; `None` runs in the model's own precision.
        seed: of the random maps and the noise of attributions.

    Returns:
        The scores with intervals, chance levels and controls, and how many images were left out for what reason.

    Raises:
        ValueError: an empty data set, rows without the mask, a mask that is not bool (H, W), or (classes, H, W), labels
            that are no classes of the model, or an unknown choice.
        NothingToMeasureError: a ValueError: no image is left to measure, or the attribution is flat in every image.
    """
    check_dataset(dataset)
    own = attribution if callable(attribution) else None
    convention = resolve_convention("default", attribution, is_multi_label=is_multi_label(model))
    for fraction in top:
        if not 0 < fraction <= 1:
            raise ValueError(f"top must hold fractions in (0, 1], got {list(top)}")
    scorer = LogitsModel(model, input_pipeline and input_pipeline.resize)
    marked = _WithEvidence(dataset, evidence, 3 if scorer.is_multi_label else 2)
    identity, image_size = ImageIdentity(dataset), (0, 0)
    parts: list[dict[str, Tensor]] = []
    with untouched(model), autocast(model_device(model), autocast_dtype):
        for batch in data_batches(
            marked,
            model,
            input_pipeline=input_pipeline,
            data_collator=data_collator,
            label_name=label_name,
            batch_size=batch_size,
            identity=identity,
        ):
            mask = marked.last_evidence.to(batch.images.device)
            image_size = (batch.images.shape[2], batch.images.shape[3])
            expected = (*batch.labels.shape[1:], *image_size)
            if mask.shape != (len(batch.labels), *expected):
                axes = "(classes, H, W)" if scorer.is_multi_label else "(H, W)"
                raise ValueError(
                    f"{evidence!r} must be {axes} = {expected} like the labels and the pixel values, got "
                    f"{tuple(mask.shape[1:])}"
                )
            for one, on in _by_label(batch, mask, batch_size) if scorer.is_multi_label else [(batch, mask)]:
                parts.append(_measure(rank_batch(scorer, one, own, convention, seed, batch_size), on, top, seed))
    if not parts:
        raise NothingToMeasureError(f"none of the {len(dataset)} images has a label whose map could be measured")
    columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    kind = {None: "", True: "signed ", False: "magnitude of "}[convention.signed]
    of = "" if convention.score is None else f" of the label's {convention.score}"
    images = "correctly classified images" if only_correct else "all images"
    if scorer.is_multi_label:
        images = "each label" + (" that is predicted" if only_correct else "") + " of each image"
    description = f"{kind}{convention.attribution}{of}, {images}, evidence in {evidence!r}"
    return _collect(columns, top, only_correct, description, seed, image_size, identity.fingerprint)


class _WithEvidence:
    """A data set that is fetched once, batch by batch, and whose evidence masks of the last batch are kept."""

    def __init__(self, dataset: Any, name: str, dims: int) -> None:
        self.dataset = dataset
        self.name = name
        # Of a mask: (H, W), or (classes, H, W).
        self.dims = dims
        self.last_evidence = torch.empty(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> Any:
        dataset, name = self.dataset, self.name
        shape = "(H, W)" if self.dims == 2 else "(classes, H, W) for a multi-label model"
        has_batches = callable(getattr(dataset, "__getitems__", None))
        fetched = dataset.__getitems__(rows) if has_batches else [dataset[row] for row in rows]
        for row in [fetched] if isinstance(fetched, Mapping) else fetched:
            if not isinstance(row, Mapping) or name not in row:
                found = sorted(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
                raise ValueError(f"dataset rows must be dicts that hold the evidence mask {name!r}, got {found}")
        masks = fetched[name] if isinstance(fetched, Mapping) else [row[name] for row in fetched]
        try:
            masks = [torch.as_tensor(mask) for mask in masks]
        except (RuntimeError, TypeError, ValueError) as error:
            kinds = {type(mask).__name__ for mask in masks}
            raise ValueError(
                f"{name!r} must be bool tensors or arrays {shape}, got {', '.join(sorted(kinds))}"
            ) from error
        kinds = {f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}" for mask in masks}
        if len(kinds) > 1 or masks[0].dtype != torch.bool or masks[0].ndim != self.dims:
            raise ValueError(f"{name!r} must be a bool mask {shape} of one size in every row, got {sorted(kinds)}")
        self.last_evidence = torch.stack(masks)
        return fetched


def _by_label(batch: DataBatch, evidence: Tensor, batch_size: int) -> Iterator[tuple[DataBatch, Tensor]]:
    """Every image once for each of its labels, with that label alone and its evidence (P, H, W), in order."""
    for pairs in batch.labels.nonzero().split(batch_size):
        rows, label = pairs.unbind(dim=1)
        alone = F.one_hot(label, batch.labels.shape[1])
        if len(pairs):
            yield DataBatch(batch.images[rows], alone, batch.sample_idx[rows]), evidence[rows, label]


def _measure(batch: RankedBatch, evidence: Tensor, top: Sequence[float], seed: int) -> dict[str, Tensor]:
    """Every score of every image of a batch, and of its random map; everything stays on the device."""
    height, width = batch.attribution.shape[1:]
    control = counter_uniform(seed, _CONTROL_STREAM, batch.sample_idx, (height, width))
    part = {
        "sample_idx": batch.sample_idx,
        "share": evidence_share(evidence),
        "is_correct": batch.is_correct,
        "is_finite": batch.attribution.isfinite().flatten(1).all(dim=1),
        "is_flat": batch.is_flat,
    }
    if batch.labels.ndim == 2:
        label = batch.labels.argmax(dim=1)
        is_predicted = batch.outputs.gather(1, label[:, None])[:, 0] > 0
        part |= {"label_idx": label, "is_correct": is_predicted & batch.has_prediction}
    for kind, values in (("", batch.attribution), ("control ", control)):
        part |= {f"{kind}{name}": measure(values, evidence) for name, measure in MEASURES.items()}
        part |= {f"{kind}outside {fraction}": top_outside(values, evidence, fraction) for fraction in top}
    return part


def _collect(
    columns: Mapping[str, Tensor],
    top: Sequence[float],
    only_correct: bool,
    description: str,
    seed: int,
    image_size: tuple[int, int],
    fingerprint: str,
) -> Localisation:
    """The scores over the images that count, and how many do not for what reason (the first that applies)."""
    is_wrong = ~columns["is_correct"] & only_correct
    is_nan = ~columns["is_finite"] & ~is_wrong
    is_unmarked = ((columns["share"] == 0) | (columns["share"] == 1)) & ~is_wrong & ~is_nan
    keep = ~(is_wrong | is_nan | is_unmarked)
    counts = {"incorrect": int(is_wrong.sum()), "nan_skipped": int(is_nan.sum()), "unmarked": int(is_unmarked.sum())}
    left_out = ", ".join(f"{count} {name}" for name, count in counts.items())
    if not bool(keep.any()):
        raise NothingToMeasureError(f"no image is left to measure of {len(keep)}: {left_out}")
    flat = int(columns["is_flat"][keep].sum())
    if flat == int(keep.sum()):
        raise NothingToMeasureError(
            "the attribution has one value at all positions in every one of the images, and points nowhere: does the "
            "model round its input, or is it dead?"
        )
    if counts["nan_skipped"] or counts["unmarked"] or flat:
        logger.warning(f"of {len(keep)} images: {left_out}, left out; {flat} with a flat map, measured at chance level")
    share = columns["share"]

    def score(name: str, chance: Tensor) -> Score:
        values, chances, control = (
            100 * column[keep].double() for column in (columns[name], chance, columns[f"control {name}"])
        )
        return Score(values, chances, control, mean_interval(values, _PERCENT))

    chances = dict.fromkeys(MEASURES, share) | {"roc_auc": torch.full_like(share, 0.5)}
    return Localisation(
        **{name: score(name, chance) for name, chance in chances.items()},  # type: ignore[arg-type]
        outside={fraction: score(f"outside {fraction}", 1 - share) for fraction in top},
        accuracy=100 * float(columns["is_correct"].double().mean()),
        n=int(keep.sum()),
        flat=flat,
        sample_idx=columns["sample_idx"][keep],
        description=description,
        seed=seed,
        image_size=image_size,
        dataset_fingerprint=fingerprint,
        label_idx=columns["label_idx"][keep] if "label_idx" in columns else None,
        **counts,  # type: ignore[arg-type]  # incorrect, nan_skipped, unmarked
    )


def compare_localisation(a: Localisation, b: Localisation, score: str = "outside_0.1") -> PairedDifference:
    """Compare two models image by image, over the images that both measured (those that both get right).

    The images are paired by the data set's fingerprint and the row.

    Args:
        a: the first, measured with `evaluate_localisation`.
        b: the second, measured on the same data set in the same way.
        score: a name of `Localisation.scores`.

    Returns:
        The mean difference a - b in percent with its interval over the images.

    Raises:
        ValueError: measured in different ways or on different data sets, a score that was not measured, or no image in
            common.
    """
    a, b = on_shared_images(a, b)
    for name, measured in (("a", a), ("b", b)):
        if score not in measured.scores:
            raise ValueError(f"score must be one of {', '.join(map(repr, measured.scores))} of {name}, got {score!r}")
    difference = a.scores[score].sample_values - b.scores[score].sample_values
    return PairedDifference(
        difference=float(difference.mean()),
        interval=mean_interval(difference, (-100.0, 100.0)),
        lower=100 * float((difference < 0).double().mean()),
        higher=100 * float((difference > 0).double().mean()),
        n=len(difference),
    )


def on_shared_images(*measured: Localisation) -> list[Localisation]:
    """The same measurements, over the images that are in all of them: with `only_correct`, those all models get right.

    `accuracy` and the counts of what was left out stay those of each model's own measurement; chance levels and
    controls are those of the shared images.

    Args:
        *measured: at least one, all of the same data set, measured in the same way.

    Raises:
        ValueError: nothing given; different attributions, selections of images, data sets or image sizes.
        NothingToMeasureError: a ValueError: no image in common.
    """
    if not measured:
        raise ValueError("on_shared_images needs at least one measurement, got none")
    found = {f"{one.description} (seed {one.seed})" for one in measured}
    if len(found) > 1:
        raise ValueError(f"all must be measured in the same way, got {'; '.join(sorted(found))}")
    fingerprints = {one.dataset_fingerprint for one in measured}
    if len(fingerprints) > 1:
        raise ValueError(
            "all must be measured on the same data set (the same rows in the same order), got data sets with the "
            f"fingerprints {', '.join(sorted(fingerprints))}"
        )
    sizes = {one.image_size for one in measured}
    if len(sizes) > 1:
        raise ValueError(f"all must be measured on images of one size, got (H, W) of {sorted(sizes)}")
    shared = reduce(np.intersect1d, map(_keys, measured))
    if len(shared) == 0:
        raise NothingToMeasureError("the measurements have no image in common: there is none that all models get right")
    return [_selected(one, np.isin(_keys(one), shared)) for one in measured]


def _keys(measured: Localisation) -> np.ndarray:
    """Int64 (n,), unique: the rows, and where an image is measured for each of its labels the pairs."""
    rows = measured.sample_idx.numpy()
    return rows if measured.label_idx is None else rows << 32 | measured.label_idx.numpy()


def _selected(measured: Localisation, keep: np.ndarray) -> Localisation:
    """The measurement of some of its images, bool (n,)."""
    rows = torch.from_numpy(keep)

    def of_rows(score: Score) -> Score:
        values = score.sample_values[rows]
        return Score(values, score.sample_chance[rows], score.sample_control[rows], mean_interval(values, _PERCENT))

    return replace(
        measured,
        **{name: of_rows(getattr(measured, name)) for name in MEASURES},  # type: ignore[arg-type]
        outside={fraction: of_rows(score) for fraction, score in measured.outside.items()},
        n=int(rows.sum()),
        sample_idx=measured.sample_idx[rows],
        label_idx=None if measured.label_idx is None else measured.label_idx[rows],
    )
