"""Show what a classifier looks at in images of one's own: every attribution, drawn over the photograph.

    smoot-hf explain CHECKPOINT IMAGE [IMAGE ...] [--attribution NAME ...] [--output FOLDER] [--config FILE]

Needs matplotlib: pip install 'smoot-hf[recipes]'. Time: seconds for each image.

CHECKPOINT is the folder of a run of `smoot-hf train`, of a saved model, or a Hub id of any image classifier of
transformers or timm; IMAGE is an image file of any size. For each of them one PNG is written into the output folder:
the photograph as the model gets it, resized and cropped by its own image processor, and over it the heat map of every
attribution for the class that the model predicts. `explanations.json` lists the five most probable classes of each
image, and the files. Of a model with several labels for an image every label of a probability above one half is listed
and has heat maps of its own, or the most probable one where there is none.

The colours of a heat map end at the 99th percentile of its values, so that single pixels do not outshine the others.
attention_rollout needs a ViT of transformers, and deep_lift a network of ReLU modules.

An image that cannot be read is told in one line; the others are explained, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .evaluate import ATTRIBUTIONS
from .flags import OneLineParser, add_config, with_config

DEFAULT = ["gradient", "integrated_gradients", "grad_cam"]


def main(argv: Sequence[str] | None = None) -> None:
    """Explain and write; what a user can get wrong ends with one line, and exit code 2, or 1 for single images."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Folder or Hub id of a trained image classifier.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="Image files.")
    parser.add_argument(
        "--attribution", nargs="+", choices=ATTRIBUTIONS, default=DEFAULT, help=f"Default: {' '.join(DEFAULT)}."
    )
    parser.add_argument("--output", type=Path, help="Folder to write to (default: runs/explain-CHECKPOINT).")
    parser.add_argument("--device", help="Where to compute (default: cuda where there is one, else cpu).")
    add_config(parser)
    options = parser.parse_args(with_config(parser, sys.argv[1:] if argv is None else argv))
    output = options.output or Path(f"runs/explain-{Path(options.checkpoint).resolve().name}")
    try:
        # Only now, since it takes ten seconds.
        from .checkpoint import read_checkpoint
        from .checkpoint_evaluation import choose_device
        from .overlay import write_overlays

        checkpoint = read_checkpoint(options.checkpoint, options.device or choose_device())
        failed = write_overlays(checkpoint, options.images, list(dict.fromkeys(options.attribution)), output)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    for image, reason in failed.items():
        print(f"{parser.prog}: error: {image}: {' '.join(reason.split())}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
