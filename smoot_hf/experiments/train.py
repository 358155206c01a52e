"""Train an image classifier with SMOOT, SGT or in the standard way, on any data set and model.

    smoot-hf train --dataset DATA --model MODEL [--method smoot] [--config FILE] [flags]
    smoot-hf train --recipe mnist [flags]
    accelerate launch -m smoot_hf.experiments.train [flags]

DATA is a Hub id, a local directory (Parquet or imagefolder) or "digits"; MODEL is "cnn", "deit-tiny", a Hub id or a
local directory of transformers or timm. Every field of `TrainingArguments` and `SmootTrainingArguments` is a flag. A
YAML or JSON file, as the first argument or by --config, holds the same names as the flags; flags override it.

--recipe takes the settings of a data set of the paper, or of the digits, as defaults. The files recipes/train_*.py of
the repository do the same, and say why each setting is what it is.

What departs from the library's defaults, and why: 256 images a batch and an evaluation and a checkpoint per epoch, of
which the last is kept; nothing is reported to a tracker unless --report_to says so.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .flags import check_flags


def main(
    defaults: Mapping[str, Any] | None = None, argv: Sequence[str] | None = None, description: str | None = __doc__
) -> dict[str, float]:
    """Train, evaluate, save, report.

    What a user can get wrong ends the process with one line on stderr: with exit code 2 before training starts, with 1
    from then on (a sample that cannot be used, a full disk, a Hub that does not answer).

    Args:
        defaults: values of flags that differ from those of this command; without any, --recipe is a flag.
        argv: the command line; default: that of the process.
        description: its first paragraph is shown by --help.

    Returns:
        The metrics of the final evaluation.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    check_flags(defaults or {}, description, argv)
    # Only now, since it takes ten seconds.
    from . import training_run

    return training_run.main(defaults, argv)


if __name__ == "__main__":
    main()
