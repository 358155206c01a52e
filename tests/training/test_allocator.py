"""Freed memory stays in the process while a training runs on a CPU, and goes back afterwards."""

import contextlib
import json
import os
import platform
import subprocess
import sys

import pytest

from smoot_hf.training import trainer as training_layer

# In a process of its own: one that has trained before has room on its heap, and takes none of the system.
MEASURE = """
import json, resource
import torch
from smoot_hf.training.allocator import freed_memory_kept

def faults(size):
    # Pages that two tensors of so many MiB fault in, each of them 256 pages for a MiB.
    counts = []
    for _ in range(5):  # the fewest: a block may be cut up by what else is allocated
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size * 2**18) + 1
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

found = {"faults before": faults(40), "MiB before": resident()}
with freed_memory_kept():
    found |= {"faults within": faults(40), "MiB within": resident()}
# Larger than any room that is left on the heap.
found |= {"MiB after": resident(), "faults after": faults(256)}
print(json.dumps(found))
"""


def measured(**environment):
    command = [sys.executable, "-c", MEASURE]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return json.loads(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_step_takes_the_memory_of_those_before_it_and_all_of_it_is_given_back():
    """Catches a setting that the C library ignores, or that is left behind, and a process that stays large."""
    found = measured()
    assert found["faults before"] > 20_000
    assert found["faults within"] < 1000
    assert found["MiB within"] > found["MiB before"] + 60
    assert found["MiB after"] < found["MiB before"] + 20
    assert found["faults after"] > 130_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_an_allocator_that_the_user_has_set_is_left_alone():
    """Catches a training that overrides the environment, and leaves other settings behind."""
    assert measured(MALLOC_MMAP_THRESHOLD_="1048576")["faults within"] > 20_000


def test_training_keeps_it_even_where_it_fails(quick_trainer, monkeypatch):
    """Catches a training without the setting, one that sets it unasked, and one whose error leaves it behind."""
    said = []

    @contextlib.contextmanager
    def kept(enabled):
        said.append(("kept", enabled))
        try:
            yield
        finally:
            said.append("given back")

    def fail(*_, **__):
        said.append("step")
        raise RuntimeError("stop")

    monkeypatch.setattr(training_layer, "freed_memory_kept", kept)
    for asked in (True, False):
        said.clear()
        trainer = quick_trainer(keep_freed_memory=asked)
        monkeypatch.setattr(trainer, "compute_loss", fail)
        with pytest.raises(RuntimeError, match="stop"):
            trainer.train()
        assert said == [("kept", asked), "step", "given back"]
