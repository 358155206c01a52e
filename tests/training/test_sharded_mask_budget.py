"""K in ranges over several processes, which are threads here, equals K in one place; see also test_distributed.py."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoot_hf import MaskBudget
from smoot_hf.training.mask_budget_file import read_budget
from smoot_hf.training.sharded_mask_budget import Processes, ShardedMaskBudget, rows_of


class Threads(Processes):
    """What `Processes` does, between threads: a call that one of them leaves out ends in an error."""

    def __init__(self, rank, said, barrier):
        self.rank, self.count = rank, len(said)
        self.said, self.barrier = said, barrier

    def _exchange(self, values):
        self.said[self.rank] = values.clone()
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        assert len({(one.shape, one.dtype) for one in said}) == 1
        return said

    def gather(self, values):
        return torch.cat(self._exchange(values))

    def sum(self, values):
        return values.copy_(torch.stack(self._exchange(values)).sum(0))

    def broadcast(self, values, source):
        return values.copy_(self._exchange(values)[source])


def together(count, act):
    """What `act(processes)` returns in each of `count` threads that know each other."""
    said, barrier = [None] * count, threading.Barrier(count, timeout=5)
    with ThreadPoolExecutor(count) as threads:
        return [
            found.result() for found in [threads.submit(act, Threads(rank, said, barrier)) for rank in range(count)]
        ]


def require_equal(sharded, whole):
    """Every entry, what has moved, the counts and all that is derived from them."""
    one, two = sharded.gathered().state_dict(), whole.state_dict()
    assert torch.equal(one["k"], two["k"])
    assert torch.equal(one["has_moved"], two["has_moved"])
    assert one["metadata"] == two["metadata"]
    assert torch.equal(sharded.histogram, whole.histogram)
    assert torch.equal(sharded.gathered().histogram, whole.histogram)
    assert sharded.statistics() == whole.statistics()
    assert sharded.count_visits() == whole.count_visits()
    assert repr(sharded) == repr(whole)


@given(st.integers(1, 50), st.integers(1, 60))
def test_every_sample_is_held_once(count, num_samples):
    """Catches a sample of two processes or of none, and one process that holds more than its share."""
    ranges = [rows_of(num_samples, rank, count) for rank in range(count)]
    assert [row for rows in ranges for row in rows] == list(range(num_samples))
    assert max(map(len, ranges)) == -(-num_samples // count)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9))
def test_epochs_of_updates_equal_those_of_one_place(seed, count, num_samples):
    """Catches a row of another process that is moved or read, a sample moved twice, and counts of one process."""

    def act(processes):
        rng = np.random.default_rng(seed)
        sharded = ShardedMaskBudget(num_samples, (10, 10), processes=processes)
        whole = MaskBudget(num_samples, (10, 10))
        assert len(sharded._stored) == len(sharded.rows) <= -(-num_samples // count)
        for epoch in range(2):
            sharded.begin_epoch(epoch)
            whole.begin_epoch(epoch)
            for _ in range(3):
                size = rng.integers(1, 5)
                rows = torch.from_numpy(rng.integers(0, num_samples, size=count * size))
                own = rows[processes.rank * size : (processes.rank + 1) * size]
                assert torch.equal(sharded.read(own), whole.read(own))
                delta = torch.from_numpy(rng.uniform(-1, 1, size=count * size))
                delta[torch.from_numpy(rng.random(count * size) < 0.1)] = torch.nan
                moved = whole.update(rows, delta, 40.0, "trunc")
                assert torch.equal(sharded.update(rows, delta, 40.0, "trunc"), moved)
                require_equal(sharded, whole)
        return len(sharded.rows)

    assert sum(together(count, act)) == num_samples


def moved_budget(kind=MaskBudget, num_samples=10, **processes):
    mine = kind(num_samples, (10, 10), dataset_fingerprint="abc", **processes)
    mine.begin_epoch(4)
    mine.update(torch.tensor([0, 1, 2, 2]) % num_samples, torch.tensor([1.0, -1.0, 0.3, 0.9]), 10)
    return mine


@pytest.mark.parametrize("num_samples", [10, 2])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4), (4, 3)])
def test_a_file_goes_from_any_number_of_processes_to_any_other(before, after, num_samples, tmp_path, monkeypatch):
    """Catches a file of one's own kind, a range taken from the wrong place, and a process that holds nothing."""
    for module in ("mask_budget", "mask_budget_file", "sharded_mask_budget"):
        monkeypatch.setattr(f"smoot_hf.training.{module}.PIECE", 2)
    whole = moved_budget(num_samples=num_samples)
    whole.save(tmp_path / "whole")

    def save(processes):
        sharded = moved_budget(ShardedMaskBudget, num_samples, processes=processes)
        sharded.save(tmp_path / "sharded" if processes.rank == 0 else None)

    def restore(processes):
        sharded = ShardedMaskBudget(num_samples, (10, 10), dataset_fingerprint="abc", processes=processes)
        content = sharded.restore(tmp_path / "sharded")
        require_equal(sharded, whole)
        return content

    together(before, save)
    assert (tmp_path / "sharded").read_bytes() == (tmp_path / "whole").read_bytes()
    contents = together(after, restore)
    assert set(contents) == {read_budget(tmp_path / "whole").metadata["sha256"]}
    other = MaskBudget(num_samples, (10, 10), dataset_fingerprint="abc")
    other.restore(tmp_path / "sharded")
    assert torch.equal(other.k, whole.k)
    assert torch.equal(ShardedMaskBudget.load(tmp_path / "sharded").k, whole.k)


def test_a_byte_of_another_processes_range_that_is_altered_is_refused(tmp_path):
    """Catches a process that checks its own rows alone: the others would refuse, and wait for it."""
    moved_budget().save(tmp_path / "k")
    content = bytearray((tmp_path / "k").read_bytes())
    content[-10 - 4] ^= 1  # K of the last sample
    (tmp_path / "k").write_bytes(content)

    def restore(processes):
        sharded = ShardedMaskBudget(10, (10, 10), dataset_fingerprint="abc", processes=processes)
        with pytest.raises(ValueError, match="its content is not what was written"):
            sharded.restore(tmp_path / "k")
        assert sharded.histogram[50 - sharded.k_min] == 10

    together(2, restore)


def test_what_needs_all_of_k_on_one_process_is_refused_by_name():
    """Catches a read on the first process alone that waits for the others for ever, or that gives a part of K."""

    def act(processes):
        sharded = moved_budget(ShardedMaskBudget, processes=processes)
        if processes.rank == 0:
            for read in (lambda: sharded.k, sharded.to_dataset):
                with pytest.raises(RuntimeError, match=r"sharded over 2 processes .*: call mask_budget.gathered\(\)"):
                    read()
            for use in (sharded.state_dict, lambda: sharded.load_state_dict({})):
                with pytest.raises(RuntimeError, match=r"no state_dict.*: call save\(path\) on every process"):
                    use()
            assert sharded.statistics() == {"k_min": 40, "k_median": 50, "k_max": 60}
            assert sharded.histogram.sum() == 10
        return sharded.gathered().to_dataset()["k"][:3]

    assert together(2, act) == [[60, 40, 53]] * 2
