"""A checkpoint, evaluated: every measurement saved as it is made, then results.json and table, then the figures."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from ..data.decoded_images import DecodedImages
from ..evaluation import Convention, Faithfulness, Localisation, evaluate_faithfulness, evaluate_localisation
from ..evaluation.attributions import Method
from ..evaluation.convention import resolve_convention
from ..evaluation.faithfulness import Curve
from ..evaluation.image_classes import ImageClasses, find_image_classes
from ..evaluation.localisation import Score
from ..evaluation.results import (
    Measurement,
    Results,
    Row,
    describe_environment,
    faithfulness_row,
    left_out_notes,
    localisation_row,
)
from ..evaluation.sanity_check import WeightRandomization, randomized_weights_correlation
from ..functional.removal import Fill
from .checkpoint import Checkpoint, read_pipeline
from .figures import Example, draw_curves, draw_image_classes, try_to_draw
from .run import write_whole
from .training_run import load_images

# What a file may hold beside tensors and plain values; anything else in it is refused, and none of its code runs.
_CLASSES = [Convention, Curve, Faithfulness, ImageClasses, Localisation, Score, WeightRandomization]

COLUMNS = {
    "accuracy": "Accuracy",
    "deletion_auc": "AUC (lower is better)",
    "random_auc": "AUC, random order",
    "insertion_auc": "Insertion AUC (higher is better)",
    "gap": "Gap (higher is better)",
}
# Of several labels for an image.
SEVERAL_COLUMNS = {
    "mean_average_precision": "Mean average precision",
    "subset_accuracy": "All labels right",
    **{name: title for name, title in COLUMNS.items() if name != "accuracy"},
    "mean_average_precision_auc": "AUC of mean average precision",
}
CLASS_COLUMNS = {
    "class_two": "Class II (%)",
    "class_two_random": "Class II, random order (%)",
    "raised": "any rise, the paper's reading (%)",
    "early_peaks": "of class II, peak before 50 % masked (%)",
    "recovered": "wrong, right when masked (%)",
    "random_weights": "Rank correlation with random weights",
}
LOCALISATION_COLUMNS = {
    "outside_0.025": "Top 2.5 % outside the evidence (lower is better)",
    "outside_0.1": "Top 10 % outside",
    "outside_0.3": "Top 30 % outside",
    "relevance_mass": "Relevance mass on the evidence (higher is better)",
    "rank_accuracy": "Rank accuracy (higher is better)",
    "pointing_game": "Pointing game (higher is better)",
    "roc_auc": "ROC AUC (higher is better)",
}
# metric -> its curve in the details of a row
_CURVES = {"deletion_auc": "deletion", "random_auc": "random", "insertion_auc": "insertion"}
_SANITY_IMAGES = 500

Measured = TypeVar("Measured")


class SavedMeasurements:
    """The measurements of one checkpoint on one data set.

    A file is named after a digest of everything that its numbers depend on: a measurement of another checkpoint, of
    other images, by another convention or by another version of the software is never taken for this one.

    Args:
        folder: where the files are; is made.
        identity: what holds for all of the measurements, as JSON values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = dict(identity)
        folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, kind: str, settings: Mapping[str, Any]) -> Path:
        """The file of a measurement, whether it is there or not."""
        return self.folder / f"{kind}-{_digest(self._whole_identity(kind, settings))[:16]}.pt"

    def get(
        self, kind: str, settings: Mapping[str, Any], measure: Callable[[], Measured], expected: type[Measured]
    ) -> Measured:
        """A measurement that was saved before, or one that is made and saved now.

        Args:
            kind: what is measured, a part of the file's name.
            settings: what tells it from the others of its kind, as JSON values.
            measure: makes it.
            expected: its class.

        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        path, identity = self.path_of(kind, settings), self._whole_identity(kind, settings)
        if path.is_file():
            return _read(path, identity, expected)
        measured = measure()
        # Under its own name only once it is whole: whoever is killed here leaves no part of a measurement.
        unfinished = path.with_suffix(".tmp")
        torch.save({"identity": identity, "measured": measured}, unfinished)
        os.replace(unfinished, path)
        return measured

    def _whole_identity(self, kind: str, settings: Mapping[str, Any]) -> str:
        return json.dumps({**self.identity, "kind": kind, "settings": dict(settings)}, sort_keys=True)


def identify(checkpoint: Checkpoint, images: DecodedImages) -> dict[str, Any]:
    """What tells a checkpoint and its evaluation images from any other, wherever they lie."""
    return {
        "model": model_digest(checkpoint.model),
        "pipeline": repr(checkpoint.pipeline),
        "images": [len(images), images.fingerprint, hashlib.sha256(images.labels.tobytes()).hexdigest()],
    }


def model_digest(model: torch.nn.Module) -> str:
    """Of a model's class, configuration and every weight and buffer, 64 hexadecimal digits."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(f"{type(model).__qualname__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, identity: str, expected: type[Measured]) -> Measured:
    try:
        with torch.serialization.safe_globals(_CLASSES):
            content = torch.load(path, weights_only=True)
        if content["identity"] == identity and isinstance(content["measured"], expected):
            return content["measured"]
    except Exception as error:  # of a damaged file torch raises whatever its reader meets
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}): remove it, to measure that once more") from error
    raise ValueError(f"{path} holds another measurement than its name says: remove it, to measure that once more")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Found(NamedTuple):
    """Everything that was measured.

    Attributes:
        curves: one per attribution and fill.
        classes: attribution -> image classes, by the first fill; empty for several labels an image.
        checks: attribution -> its maps beside those of random weights.
        control: the image classes of a random order, by the first fill; `None` for several labels.
        localisation: attribution -> where its maps lie; empty where the images do not say where their evidence is.
    """

    curves: list[Faithfulness]
    classes: dict[str, ImageClasses]
    checks: dict[str, WeightRandomization]
    control: ImageClasses | None
    localisation: dict[str, Localisation]


def choose_device() -> str:
    """Where to compute unless the user says so."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_test_images(options: argparse.Namespace) -> DecodedImages:
    """The decoded images of the held-out split; of the training images one is decoded, which says the size of all."""
    sizes = {"train": 1, "test": options.max_eval_samples}
    return load_images(options, options.dataset, sizes, read_pipeline(options.checkpoint))["test"]


def evaluate(checkpoint: Checkpoint, test: DecodedImages, options: argparse.Namespace, output: Path) -> Results:
    """Measure what was not measured before, write results.json, table and figures, print the tables."""
    environment = describe_environment(options.device)
    found = measure(checkpoint, test, options, environment, output / "measurements")
    rows = [faithfulness_row(one.convention.attribution, {options.seed: one}) for one in found.curves]
    class_rows = [class_row(found, attribution, options.seed) for attribution in options.attribution]
    located = [localisation_row(name, {options.seed: one}) for name, one in found.localisation.items()]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    results = Results("evaluate_faithfulness", settings, environment, [*rows, *located, *class_rows])
    results.save(output / "results.json")
    checked = CLASS_COLUMNS if found.classes else {"random_weights": CLASS_COLUMNS["random_weights"]}
    measured = SEVERAL_COLUMNS if test.is_multi_label else COLUMNS
    parts = [
        Results("", {}, {}, part).markdown_table(columns, cell=cell)
        for part, columns in ((rows, measured), (located, LOCALISATION_COLUMNS), (class_rows, checked))
        if part
    ]
    table = "\n".join([*parts, *(f"- {note}" for note in left_out_notes(results.rows))])
    write_whole(output / "table.md", table + "\n")
    print(f"\n{table}\nwritten to {output}: results.json and table.md", flush=True)
    drawn = draw(found, test, options.seed, output)
    print(f"figures: {', '.join(path.name for path in drawn) or 'none'}")
    return results


def cell(row: Row, metric: str) -> str:
    """The value and, where there is one, its interval over the images; one seed, so that n = 1 goes without saying."""
    ((seed, value),) = row.metrics[metric].values.items()
    found = row.details.get("by_seed", {}).get(str(seed), {})
    part = found.get("scores", {}).get(metric) or found.get(_CURVES.get(metric), {})
    interval = found.get("gap_interval") if metric == "gap" else part.get("interval")
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


class Measuring:
    """The measurements of one command: each is found in the folder or made and saved, and counted by a progress bar.

    Args:
        checkpoint: what is measured.
        test: the images.
        options: the command line.
        saved: the folder of the measurements.
        bar: counts them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        test: DecodedImages,
        options: argparse.Namespace,
        saved: SavedMeasurements,
        bar: tqdm,
    ) -> None:
        self.model, self.test, self.options, self.saved, self.bar = checkpoint.model, test, options, saved, bar
        self.number = 0
        self.common: dict[str, Any] = {
            "input_pipeline": checkpoint.pipeline,
            "batch_size": options.batch_size,
            "autocast_dtype": torch.bfloat16 if options.bf16 else None,
            "seed": options.seed,
        }

    def convention(self, attribution: Method, fill: Fill) -> Convention:
        """Of one line of the table."""
        options = self.options
        return resolve_convention(
            options.convention, attribution, options.steps, fill, options.cell, self.test.is_multi_label
        )

    def curves(self, convention: Convention) -> Faithfulness:
        """All curves by one convention."""
        make = partial(evaluate_faithfulness, self.model, self.test, convention=convention, **self.common)
        found = self._get("curves", convention, convention.to_dict(), make, Faithfulness)
        self.bar.write(f"  AUC {found.deletion_auc:.2f}, in random order {found.random_auc:.2f}")
        return found

    def image_classes(self, convention: Convention) -> ImageClasses:
        """Classes I and II by one convention."""
        make = partial(find_image_classes, self.model, self.test, convention=convention, **self.common)
        return self._get("image_classes", convention, convention.to_dict(), make, ImageClasses)

    def localisation(self, convention: Convention) -> Localisation:
        """Where the maps of an attribution lie."""
        # Nothing is removed, and the map is that of the library's own convention.
        how: dict[str, Any] = {"attribution": convention.attribution}
        make = partial(evaluate_localisation, self.model, self.test, **how, **self.common)
        return self._get("localisation", convention, how, make, Localisation)

    def random_weights(self, convention: Convention) -> WeightRandomization:
        """The maps beside those of the same network with random weights, on the first images."""
        some = Subset(self.test, range(min(len(self.test), _SANITY_IMAGES)))
        # Nothing is removed, so the fill does not matter.
        how: dict[str, Any] = {
            "attribution": convention.attribution,
            "score": convention.score or "logit",
            "signed": bool(convention.signed),
        }
        make = partial(randomized_weights_correlation, self.model, some, **how, **self.common)
        return self._get("random_weights", convention, how, make, WeightRandomization)

    def _get(
        self,
        kind: str,
        convention: Convention,
        settings: Mapping[str, Any],
        make: Callable[[], Measured],
        expected: type[Measured],
    ) -> Measured:
        self.number += 1
        is_there = self.saved.path_of(kind, settings).is_file()
        what = f"{kind.replace('_', ' ')}, {convention.attribution}, {convention.fill} fill"
        state = "measured before" if is_there else f"{len(self.test)} images"
        # Above the bar, and also where there is none.
        self.bar.write(f"[{self.number}/{self.bar.total}] {what}: {state}")
        sys.stdout.flush()
        found = self.saved.get(kind, settings, make, expected)
        self.bar.update()
        return found


def measure(
    checkpoint: Checkpoint,
    test: DecodedImages,
    options: argparse.Namespace,
    environment: Mapping[str, Any],
    folder: Path,
) -> Found:
    """Everything that the command line asks for, one measurement after the other."""
    identity = {**identify(checkpoint, test), "environment": environment, "bf16": options.bf16, "seed": options.seed}
    # An image of several labels has no one probability, by which the image classes are told apart.
    has_evidence, has_classes = test.evidence is not None, not test.is_multi_label
    count = has_classes + len(options.attribution) * (len(options.fill) + 1 + has_classes + has_evidence)
    # `disable=None`: no bar where nobody watches.
    with tqdm(total=count, desc="Measuring", unit="measurement", disable=None) as bar:
        measuring = Measuring(checkpoint, test, options, SavedMeasurements(folder, identity), bar)
        first = {name: measuring.convention(name, options.fill[0]) for name in ("random", *options.attribution)}
        found = Found([], {}, {}, measuring.image_classes(first["random"]) if has_classes else None, {})
        for attribution in options.attribution:
            for fill in options.fill:
                found.curves.append(measuring.curves(measuring.convention(attribution, fill)))
            if has_classes:
                found.classes[attribution] = measuring.image_classes(first[attribution])
            if has_evidence:
                found.localisation[attribution] = measuring.localisation(first[attribution])
            found.checks[attribution] = measuring.random_weights(first[attribution])
    return found


def class_row(found: Found, attribution: str, seed: int) -> Row:
    """Image classes, where there are any, and sanity check of one attribution."""
    check = found.checks[attribution]
    values: dict[str, Any] = {"random_weights": (float(check.mean[-1]), "rank correlation")}
    name, convention = f"{attribution}: random weights", None
    details: dict[str, Any] = {"random_weights": {"images": check.n, "undefined": int(check.undefined[-1])}}
    if found.control is not None:
        classes = found.classes[attribution]
        name, convention = f"{attribution}: image classes, random weights", classes.convention.to_dict()
        details["image_classes"] = classes.to_dict()
        values |= {
            "class_two": (classes.share, "percent"),
            "class_two_random": (found.control.share, "percent"),
            "raised": (classes.share_raised, "percent"),
            "early_peaks": (classes.share_of_early_peaks, "percent of class II"),
            "recovered": (classes.share_recovered, "percent"),
        }
    metrics = {
        name: Measurement({seed: value}, unit)
        for name, (value, unit) in values.items()
        if value is not None and value == value
    }
    return Row(name, metrics, convention, details)


def draw(found: Found, test: DecodedImages, seed: int, output: Path) -> list[Path]:
    """The curves by all fills, and the two example images, of every attribution; returns what could be drawn."""
    figures: dict[str, Callable[[Path], None]] = {}
    for attribution in found.checks:
        own = {
            one.convention: {attribution: {seed: one}}
            for one in found.curves
            if one.convention.attribution == attribution
        }
        figures[f"curves_{attribution}.png"] = partial(draw_curves, own)
        if attribution in found.classes:
            figures[f"classes_{attribution}.png"] = partial(draw_classes, found.classes[attribution], test)
    return [output / name for name, one in figures.items() if try_to_draw(one, output / name)]


def draw_classes(found: ImageClasses, test: DecodedImages, path: Path) -> None:
    """The two example images."""
    draw_image_classes(found, examples(found, test), path)


def examples(found: ImageClasses, test: DecodedImages) -> dict[str, Example]:
    """The surest right image of class I, and the one of class II that gains most, preferably one made right."""
    sure = found.probability[:, 0].masked_fill(found.is_class_two | ~found.is_correct[:, 0], -1.0)
    two = found.is_class_two
    becomes_right = (found.is_correct & found.is_helped).any(dim=1)
    gain = found.gain.masked_fill(~(becomes_right if bool(becomes_right.any()) else two), -1.0)
    chosen = {"Class I": int(sure.argmax()), "Class II": int(gain.argmax())}
    is_there = {"Class I": float(sure.max()) >= 0, "Class II": bool(two.any())}
    shown = {}
    for name, row in chosen.items():
        if is_there[name]:
            sample = test[int(found.sample_idx[row])]
            picture = sample["pixel_values"].permute(1, 2, 0) / 255
            shown[name] = Example(picture, test.label_names[sample["labels"]], row)
    return shown
