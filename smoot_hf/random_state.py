"""The global random states: a look at the data or a measurement must not change a run."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

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
