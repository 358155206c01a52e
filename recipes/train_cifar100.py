"""Train DeiT-tiny on CIFAR-100 with SMOOT, SGT or in the standard way (Table 1).

    accelerate launch recipes/train_cifar100.py [--dataset DIRECTORY] [--model DIRECTORY] [--method smoot|sgt|standard]

Time: as train_cifar10.py.
Expected: not measured yet.

The settings are those of train_cifar10.py, and their reasons stand there, but for one:

  label_column               fine_label: the data have coarse labels as well; the paper's are the 100 fine ones.
"""

from train_cifar10 import DEFAULTS as CIFAR10

from smoot_hf.experiments.flags import check_flags

DEFAULTS = CIFAR10 | {"dataset": "uoft-cs/cifar100", "label_column": "fine_label"}

if __name__ == "__main__":
    check_flags(DEFAULTS, __doc__)
    # Only now, since it takes ten seconds.
    from smoot_hf.experiments.training_run import main

    main(DEFAULTS)
