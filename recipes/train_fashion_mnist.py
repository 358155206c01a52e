"""Train the paper's CNN on Fashion-MNIST with SMOOT, SGT or in the standard way (Table 1).

    accelerate launch recipes/train_fashion_mnist.py [--dataset DIRECTORY] [--method smoot|sgt|standard]

Time: as train_mnist.py.
Expected: not measured yet.

The settings are those of train_mnist.py, and their reasons stand there. The data are "zalando-datasets/fashion_mnist"
of the Hub; --dataset takes a local directory of the same Parquet files.
"""

from train_mnist import DEFAULTS as MNIST

from smoot_hf.experiments.flags import check_flags

DEFAULTS = MNIST | {"dataset": "zalando-datasets/fashion_mnist"}

if __name__ == "__main__":
    check_flags(DEFAULTS, __doc__)
    # Only now, since it takes ten seconds.
    from smoot_hf.experiments.training_run import main

    main(DEFAULTS)
