# /// script
# requires-python = ">=3.11"
# dependencies = ["smoot-hf[recipes]"]
#
# [tool.uv.sources]
# smoot-hf = { path = "..", editable = true }
# ///
"""Train DeiT-tiny on CIFAR-100 with SMOOT, SGT or in the standard way (Table 1).

    accelerate launch recipes/train_cifar100.py [--dataset DIRECTORY] [--model DIRECTORY] [--method smoot|sgt|standard]
    uv run recipes/train_cifar100.py [flags]  # installs first what it needs
    smoot-hf train --recipe cifar100 [flags]  # the same from an installation, without this file

Time: as train_cifar10.py.
Expected: not measured yet.

The settings are those of train_cifar10.py, and their reasons stand there, but for one:

  label_column               fine_label: the data have coarse labels as well; the paper's are the 100 fine ones.
"""

from smoot_hf.experiments.recipes import RECIPES
from smoot_hf.experiments.train import main

if __name__ == "__main__":
    main(RECIPES["cifar100"], description=__doc__)
