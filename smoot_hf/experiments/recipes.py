"""The recipes: the settings with which each data set is trained, by name.

The header of recipes/train_<name>.py in the repository (for photos: finetune_photos.py) gives the reason for each of
them, and what to expect.
"""

from typing import Any

_MNIST: dict[str, Any] = {
    "dataset": "ylecun/mnist",
    "model": "cnn",
    "optimizer": "adadelta",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "num_train_epochs": 100,
    "alpha": 0.95,
    "rounding": "trunc",
    "saliency_score": "log_prob",
    "signed_saliency": True,
}
_CIFAR10: dict[str, Any] = {
    "dataset": "uoft-cs/cifar10",
    "model": "deit-tiny",
    "optimizer": "adadelta",
    "learning_rate": 0.001,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "num_train_epochs": 100,
    "rounding": "trunc",
    "signed_saliency": True,
}
_DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "model": "cnn",
    "optimizer": "adadelta",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "num_train_epochs": 20,
    "per_device_train_batch_size": 64,
    "rounding": "trunc",
    "saliency_score": "log_prob",
    "signed_saliency": True,
}
# Name of a recipe -> values of the flags that differ from the defaults of `smoot-hf train`.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": _DIGITS,
    # Each digit above or below a block that says nothing: it is known where a map should point.
    "digits-block": {**_DIGITS, "planted": "block", "signed_saliency": False},
    # Up to three digits in one image, with a label for each.
    "several_digits": {
        "dataset": "digits",
        "model": "cnn",
        "planted": "several",
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 15,
        "per_device_train_batch_size": 32,
        "rounding": "trunc",
    },
    "mnist": _MNIST,
    "fashion_mnist": {**_MNIST, "dataset": "zalando-datasets/fashion_mnist"},
    "cifar10": _CIFAR10,
    # With the augmentation that DeiT itself is trained with; its labels are soft.
    "cifar10_mixed": {
        "dataset": "uoft-cs/cifar10",
        "model": "deit-tiny",
        "crop_padding": 4,
        "horizontal_flip": True,
        "mixup": 0.8,
        "cutmix": 1.0,
        "random_erasing": 0.25,
        "label_smoothing_factor": 0.1,
        "learning_rate": 5e-4,
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 100,
    },
    "cifar100": {**_CIFAR10, "dataset": "uoft-cs/cifar100", "label_column": "fine_label"},
    "photos": {
        "dataset": "photos",
        "model": "efficientnet-lite0",
        "horizontal_flip": True,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "mask_cell": 16,
        "step_size": 40.0,
        "rounding": "nearest",
        "saliency_score": "log_prob",
        "kl_gradient": "masked",
        "card_samples": 32,
    },
}
