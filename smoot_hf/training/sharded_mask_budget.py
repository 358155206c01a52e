"""The mask budget of a training on several processes, each of which holds the K of a range of the samples."""

import os
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed

from .mask_budget import MaskBudget
from .mask_budget_file import PIECE


def rows_of(num_samples: int, rank: int, count: int) -> range:
    """The samples of one of `count` processes, ceil(N / count) to each as long as there are any left.

    Args:
        num_samples: N.
        rank: of the process, in [0, count).
        count: of the processes.
    """
    share = -(-num_samples // count)
    return range(min(rank * share, num_samples), min((rank + 1) * share, num_samples))


class Processes:
    """The processes of a training. Each method is called by all of them together, with tensors of one size.

    Attributes:
        rank: of this process.
        count: number of processes.
    """

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.count = distributed.get_world_size()

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, one process after the other: (n,) -> (count * n,)."""
        gathered = values.new_empty(self.count * len(values))
        distributed.all_gather_into_tensor(gathered, values.contiguous())
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place of `values`."""
        distributed.all_reduce(values)
        return values

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """The values of the process `source`, in place of `values`."""
        distributed.broadcast(values, source)
        return values


class ShardedMaskBudget(MaskBudget):
    """A `MaskBudget` of which each process holds ceil(N / processes) samples: four bytes for each of them.

    All processes together call `read`, `update`, `count_visits`, `save` and `gathered`, as the trainer does. A step
    sends messages in proportion to the batch of all processes: their `sample_idx` and K when it is read, and K once
    more when it is moved. `histogram` and `statistics()` are those of all samples on every process, without a message,
    for each process counts all moves. K of all samples is nowhere: `k`, `to_dataset` and `state_dict` are refused.

    Args:
        *args: as in `MaskBudget`. `device` must be one on which the processes can communicate.
        processes: of the training, by default those of the default group of `torch.distributed`.
        **kwargs: as in `MaskBudget`.
    """

    def __init__(self, *args: Any, processes: Processes | None = None, **kwargs: Any) -> None:
        self._processes = processes or Processes()
        super().__init__(*args, **kwargs)

    @property
    def rows(self) -> range:
        """The samples whose K this process holds; none where there are fewer samples than processes."""
        return rows_of(self.num_samples, self._processes.rank, self._processes.count)

    def _allocate(self, initial: int, device: torch.device | str) -> Tensor:
        # One place more, always 0, for the samples of other processes: what is read there adds nothing to a sum.
        self._with_others = torch.full((len(self.rows) + 1,), initial, dtype=torch.int32, device=device)
        self._with_others[-1] = 0
        return self._with_others[:-1]

    def _places(self, rows: Tensor) -> Tensor:
        own = self.rows
        place = rows - own.start
        return torch.where((place >= 0) & (place < len(own)), place, len(own))

    def _stored_at(self, rows: Tensor) -> Tensor:
        return self._processes.sum(self._with_others[self._places(rows)])

    def _store(self, rows: Tensor, values: Tensor) -> None:
        self._with_others[self._places(rows)] = values
        self._with_others[-1] = 0

    @property
    def k(self) -> Tensor:
        """Refused: no process has the K of every sample.

        Raises:
            RuntimeError: saying where K can be had.
        """
        raise RuntimeError(
            f"K is sharded over {self._processes.count} processes (mask_budget_sharded=True), and none has all of it: "
            "call mask_budget.gathered() on every process, which returns a MaskBudget with all K, or read the K of a "
            "checkpoint by MaskBudget.load('.../mask_budget.safetensors'). statistics() and histogram need neither"
        )

    def gathered(self) -> MaskBudget:
        """A copy with the K of every sample, on the CPU of every process: four bytes for each of all samples."""
        whole = MaskBudget._described_by(self._metadata())
        stored = torch.cat(list(self._pieces()))
        k = torch.where(stored < 0, ~stored, stored)
        whole._take_up(self._metadata(), k, stored < 0, self._histogram)
        return whole

    def _pieces(self) -> Iterator[Tensor]:
        processes = self._processes
        for source in range(processes.count):
            count = len(rows_of(self.num_samples, source, processes.count))
            for begin in range(0, count, PIECE):
                if source == processes.rank:
                    piece = self._stored[begin : begin + PIECE].clone()
                else:
                    piece = self._stored.new_empty(min(PIECE, count - begin))
                yield processes.broadcast(piece, source).cpu()

    def read(self, sample_idx: Tensor) -> Tensor:
        """K of the given samples: int64 (B,) rows of the training set -> int32 (B,), in positions.

        Each process asks for samples of its own, B of them on each.
        """
        first = self._processes.rank * len(sample_idx)
        return super().read(self._processes.gather(sample_idx))[first : first + len(sample_idx)]

    def update(self, sample_idx: Tensor, delta: Tensor, step_size: float, rounding: str = "floor") -> Tensor:
        """As `MaskBudget.update`, with the samples of all processes, the same on each; each moves those it holds."""
        return super().update(sample_idx, delta, step_size, rounding)

    def count_visits(self) -> int:
        """How many samples of all processes have been seen in the epoch under way; waits for the device."""
        own = torch.tensor([super().count_visits()], device=self._stored.device)
        return int(self._processes.sum(own))

    def save(self, path: str | os.PathLike[str] | None, origin: Mapping[str, Any] | None = None) -> None:
        """As `MaskBudget.save`; the file is that of a budget that is not sharded.

        K is sent in pieces to every process, each of which drops it or writes it. None needs memory for more than a
        few pieces, of 64 MB each.

        Args:
            path: of the file, `None` on a process that writes none but has K to send.
            origin: as in `MaskBudget.save`.
        """
        super().save(path, origin)
        if path is None:
            # As often as the writing process: once for K, and once for which samples have moved.
            for _ in chain(self._pieces(), self._pieces()):
                pass

    def state_dict(self) -> dict[str, Any]:
        """Refused, since it would hold K of every sample.

        Raises:
            RuntimeError: saying what to do instead.
        """
        raise self._no_state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Refused, as is `state_dict`.

        Raises:
            RuntimeError: saying what to do instead.
        """
        raise self._no_state()

    @staticmethod
    def _no_state() -> RuntimeError:
        return RuntimeError(
            "a sharded mask budget has no state_dict, which would hold the K of every sample on every process: call "
            "save(path) on every process (with path=None on those that write nothing), and restore(path) to go on"
        )
