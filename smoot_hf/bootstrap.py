"""Bootstrap: how far a mean over images could have come out otherwise."""

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 1000
# Resampled values held at once: 32 MB in float64.
_BLOCK = 4_000_000


def bootstrap_interval(values: Tensor, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean, at 95 %, from 1,000 resamples.

    It speaks of the choice of the images alone. How much a training method varies shows over seeds only.

    Args:
        values: (n,) one per image.
        seed: of the resampling; the global random state is not touched.

    Returns:
        Lower and upper end; `None` for fewer than 2 values, which say nothing about their spread.
    """
    if len(values) < 2:
        return None
    values = values.detach().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for resamples in torch.empty(RESAMPLES).split(max(1, _BLOCK // len(values))):
        chosen = torch.randint(len(values), (len(resamples), len(values)), generator=generator)
        means.append(values[chosen].mean(dim=1))
    tail = (1 - LEVEL) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
