"""Measure how faithful the saliency of any trained checkpoint is: curves, areas, image classes, sanity check.

    smoot-hf evaluate CHECKPOINT --dataset DATA [--convention default|paper] [--config FILE]
        [--attribution gradient integrated_gradients ...] [--fill corner mean ...] [--cell 16] [--output FOLDER]

CHECKPOINT is a folder or Hub id of transformers or timm; DATA is what `smoot-hf train` takes. Written into the output
folder: results.json, table.md, curves_<attribution>.png and classes_<attribution>.png; and, as soon as it is made,
every single measurement, in the folder "measurements". After it was stopped the same command goes on from there: what
has been measured of the same checkpoint, images and convention, by the same software, is not measured again.

Time: ten seconds for the digits; grows with images x attributions x fills x 40 forward passes.

What the numbers mean (in percent, in brackets the 95 % interval over the images; the convention stands below
the table and in results.json):

  AUC             area under the share of images still correct while the positions that the attribution ranks highest
                  are replaced first. Lower is better, and means nothing unless it is below the next.
  random order    the same model and fill, positions replaced in random order: the control.
  insertion AUC   positions put back into the fill, highest first. Higher is better.
  gap             AUC of least salient first minus AUC. Higher is better; a random ranking has 0.
  localisation    with --planted, where it is known where the evidence lies: how much of the saliency lies there, over
                  the images that are classified correctly. Nothing is removed for it.
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
1e-5 (tests/functional/test_perturbation.py). Quantus' PixelFlipping flips single values of single channels, not
positions, breaks ties in no fixed order, leaves out the unmasked image, and its AUC counts a step as 1, so that it
grows with the number of steps. captum has no such curve: its infidelity and sensitivity measure other properties of an
attribution.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .flags import OneLineParser, add_config, with_config

if TYPE_CHECKING:
    from ..evaluation.results import Results

# As the library has them, which takes ten seconds to import; a test compares.
CONVENTIONS = ("default", "paper")
ATTRIBUTIONS = (
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smooth_grad",
    "gradient_shap",
    "deep_lift",
    "grad_cam",
    "attention_rollout",
    "random",
)
PLANTED = ("plain", "block", "block-fixed", "decoy", "several")
FILLS = ("corner", "mean", "zero", "uniform", "blur")


def main(argv: Sequence[str] | None = None) -> "Results":
    """Evaluate, write, print; what a user can get wrong ends the process with one line and exit code 2."""
    parser = make_parser()
    options = parser.parse_args(with_config(parser, sys.argv[1:] if argv is None else argv))
    options.fill, options.attribution = (list(dict.fromkeys(v)) for v in (options.fill, options.attribution))
    if len(options.fill) < 2:
        parser.error("--fill must name at least two: the fill moves the AUC as much as a training method does")
    output = options.output or Path(f"runs/faithfulness-{Path(options.checkpoint).name}")
    # Only now, since it takes ten seconds.
    from .checkpoint import load_checkpoint
    from .checkpoint_evaluation import choose_device, evaluate, load_test_images

    try:
        options.device = options.device or choose_device()
        test = load_test_images(options)
        checkpoint = load_checkpoint(options.checkpoint, test, options.device, takes_several_labels=True)
        return evaluate(checkpoint, test, options, output)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Folder or Hub id of a trained image classifier.")
    parser.add_argument("--dataset", required=True, help='Hub id, local directory, or "digits".')
    parser.add_argument("--convention", choices=CONVENTIONS, default="default", help="Preset (default: default).")
    parser.add_argument("--attribution", nargs="+", choices=ATTRIBUTIONS, default=["gradient"])
    parser.add_argument("--fill", nargs="+", choices=FILLS, default=["corner", "mean"], help="At least two.")
    parser.add_argument("--steps", type=int, help="Even steps of the curves (default: the convention's).")
    parser.add_argument("--cell", type=int, default=1, help="Remove whole cells of this side in pixels (default 1).")
    parser.add_argument("--max_eval_samples", type=int, help="This many test images, always the same ones.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images per forward pass (default 256).")
    parser.add_argument("--bf16", action="store_true", help="Run the network under bfloat16 autocast.")
    parser.add_argument("--seed", type=int, default=0, help="Of random order, noise and random weights (default 0).")
    parser.add_argument("--output", type=Path, help="Folder to write to (default: runs/faithfulness-CHECKPOINT).")
    parser.add_argument("--image_column", help="Column of the images, where it is ambiguous.")
    parser.add_argument("--label_column", help="Column of the labels, where it is ambiguous.")
    parser.add_argument("--convert_rgb", action="store_true", help="Three channels for grey images.")
    parser.add_argument("--image_size", type=int, help="Resize and crop to a square of this side, as in training.")
    parser.add_argument("--planted", choices=PLANTED, default="plain", help="Plant evidence, as in training.")
    parser.add_argument("--train_split", default="train", help="Split that the model was trained on (default: train).")
    parser.add_argument("--eval_split", help="Split to evaluate on (default: as smoot-hf train).")
    parser.add_argument("--device", help="Where to compute (default: cuda where there is one, else cpu).")
    add_config(parser)
    return parser


if __name__ == "__main__":
    main()
