"""The state of a model and of the random generators, which is restored after a measurement."""

import contextlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

_CPU = torch.device("cpu")


@contextmanager
def random_state_kept(device: torch.device = _CPU) -> Iterator[None]:
    """Leave the random states of Python, NumPy, and torch on the CPU and on `device`, as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - user transforms use it
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def model_device(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU for a model without either."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def model_dtype(model: nn.Module) -> torch.dtype | None:
    """Floating-point type of the model's first such parameter; `None` without one."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a process holds a part of the tensor alone: FSDP 2, tensor parallelism, DeepSpeed's ZeRO 3."""
    if hasattr(tensor, "ds_status"):
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_run_together(trainer: Any) -> bool:
    """Whether every pass of a trainer's model must be made by all processes, which gather its weights for it."""
    return trainer.is_fsdp_enabled or any(map(is_sharded, trainer.model.parameters()))


def _is_convolution_on_cpu(parameter: nn.Parameter) -> bool:
    is_dense = parameter.layout == torch.strided and not is_sharded(parameter)
    return parameter.ndim == 4 and parameter.device.type == "cpu" and is_dense


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, with gradients enabled; put everything back on leaving, also on an error.

    Gradients are enabled also if the caller is within `torch.no_grad` or `torch.inference_mode`.

    Restored: the training flag of every module (a frozen BatchNorm in a model that trains keeps its own), the gradient
    of every parameter, and the global random states of Python, NumPy and torch on the CPU and the model's device. On a
    CPU the weights of convolutions are lent in the channels-last layout, which is up to 1.7 times as fast there.
    """
    flags = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    weights = [(parameter, parameter.data) for parameter in model.parameters() if _is_convolution_on_cpu(parameter)]
    try:
        with random_state_kept(model_device(model)), torch.inference_mode(False), torch.enable_grad():
            # An attribution of the caller's may run backward(): it must not add to gradients that are waiting.
            for parameter, _ in gradients:
                parameter.grad = None
            for parameter, values in weights:
                parameter.data = values.contiguous(memory_format=torch.channels_last)
            model.eval()
            yield
    finally:
        # Modules drop in `train` what they keep from passes in eval mode (LeViT its attention biases).
        if flags[0][1]:
            model.train()
        for module, training in flags:
            module.training = training
        for parameter, values in weights:
            parameter.data = values
        for parameter, gradient in gradients:
            parameter.grad = gradient
