# /// script
# requires-python = ">=3.11"
# dependencies = ["smoot-hf[recipes]"]
#
# [tool.uv.sources]
# smoot-hf = { path = "..", editable = true }
# ///
"""Train the paper's CNN on Fashion-MNIST with SMOOT, SGT or in the standard way (Table 1).

    accelerate launch recipes/train_fashion_mnist.py [--dataset DIRECTORY] [--method smoot|sgt|standard]
    uv run recipes/train_fashion_mnist.py [flags]  # installs first what it needs
    smoot-hf train --recipe fashion_mnist [flags]  # the same from an installation, without this file

Time: as train_mnist.py.
Expected: not measured yet.

The settings are those of train_mnist.py, and their reasons stand there. The data are "zalando-datasets/fashion_mnist"
of the Hub; --dataset takes a local directory of the same Parquet files.
"""

from smoot_hf.experiments.recipes import RECIPES
from smoot_hf.experiments.train import main

if __name__ == "__main__":
    main(RECIPES["fashion_mnist"], description=__doc__)
