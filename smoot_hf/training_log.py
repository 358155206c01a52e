"""Averages over the logging window, kept on the device until the Trainer logs."""

from accelerate import Accelerator
from torch import Tensor


class LogWindow:
    """Sums of per-sample quantities since the last log; nothing waits for the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Tensor) -> None:
        """Take in a batch: (B,) per-sample values by name; detached here."""
        for name, value in values.items():
            total = value.detach().float().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + value.numel()

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the window and over all processes, which call this together; the window starts afresh."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        if means and accelerator.num_processes > 1:
            means = accelerator.reduce(means, reduction="mean")
        return {name: mean.item() for name, mean in means.items()}
