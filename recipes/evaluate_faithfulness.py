"""Measure how faithful the saliency of any trained checkpoint is: curves, areas, image classes, sanity check.

    python recipes/evaluate_faithfulness.py CHECKPOINT --dataset DATA [--convention default|paper]
        [--attribution gradient integrated_gradients ...] [--fill corner mean ...] [--output FOLDER]

CHECKPOINT is a folder or Hub id of transformers or timm; DATA is what recipes/train.py takes. Written into the output
folder: results.json, table.md, curves_<attribution>.png and classes_<attribution>.png.

Time: ten seconds for the digits; grows with images x attributions x fills x 40 forward passes.

What the numbers mean (in percent, in brackets the 95 % interval over the images; the convention stands below
the table and in results.json):

  AUC             area under the share of images still correct while the positions that the attribution ranks highest
                  are replaced first. Lower is better, and means nothing unless it is below the next.
  random order    the same model and fill, positions replaced in random order: the control.
  insertion AUC   positions put back into the fill, highest first. Higher is better.
  gap             AUC of least salient first minus AUC. Higher is better; a random ranking has 0.
  class II        images that masking salient positions helps (the paper's Figure 1): the label's probability rises
                  by more than one percentage point above that of the whole image, and above that of no evidence: of
                  the fill alone, or one over the number of classes. How many of those peak before half is masked;
                  images that are wrong and become right by such a rise; and the share of class II in random order, the
                  control: the highest of ten points is above the first by chance as well.
  any rise        the same without the second condition. The paper tells the classes apart by eye (16 % of the test
                  images, a CNN on CIFAR-10), which is this reading. It grows as a model gets worse: whatever is
                  classified wrong rises to chance as the image disappears.
  random weights  mean rank correlation of the maps with those of the same network with random weights (Adebayo et
                  al. 2018), on up to 500 images. A method that shows what was learned is near 0.

Others define the curve otherwise. torch-cam's DeletionInsertionMetric follows the probability of a class, fills with
zero (after normalisation) and rounds its step up to whole positions; with the same map, steps and fill ours is equal to
1e-5 (tests/test_perturbation.py). Quantus' PixelFlipping flips single values of single channels, not positions, breaks
ties in no fixed order, leaves out the unmasked image, and its AUC counts a step as 1, so that it grows with the number
of steps. captum has no such curve: its infidelity and sensitivity measure other properties of an attribution.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from checkpoints import Checkpoint, load_checkpoint
from command_line import OneLineParser
from figures import Example, draw_curves, draw_image_classes
from train import decode, limit, load_splits

from smoot_hf import Convention, Faithfulness, evaluate_faithfulness
from smoot_hf.attributions import Method
from smoot_hf.convention import PRESETS, resolve_convention
from smoot_hf.data import DecodedImages
from smoot_hf.environment import describe_environment
from smoot_hf.functional.removal import Fill
from smoot_hf.image_classes import ImageClasses, find_image_classes
from smoot_hf.results import Measurement, Results, Row, faithfulness_row, left_out_notes
from smoot_hf.sanity_check import randomized_weights_correlation

COLUMNS = {
    "accuracy": "Accuracy",
    "deletion_auc": "AUC (lower is better)",
    "random_auc": "AUC, random order",
    "insertion_auc": "Insertion AUC (higher is better)",
    "gap": "Gap (higher is better)",
}
CLASS_COLUMNS = {
    "class_two": "Class II (%)",
    "class_two_random": "Class II, random order (%)",
    "raised": "any rise, the paper's reading (%)",
    "early_peaks": "of class II, peak before 50 % masked (%)",
    "recovered": "wrong, right when masked (%)",
    "random_weights": "Rank correlation with random weights",
}
# metric -> its curve in the details of a row
_CURVES = {"deletion_auc": "deletion", "random_auc": "random", "insertion_auc": "insertion"}
_SANITY_IMAGES = 500


def main(argv: Sequence[str] | None = None) -> Results:
    """Evaluate, write, print; what a user can get wrong ends the process with one line and exit code 2."""
    parser = make_parser()
    options = parser.parse_args(argv)
    options.fill, options.attribution = (list(dict.fromkeys(v)) for v in (options.fill, options.attribution))
    if len(options.fill) < 2:
        parser.error("--fill must name at least two: the fill moves the AUC as much as a training method does")
    output = options.output or Path(f"runs/faithfulness-{Path(options.checkpoint).name}")
    try:
        test = load_test_images(options)
        checkpoint = load_checkpoint(options.checkpoint, test, options.device)
        return evaluate(checkpoint, test, options, output)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser((), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Folder or Hub id of a trained image classifier.")
    parser.add_argument("--dataset", required=True, help='Hub id, local directory, or "digits".')
    parser.add_argument("--convention", choices=PRESETS, default="default", help="Preset (default: default).")
    parser.add_argument("--attribution", nargs="+", choices=get_args(Method), default=["gradient"])
    parser.add_argument("--fill", nargs="+", choices=get_args(Fill), default=["corner", "mean"], help="At least two.")
    parser.add_argument("--steps", type=int, help="Even steps of the curves (default: the convention's).")
    parser.add_argument("--max_eval_samples", type=int, help="This many test images, always the same ones.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images per forward pass (default 256).")
    parser.add_argument("--bf16", action="store_true", help="Run the network under bfloat16 autocast.")
    parser.add_argument("--seed", type=int, default=0, help="Of random order, noise and random weights (default 0).")
    parser.add_argument("--output", type=Path, help="Folder to write to (default: runs/faithfulness-CHECKPOINT).")
    parser.add_argument("--image_column", help="Column of the images, where it is ambiguous.")
    parser.add_argument("--label_column", help="Column of the labels, where it is ambiguous.")
    parser.add_argument("--convert_rgb", action="store_true", help="Three channels for grey images.")
    parser.add_argument("--image_size", type=int, help="Resize and crop to a square of this side, as in training.")
    parser.add_argument("--train_split", default="train", help="Split that the model was trained on (default: train).")
    parser.add_argument("--eval_split", help="Split to evaluate on (default: as recipes/train.py).")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where to compute.")
    return parser


def load_test_images(options: argparse.Namespace) -> DecodedImages:
    """The decoded images of the held-out split."""
    splits = limit(load_splits(options, options.dataset), {"test": options.max_eval_samples})
    return DecodedImages(decode(splits, options)["test"])


def evaluate(checkpoint: Checkpoint, test: DecodedImages, options: argparse.Namespace, output: Path) -> Results:
    """Measure everything, write results.json, table and figures, print the tables."""
    measured: dict[Convention, Faithfulness] = {}
    found: dict[str, ImageClasses] = {}
    rows, class_rows = [], []
    control = image_classes(checkpoint, test, convention_of(options, "random", options.fill[0]), options)
    for attribution in options.attribution:
        for fill in options.fill:
            convention = convention_of(options, attribution, fill)
            print(f"{attribution}, {fill} fill: {len(test)} images", flush=True)
            measured[convention] = measure(checkpoint, test, convention, options)
            rows.append(faithfulness_row(attribution, {options.seed: measured[convention]}))
        first = convention_of(options, attribution, options.fill[0])
        found[attribution] = image_classes(checkpoint, test, first, options)
        class_rows.append(class_row(checkpoint, test, found[attribution], control, options))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    environment = describe_environment(options.device)
    results = Results("evaluate_faithfulness", settings, environment, [*rows, *class_rows])
    output.mkdir(parents=True, exist_ok=True)
    results.save(output / "results.json")
    draw(measured, found, test, options.seed, output)
    parts = [
        Results("", {}, {}, part).markdown_table(columns, cell=cell)
        for part, columns in ((rows, COLUMNS), (class_rows, CLASS_COLUMNS))
    ]
    table = "\n".join([*parts, *(f"- {note}" for note in left_out_notes([*rows, *class_rows]))])
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\nwritten to {output}: results.json, table.md and figures")
    return results


def cell(row: Row, metric: str) -> str:
    """The value and, where there is one, its interval over the images; one seed, so that n = 1 goes without saying."""
    ((seed, value),) = row.metrics[metric].values.items()
    found = row.details.get("by_seed", {}).get(str(seed), {})
    interval = found.get("gap_interval") if metric == "gap" else found.get(_CURVES.get(metric), {}).get("interval")
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def convention_of(options: argparse.Namespace, attribution: Method, fill: Fill) -> Convention:
    """The convention of one line of the table."""
    return resolve_convention(options.convention, attribution, options.steps, fill)


def measure(
    checkpoint: Checkpoint, test: DecodedImages, convention: Convention, options: argparse.Namespace
) -> Faithfulness:
    """All curves by one convention."""
    return evaluate_faithfulness(checkpoint.model, test, convention=convention, **common(checkpoint, options))


def image_classes(
    checkpoint: Checkpoint, test: DecodedImages, convention: Convention, options: argparse.Namespace
) -> ImageClasses:
    """Classes I and II by one convention."""
    return find_image_classes(checkpoint.model, test, convention=convention, **common(checkpoint, options))


def common(checkpoint: Checkpoint, options: argparse.Namespace) -> dict[str, Any]:
    """What holds for every measurement."""
    return {
        "input_pipeline": checkpoint.pipeline,
        "batch_size": options.batch_size,
        "autocast_dtype": autocast_dtype(options),
        "seed": options.seed,
    }


def autocast_dtype(options: argparse.Namespace) -> torch.dtype | None:
    """What every measurement runs the network in; `None`: its own precision."""
    return torch.bfloat16 if options.bf16 else None


def class_row(
    checkpoint: Checkpoint,
    test: DecodedImages,
    found: ImageClasses,
    control: ImageClasses,
    options: argparse.Namespace,
) -> Row:
    """Image classes and sanity check of one attribution."""
    convention, seed = found.convention, options.seed
    subset = DecodedImages(test.dataset.select(range(min(len(test), _SANITY_IMAGES))))
    check = randomized_weights_correlation(
        checkpoint.model,
        subset,
        convention.attribution,  # type: ignore[arg-type]  # one of the choices
        score=convention.score or "logit",
        signed=bool(convention.signed),
        input_pipeline=checkpoint.pipeline,
        batch_size=options.batch_size,
        autocast_dtype=autocast_dtype(options),
        seed=seed,
    )
    values: dict[str, Any] = {
        "class_two": (found.share, "percent"),
        "class_two_random": (control.share, "percent"),
        "raised": (found.share_raised, "percent"),
        "early_peaks": (found.share_of_early_peaks, "percent of class II"),
        "recovered": (found.share_recovered, "percent"),
        "random_weights": (float(check.mean[-1]), "rank correlation"),
    }
    metrics = {
        name: Measurement({seed: value}, unit)
        for name, (value, unit) in values.items()
        if value is not None and value == value
    }
    details = {
        "image_classes": found.to_dict(),
        "random_weights": {"images": check.n, "undefined": int(check.undefined[-1])},
    }
    return Row(f"{convention.attribution}: image classes, random weights", metrics, convention.to_dict(), details)


def draw(
    measured: dict[Convention, Faithfulness],
    found: dict[str, ImageClasses],
    test: DecodedImages,
    seed: int,
    output: Path,
) -> None:
    """The curves by all fills, and the two example images, of every attribution."""
    for attribution, classes in found.items():
        own = {c: {attribution: {seed: result}} for c, result in measured.items() if c.attribution == attribution}
        draw_curves(own, output / f"curves_{attribution}.png")
        draw_image_classes(classes, examples(classes, test), output / f"classes_{attribution}.png")


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


if __name__ == "__main__":
    main()
