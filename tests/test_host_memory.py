"""Freed memory stays in the process while a training runs on a CPU, and goes back afterwards."""

import platform
import resource

import pytest
import torch

from smoot_hf.host_memory import freed_memory_kept

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")

MIB = 2**20


def faults():
    """Pages faulted in by a step: the fewest of five, for a block may be cut up by what else is allocated."""
    counts = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)


def step():
    """Two tensors of 40 MiB, more than glibc keeps: 20,480 pages."""
    one = torch.ones(10 * MIB)
    return one + 1


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_a_step_takes_the_memory_of_those_before_it():
    """Catches a setting that the C library ignores: every step would fault all of its pages in again."""
    assert faults() > 20_000
    with freed_memory_kept():
        assert faults() < 1000


def test_what_was_kept_is_given_back_and_the_setting_ends():
    """Catches a process that stays as large as its training, and other code that runs with our setting."""
    before = resident()
    with freed_memory_kept():
        step()
        assert resident() > before + 60 * MIB
    assert resident() < before + 20 * MIB
    assert faults() > 20_000


def test_training_keeps_it_even_where_it_fails(quick_trainer, monkeypatch):
    """Catches a training without the setting, and one whose error leaves it behind."""
    trainer, seen = quick_trainer(), []

    def fail(*_, **__):
        seen.append(faults())
        raise RuntimeError("stop")

    monkeypatch.setattr(trainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert seen[0] < 1000
    assert faults() > 20_000
