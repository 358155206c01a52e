"""Two processes give what one gives with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import largest_difference

HERE = Path(__file__).parent


def run(processes, folder, batch_size, length):
    """Start `distributed_run.py` in its own interpreters; the results of every rank."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, *launcher, str(HERE / "distributed_run.py"), str(folder), str(batch_size), str(length)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


def require_same_on_both_ranks(results):
    assert [result["world_size"] for result in results] == [2, 2]
    assert torch.equal(results[0]["k"], results[1]["k"])
    assert largest_difference(results[0]["parameters"], results[1]["parameters"]) == 0
    assert len(results[0]["k"].unique()) > 3


def test_two_processes_equal_one(tmp_path):
    """Catches K updated by one rank alone, fill that depends on the rank, and a loss scaled by the world size."""
    (alone,) = run(1, tmp_path / "one", 8, 24)
    together = run(2, tmp_path / "two", 4, 24)
    require_same_on_both_ranks(together)
    assert torch.equal(alone["k"], together[0]["k"])
    assert largest_difference(alone["parameters"], together[0]["parameters"]) < 1e-5
    for one, two in zip(alone["logs"], together[0]["logs"], strict=True):
        for name in {"ce_loss", "kl_loss", "delta", "k_up", "k_down", "k_median"} & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name


def test_samples_repeated_to_fill_the_last_round_leave_k_the_same_on_every_rank(tmp_path):
    """21 samples in batches of 8: three stand on both ranks; catches one rank writing the other's update."""
    require_same_on_both_ranks(run(2, tmp_path / "two", 4, 21))
