"""A page that shows what models look at: prediction, saliency, and how the probability falls as pixels are removed.

    smoot-hf demo runs/compare-digits
    smoot-hf demo CHECKPOINT [CHECKPOINT ...] [--dataset DATA] [--port 7860] [--space FOLDER] [--config FILE]
        [--attribution NAME]

Needs gradio: pip install 'smoot-hf[demo,recipes]'. Time: seconds to start.

A CHECKPOINT is the folder of a run of `smoot-hf train`, of a saved model, or a Hub id; the folder of a run of `smoot-hf
compare` stands for its methods, by their first seed. The examples are test images of the data that the first run was
trained on (--dataset: others, or where they are now). --space writes a folder that can be published as a Space, with
everything it needs, in place of serving the page:

    hf upload --repo-type space NAME/smoot-demo FOLDER

Pixels are ranked, removed and filled as `evaluate_faithfulness` does it. Every model is asked about the class that it
predicts itself for the whole image, since a dropped image has no label. If a run was trained with --planted, the page
also says of each test image how much of the saliency lies outside of the evidence; a Space does not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .evaluate import ATTRIBUTIONS
from .flags import OneLineParser, add_config, with_config


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page, or write the Space; what a user can get wrong ends with one line and exit code 2."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="Folder or Hub id, one or several.")
    parser.add_argument("--dataset", help="Of the examples (default: what the first run's record says).")
    parser.add_argument("--attribution", choices=ATTRIBUTIONS, default="gradient", help="Default: gradient.")
    parser.add_argument("--port", type=int, default=7860, help="Of the page (default 7860).")
    parser.add_argument("--space", type=Path, metavar="FOLDER", help="Write a Space instead of serving the page.")
    add_config(parser)
    options = parser.parse_args(with_config(parser, sys.argv[1:] if argv is None else argv))
    # Only now, since it takes ten seconds.
    from .checkpoint import load_checkpoint, named_checkpoints, recorded_images
    from .page import choose_examples, launch_settings, make_page
    from .space import write_space

    try:
        names = named_checkpoints(options.checkpoints)
        test = recorded_images(Path(next(iter(names.values()))), "test", options.dataset)
        loaded = {name: load_checkpoint(path, test, "cpu") for name, path in names.items()}
        if options.space is not None:
            write_space(options.space, names, choose_examples(test), options.attribution)
            print(f"written to {options.space}")
            return
        page = make_page(loaded, choose_examples(test), options.attribution)
        # Without blocking, so that a port in use is told like every other error.
        page.launch(server_port=options.port, prevent_thread_lock=True, **launch_settings())
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    page.block_thread()


if __name__ == "__main__":
    main()
