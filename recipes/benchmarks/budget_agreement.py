"""Whether K tells images apart: how alike are the K of trainings that differ in nothing but their seed?

    python recipes/benchmarks/budget_agreement.py runs/digits-cnn-smoot-seed0 runs/digits-cnn-smoot-seed1 [RUN ...]

Time: seconds. The runs are folders of `smoot-hf train`, of one training set and of different seeds; each must have kept
a checkpoint.

If K is a property of an image, every training orders the images alike, and the rank correlation (Spearman) of two runs
is near 1; if it is chance, it is near 0. It is taken over the training images for each pair of runs. The pairs share
runs, so their standard deviation says how much they differ and is no standard error.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from smoot_hf import MaskBudget
from smoot_hf.experiments.flags import OneLineParser
from smoot_hf.fingerprint import fingerprints_differ
from smoot_hf.training.checkpoint_folder import newest_whole_checkpoint
from smoot_hf.training.mask_budget_file import MASK_BUDGET_NAME


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Print the correlation of every pair of runs in short; what a user can get wrong ends with one line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of at least two training runs.")
    options = parser.parse_args(argv)
    try:
        budgets = [load_budget(run) for run in options.runs]
        found = correlations(budgets)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    for run, budget in zip(options.runs, budgets, strict=True):
        k = budget.k.double()
        print(f"{run.name}: K min / median / max {k.min():g} / {k.median():g} / {k.max():g}, std {k.std():.2f}")
    spread = f", std {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""
    print(f"rank correlation of K: mean {np.mean(found):.3f}{spread}, {len(found)} pairs of {len(budgets)} runs")
    return found


def load_budget(run: Path) -> MaskBudget:
    """K of the newest checkpoint of a run.

    Raises:
        ValueError: it has none.
    """
    checkpoint = newest_whole_checkpoint(run) if run.is_dir() else None
    path = None if checkpoint is None else Path(checkpoint) / MASK_BUDGET_NAME
    if path is None or not path.is_file():
        raise ValueError(f"{run} holds no checkpoint with {MASK_BUDGET_NAME}: train it with --method smoot")
    return MaskBudget.load(path)


def correlations(budgets: Sequence[MaskBudget]) -> list[float]:
    """Spearman's rank correlation of K for every pair of budgets.

    Raises:
        ValueError: fewer than two, of other images, or with one K for all.
    """
    first = budgets[0]
    if len(budgets) < 2:
        raise ValueError("K of one run has nothing to agree with: name at least two runs")
    for budget in budgets:
        is_other = fingerprints_differ(first.dataset_fingerprint, budget.dataset_fingerprint)
        if budget.num_samples != first.num_samples or is_other:
            raise ValueError("the runs were trained on other images, so that their K cannot be compared")
        if len(budget.k.unique()) == 1:
            raise ValueError("a run has one K for all images, which tells none apart: train with --method smoot")
    return [float(spearmanr(one.k, other.k).statistic) for one, other in combinations(budgets, 2)]


if __name__ == "__main__":
    main()
