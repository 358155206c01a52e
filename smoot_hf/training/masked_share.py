"""The share of a batch that is masked (`masked_share`): which samples it holds, and its way out of a batch and back."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .. import functional as SF
from .settings import SmootSettings

# Keeps the choice of the samples apart from their fill, whose noise has the same seed, epoch and samples.
_SHARE_STREAM = 0x7368617265


def in_masked_share(settings: SmootSettings, epoch: int, sample_idx: Tensor) -> Tensor | None:
    """Which samples are masked in an epoch, by seed, epoch and sample alone.

    So they are the same whatever batch a sample is in, on any number of processes, and after resuming.

    Args:
        settings: of the method, with `masked_share`.
        epoch: number of the epoch.
        sample_idx: int64 (B,) rows of the training set.

    Returns:
        bool (B,) on the device of `sample_idx`; `None` where all samples are masked.
    """
    if settings.masked_share == 1:
        return None
    return SF.counter_uniform(settings.seed ^ _SHARE_STREAM, epoch, sample_idx, (1,))[:, 0] < settings.masked_share


class Batch(NamedTuple):
    """What a step is given of its samples; the arguments of `masked_step`."""

    images: Tensor
    labels: Tensor
    sample_idx: Tensor
    k: Tensor
    inputs: Mapping[str, Any]

    def at(self, places: Tensor) -> "Batch":
        """The samples at some places, int64 (b,) on the CPU; other inputs of as many rows are taken for theirs."""
        size, places = len(self.images), places.to(self.images.device, non_blocking=True)
        inputs = {
            name: value[places] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
            for name, value in self.inputs.items()
        }
        return Batch(self.images[places], self.labels[places], self.sample_idx[places], self.k[places], inputs)


def put_in_place(values: Tensor, places: Tensor, size: int) -> Tensor:
    """Values (b, ...) of the samples at some places of a batch, and 0 for its others: (size, ...)."""
    return values.new_zeros(size, *values.shape[1:]).index_copy(0, places, values)


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a sample's logits depend on the samples beside it."""
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in model.modules())


def inside_ddp(model: nn.Module) -> nn.Module:
    """The model without `DistributedDataParallel` around it; itself where there is none.

    Each pass through DDP sends buffers to all processes, so that the processes must make equally many of them.
    """
    wrapped = getattr(model, "_orig_mod", model)
    return wrapped.module if isinstance(wrapped, DistributedDataParallel) else model


def inside_engine(model: nn.Module) -> nn.Module:
    """The model without DeepSpeed's engine around it; itself where there is none.

    The engine takes any backward pass through what it has returned for that of the loss.
    """
    # It is around a model only where it has been imported, which takes seconds.
    deepspeed = sys.modules.get("deepspeed")
    return model.module if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine) else model


def random_state(device: torch.device) -> Tensor:
    """Of the generator that dropout on a device draws from; known on the host."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
