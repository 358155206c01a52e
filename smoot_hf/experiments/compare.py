"""Compare standard training, SGT and SMOOT: accuracy and faithfulness over several seeds, in one report.

    smoot-hf compare [--recipe digits] [--seeds 0 1 2] [--output FOLDER] [--config FILE] [training flags]
    smoot-hf compare --recipe digits-block
    smoot-hf compare --runs FOLDER FOLDER ... [--recipe mnist] [--dataset DATA]
    accelerate launch -m smoot_hf.experiments.compare [flags]

Time: a minute and a half for the digits (three methods, three seeds, 20 epochs) on one CPU core, three minutes for
"digits-block", whose images hold a digit and a block that says nothing: there it is known where a map should point.

--recipe takes the settings of a data set, as `smoot-hf train --recipe` does; every other flag is one of `smoot-hf
train` and holds for all runs. A run that is found finished in the output folder is not trained again, one that was cut
off goes on from its last checkpoint. --runs evaluates finished runs in place of training: folders of `smoot-hf train`,
or any folder with a saved model whose name says method and seed, as in `smoot-seed0`.

Every model is measured by both presets (the library's and the paper's) with two fills, corner and mean, on all test
images (--max_eval_samples: fewer). Beside each AUC stands that of the same model with the positions removed in random
order: an AUC that is not below it says nothing. Each method's maps are also judged by the others' models. Where the
images say where their evidence lies (--planted block), it is measured how much of the saliency lies there. What is
written into the output folder:

  report.html                       everything below in one file, with nothing to load from elsewhere
  table.md, results.json            the numbers, per seed as well, with settings, versions, device and commit
  curves.png, saliency.png, k.png   deletion curves, saliency maps of the same images, K over the epochs
  runs/<method>-seed<seed>/         the trained models
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .flags import METHODS, OneLineParser, add_config, check_flags, with_config
from .recipes import RECIPES

_ONE_RUNS_FLAGS = ("--method", "--seed", "--output_dir", "--resume_from_checkpoint")


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Train what is missing, evaluate, write the report.

    What a user can get wrong ends the process with one line on stderr and exit code 2, before training starts.

    Returns:
        The report; `None` on all processes but the first.
    """
    parser = make_comparison_parser()
    argv = with_config(parser, sys.argv[1:] if argv is None else argv, others_follow=True)
    options, flags = parser.parse_known_args(argv)
    given = next((flag for flag in flags if flag.split("=")[0] in _ONE_RUNS_FLAGS), None)
    if given is not None:
        parser.error(f"{given} is a flag of a single run: use --methods, --seeds and --output")
    check_flags(RECIPES[options.recipe], __doc__, flags)
    # Only now, since it takes ten seconds.
    from .checkpoint import load_checkpoint
    from .method_comparison import check_comparable, compare, known_runs, plan_runs, read_runs, train_missing
    from .run import BudgetHistory
    from .training_run import load_data

    output = options.output or Path(f"runs/compare-{options.recipe}")
    plans = plan_runs(options, flags, output)
    args, recipe = plans[0]
    try:
        train_images, test = load_data(args, recipe)
        if test.is_multi_label:
            raise ValueError(
                "several labels are not compared here: take `smoot-hf campaign recipes/campaigns/several-digits.toml`"
            )
        runs = read_runs(options.runs) if options.runs else known_runs(plans)
        check_comparable(runs, train_images, recipe.dataset)
        for run in runs:
            # Read once more after training, but before it nothing is lost.
            BudgetHistory.load(run.folder)
            if run.record.is_finished:
                load_checkpoint(str(run.folder), test, "cpu")
        runs = runs if options.runs else train_missing(plans)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    return compare(runs, test, plans[0], options.recipe, output) if args.process_index == 0 else None


def make_comparison_parser() -> OneLineParser:
    """The parser of what is not a flag of a single training run."""
    parser = OneLineParser(
        description=__doc__,
        usage="%(prog)s [--flag VALUE ...] [flags of smoot-hf train]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=list(RECIPES), default="digits", help="Whose settings (default: digits).")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="Default: all three.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Default: 0 1 2.")
    parser.add_argument("--runs", nargs="+", type=Path, metavar="FOLDER", help="Evaluate these instead of training.")
    parser.add_argument("--output", type=Path, help="Folder to write to (default: runs/compare-RECIPE).")
    add_config(parser)
    return parser


if __name__ == "__main__":
    main()
